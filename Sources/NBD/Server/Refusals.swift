// Connections that were turned away: counted by reason, and logged so that a flood of them does not fill the log.
import Block
import LinuxIO
import Logging
import Synchronization

/// Why a connection was turned away.
public enum RefusalReason: Int, Sendable, CaseIterable {
    /// Too many connections, in all, of one peer or to one export.
    case limit
    /// The export it asked for does not exist, or no rule admits it: nobody is told which.
    case export
    /// The handshake was malformed, or took too long.
    case handshake
    /// TLS was not agreed on.
    case tls

    /// The name that metrics give it.
    public var name: String {
        switch self {
        case .limit: "limit"
        case .export: "export"
        case .handshake: "handshake"
        case .tls: "tls"
        }
    }
}

/// The connections that a server has turned away.
public final class Refusals: Sendable {
    private struct Entry {
        var count: UInt64 = 0
        /// When the present run of messages began, how many were logged in it, and how many were not.
        var began: Double?
        var logged = 0
        var unlogged: UInt64 = 0
    }

    /// Seconds in which a number of messages about the same reason are logged, and that number.
    static let windowSeconds = 10.0
    static let loggedMax = 10

    private let log: Logger
    private let entries = Locked([Entry](repeating: Entry(), count: RefusalReason.allCases.count))

    init(log: Logger) { self.log = log }

    /// Connections refused for a reason.
    public func count(_ reason: RefusalReason) -> UInt64 { entries.withLock { $0[reason.rawValue].count } }

    /// Counts a refusal, and logs it unless many were logged for the same reason just before.
    func add(_ reason: RefusalReason, _ text: @autoclosure () -> String) {
        let now = monotonicSeconds()
        let before: UInt64? = entries.withLock { entries in
            entries[reason.rawValue].count += 1
            if let began = entries[reason.rawValue].began, now - began < Self.windowSeconds {
                if entries[reason.rawValue].logged < Self.loggedMax {
                    entries[reason.rawValue].logged += 1
                    return 0
                }
                entries[reason.rawValue].unlogged += 1
                return nil
            }
            defer {
                entries[reason.rawValue].began = now
                entries[reason.rawValue].logged = 1
                entries[reason.rawValue].unlogged = 0
            }
            return entries[reason.rawValue].unlogged
        }
        guard let before else { return }
        log.warning("\(text())\(before > 0 ? "; \(before) more were refused since the last such message" : "")")
    }
}
