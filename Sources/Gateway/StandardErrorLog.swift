// Where messages go: standard error, with a priority in front where journald reads it.
import Glibc
public import Logging

/// A log handler that writes one line per message to standard error.
public struct StandardErrorLog: LogHandler {
    public var metadata: Logger.Metadata = [:]
    public var logLevel: Logger.Level
    private let isJournal = StandardErrorLog.isJournal()

    /// Whether standard error is the stream to journald that the service manager made (systemd.exec(5),
    /// JOURNAL_STREAM), and not a terminal of a program that inherited the variable.
    private static func isJournal() -> Bool {
        guard let stream = getenv("JOURNAL_STREAM").map({ String(cString: $0) }) else { return false }
        var status = stat()
        return fstat(STDERR_FILENO, &status) == 0 && stream == "\(status.st_dev):\(status.st_ino)"
    }

    /// A handler that drops messages below a level.
    public init(level: Logger.Level) { logLevel = level }

    public subscript(metadataKey key: String) -> Logger.Metadata.Value? {
        get { metadata[key] }
        set { metadata[key] = newValue }
    }

    public func log(event: LogEvent) {
        // sd-daemon(3): <N> is the syslog priority.
        let priority: Int =
            switch event.level {
            case .trace, .debug: 7
            case .info: 6
            case .notice: 5
            case .warning: 4
            case .error: 3
            case .critical: 2
            }
        let level = isJournal ? "<\(priority)>" : event.level < .warning ? "" : "\(event.level): "
        let line = "\(isJournal ? "" : "diskgate: ")\(level)\(event.message)\n"
        _ = line.withCString { write(STDERR_FILENO, $0, strlen($0)) }
    }
}
