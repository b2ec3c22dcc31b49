// What a server logs, kept for a test to look at.
import Block
import Logging

/// A log whose lines a test reads while the server runs.
final class RecordedLog: Sendable {
    private let recorded = Locked<[String]>([])

    /// The messages so far.
    var lines: [String] { recorded.withLock { $0 } }

    /// Whether a message contains a text, waiting for it.
    func says(_ text: String) -> Bool { eventually { self.lines.contains { $0.contains(text) } } }

    /// A logger that writes here.
    var logger: Logger { Logger(label: "test") { _ in Handler(log: self) } }

    private struct Handler: LogHandler {
        let log: RecordedLog
        var metadata: Logger.Metadata = [:]
        var logLevel = Logger.Level.info
        init(log: RecordedLog) { self.log = log }
        subscript(metadataKey key: String) -> Logger.Metadata.Value? {
            get { nil }
            set { _ = newValue }
        }
        func log(event: LogEvent) { log.recorded.withLock { $0.append("\(event.message)") } }
    }
}
