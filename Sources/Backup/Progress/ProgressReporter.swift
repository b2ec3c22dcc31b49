// How people and programs are told how far a copy is: a bar, lines now and then, or JSON events.
import Block
public import Glibc
import LinuxIO

/// Prints progress to standard error.
public final class ProgressReporter {
    /// What is printed.
    public enum Style: Sendable {
        /// A line that changes, five times a second.
        case bar
        /// A line every five seconds.
        case lines
        /// One JSON object in a line, every second.
        case json
        /// Nothing.
        case silent

        /// A bar on a terminal, else lines.
        public static var automatic: Style { isatty(STDERR_FILENO) != 0 ? .bar : .lines }
    }

    private let style: Style
    private let descriptor: Int32
    private var subject: String
    private var lastSeconds: Double
    // When how much was done, over the last seconds.
    private var samples: [(seconds: Double, bytes: UInt64)] = []
    private var barLength = 0

    /// A reporter.
    ///
    /// - Parameters:
    ///   - subject: what goes on, in front of a line: "copy", "verify".
    ///   - descriptor: where it goes.
    public init(_ style: Style, subject: String, descriptor: Int32 = STDERR_FILENO) {
        self.style = style
        self.subject = subject
        self.descriptor = descriptor
        lastSeconds = monotonicSeconds()
    }

    /// Goes on with something else.
    public func begin(_ subject: String) {
        finish()
        self.subject = subject
        samples.removeAll()
        lastSeconds = monotonicSeconds()
    }

    private var interval: Double {
        switch style {
        case .bar: 0.2
        case .lines: 5
        case .json: 1
        case .silent: .infinity
        }
    }

    /// Takes note of progress, and prints it when it is time to.
    public func update(_ progress: CopyProgress) {
        let now = monotonicSeconds()
        guard now - lastSeconds >= interval else { return }
        lastSeconds = now
        samples.append((now, progress.doneBytes))
        while samples.count > 2, now - samples[0].seconds > 10 { samples.removeFirst() }
        switch style {
        case .bar: show(progress)
        case .lines: put("\(subject): \(text(progress))\n")
        case .json: put(json(progress))
        case .silent: break
        }
    }

    /// Clears the bar, if there is one. To be called before anything else is printed.
    public func finish() {
        if barLength > 0 { put("\r" + String(repeating: " ", count: barLength) + "\r") }
        barLength = 0
    }

    /// Bytes per second of late.
    private var rate: Double {
        guard let first = samples.first, let last = samples.last, last.seconds > first.seconds else { return 0 }
        return Double(last.bytes - min(first.bytes, last.bytes)) / (last.seconds - first.seconds)
    }

    /// Bytes left to do; nil as long as that is not known.
    private func left(_ progress: CopyProgress) -> UInt64? {
        progress.isPlanned ? progress.planBytes - min(progress.doneBytes, progress.planBytes) : nil
    }

    private func text(_ progress: CopyProgress) -> String {
        var parts = [readable(progress.doneBytes)]
        if progress.isPlanned {
            parts[0] += " of \(readable(progress.planBytes))"
        } else {
            parts[0] += " done, \(readable(progress.planBytes)) found so far"
        }
        let rate = rate
        if rate > 0 { parts.append("\(readable(UInt64(rate)))/s") }
        if let left = left(progress), rate > 0 { parts.append("\(timeText(Double(left) / rate)) left") }
        if progress.retries > 0 { parts.append("\(progress.retries) retries") }
        return parts.joined(separator: ", ")
    }

    private func show(_ progress: CopyProgress) {
        let width = 24
        let share =
            progress.isPlanned && progress.planBytes > 0
            ? min(1, Double(progress.doneBytes) / Double(progress.planBytes)) : 0
        let full = Int(share * Double(width))
        let bar = String(repeating: "#", count: full) + String(repeating: ".", count: width - full)
        let percent = progress.isPlanned ? "\(Int(share * 100)) %" : "  "
        let line = "\(subject) [\(bar)] \(percent) \(text(progress))"
        let rest = String(repeating: " ", count: max(0, barLength - line.count))
        put("\r\(line)\(rest)")
        barLength = line.count
    }

    private func json(_ progress: CopyProgress) -> String {
        let total = progress.isPlanned ? "\(progress.planBytes)" : "null"
        let left = left(progress).flatMap { rate > 0 ? "\(Int(Double($0) / rate))" : nil } ?? "null"
        return "{\"event\":\"progress\",\"phase\":\"\(subject)\",\"done\":\(progress.doneBytes),\"total\":\(total),"
            + "\"read\":\(progress.readBytes),\"written\":\(progress.writtenBytes),\"zeroed\":\(progress.zeroedBytes),"
            + "\"bytesPerSecond\":\(UInt64(rate)),\"secondsLeft\":\(left),\"retries\":\(progress.retries)}\n"
    }

    private func put(_ text: String) {
        _ = text.withCString { write(descriptor, $0, strlen($0)) }
    }
}

/// A duration for people: 0:07, 12:34, 1:02:03.
public func timeText(_ seconds: Double) -> String {
    guard seconds.isFinite, seconds < 1e9 else { return "?" }
    let whole = Int(max(seconds, 0).rounded())
    func two(_ number: Int) -> String { number < 10 ? "0\(number)" : "\(number)" }
    if whole < 3600 { return "\(whole / 60):\(two(whole % 60))" }
    return "\(whole / 3600):\(two(whole / 60 % 60)):\(two(whole % 60))"
}
