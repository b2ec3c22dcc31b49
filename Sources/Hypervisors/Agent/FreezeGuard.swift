// The child process that freezes and thaws: it is started before, and thaws when diskgate is gone or takes too long.
public import Block
import CLinux
import Glibc
import LinuxIO

/// A freeze that ends, whatever happens to this process. The guard is diskgate itself, started again.
///
/// Over the socket between them, this process says `freeze` and then `thaw`; the guard answers with `frozen`, `thawed`,
/// `late` (it has thawed by itself, since the time was over, or the guest has), `unsupported REASON` (nothing was
/// frozen) or `error REASON`.
final class FreezeGuard {
    private let socket: Descriptor
    let process: pid_t
    private let freezer: Freezer
    private var received: [UInt8] = []

    /// The program and the words in front of what a guard is told. Another one in tests, which are not diskgate.
    static let program = Locked<[String]>(["/proc/self/exe", "freeze-guard"])

    /// Starts a guard. Nothing is frozen yet.
    ///
    /// - Parameter seconds: the longest time that file systems stay frozen.
    init(_ freezer: Freezer, seconds: Int) throws(BlockError) {
        self.freezer = freezer
        var words = Self.program.withLock { $0 }
        words.append("--seconds=\(seconds)")
        for (key, value) in freezer.details.sorted(by: { $0.key < $1.key }) { words.append("--\(key)=\(value)") }
        var pair: [Int32] = [-1, -1]
        guard socketpair(AF_UNIX, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue), 0, &pair) == 0 else {
            throw BlockError(errno: errno, "making a socket for the freeze guard")
        }
        socket = Descriptor(owning: pair[0])
        let theirs = Descriptor(owning: pair[1])
        process = try ChildProgram.start(words, input: theirs.number, output: theirs.number, errors: nil)
    }

    deinit {
        // Its end of the socket ends it; somebody has to take its status.
        shutdown(socket.number, Int32(SHUT_RDWR))
        let child = process
        try? startThread(name: "freeze-guard", stackSize: 128 * 1024) { ChildProgram.reap(child) }
    }

    /// Freezes.
    ///
    /// - Throws: `.unsupported` when nothing was frozen; another `BlockError` when that is not certain.
    func freeze(seconds: Double) throws(BlockError) {
        let answer = try ask("freeze", seconds: seconds + Self.thawSeconds + 5)
        if answer == "frozen" { return }
        let isUntouched = answer.hasPrefix("unsupported ")
        throw BlockError(isUntouched ? .unsupported : .inputOutput, "freezing the guest's file systems: \(answer)")
    }

    /// Thaws.
    ///
    /// - Returns: whether file systems were frozen until now.
    /// - Throws: `BlockError` when they may still be frozen, after much patience.
    func thaw() throws(BlockError) -> Bool {
        let answer = (try? ask("thaw", seconds: Self.thawSeconds + 5)) ?? ""
        if answer == "thawed" { return true }
        if answer == "late" { return false }
        // The guard itself was killed: then it is up to us.
        _ = try freezer.thawSurely(seconds: Self.thawSeconds)
        return false
    }

    /// Seconds for which thawing is tried, again and again.
    private static let thawSeconds = 60.0

    private func ask(_ word: String, seconds: Double) throws(BlockError) -> String {
        let deadline = monotonicSeconds() + seconds
        let bytes = Array("\(word)\n".utf8)
        let sent = bytes.withUnsafeBytes { send(socket.number, $0.baseAddress, $0.count, Int32(MSG_NOSIGNAL)) }
        if sent != bytes.count { throw BlockError(.shutdown, "talking to the freeze guard: it is gone") }
        while true {
            guard let line = FreezeGuardProcess.line(from: socket.number, &received, deadline: deadline) else {
                throw BlockError(.shutdown, "talking to the freeze guard: it is gone, or does not answer")
            }
            return line
        }
    }
}

/// What the guard process does.
public enum FreezeGuardProcess {
    /// Serves as the guard of one freeze, with a socket as standard input. For the command `freeze-guard` only.
    ///
    /// - Parameters:
    ///   - details: whom to ask: `agent`, or `libvirt` and `domain`.
    ///   - seconds: the longest time that file systems stay frozen.
    /// - Returns: the exit status: 0 unless something may still be frozen.
    /// - Throws: `.invalid` when `details` name nobody.
    public static func run(_ details: [String: String], seconds: Int) throws(BlockError) -> Int32 {
        guard let freezer = Freezer(details) else {
            throw BlockError(.invalid, "guarding a freeze: give agent, or libvirt and domain")
        }
        // What ends the run must not end who thaws behind it.
        for number in [SIGTERM, SIGINT, SIGHUP, SIGPIPE, SIGQUIT] { signal(number, SIG_IGN) }
        var received: [UInt8] = []
        guard line(from: STDIN_FILENO, &received, deadline: .infinity) == "freeze" else { return 0 }
        let deadline = monotonicSeconds() + Double(seconds)
        do throws(BlockError) { try freezer.freeze(deadline: deadline) } catch {
            // The agent may be about to freeze, though it has not said so.
            if error.kind == .unsupported {
                say("unsupported \(error.message)")
                return 0
            }
            let isThawed = (try? freezer.thawSurely(seconds: 60)) != nil
            say("error \(error.message)\(isThawed ? "" : "; and thawing failed, too")")
            return isThawed ? 0 : 1
        }
        Step.reached("guard.frozen")
        say("frozen")
        let word = line(from: STDIN_FILENO, &received, deadline: deadline)
        let wasFrozen: Bool
        do throws(BlockError) { wasFrozen = try freezer.thawSurely(seconds: 60) } catch {
            say("error \(error.message)")
            return 1
        }
        say(word == "thaw" && wasFrozen ? "thawed" : "late")
        return 0
    }

    private static func say(_ text: String) {
        let line = Array((text.map { $0 == "\n" ? " " : String($0) }.joined() + "\n").utf8)
        _ = line.withUnsafeBytes { send(STDIN_FILENO, $0.baseAddress, $0.count, Int32(MSG_NOSIGNAL)) }
    }

    /// The next line; nil when the other end is gone, or nothing comes until the deadline.
    static func line(from descriptor: Int32, _ received: inout [UInt8], deadline: Double) -> String? {
        while true {
            if let end = received.firstIndex(of: UInt8(ascii: "\n")) {
                defer { received.removeFirst(end + 1) }
                return String(decoding: received[..<end], as: UTF8.self)
            }
            let left = min(deadline - monotonicSeconds(), 3600)
            if left <= 0 { return nil }
            var ready = pollfd(fd: descriptor, events: Int16(POLLIN), revents: 0)
            if poll(&ready, 1, Int32(left * 1000) + 1) <= 0 { continue }
            var bytes = [UInt8](repeating: 0, count: 4096)
            let got = read(descriptor, &bytes, bytes.count)
            if got == 0 || got < 0 && errno != EINTR && errno != EAGAIN { return nil }
            if got > 0 { received += bytes[..<got] }
        }
    }
}
