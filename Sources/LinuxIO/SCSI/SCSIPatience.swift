// How often a command is sent again that a unit did not carry out for a reason that passes.
import Glibc

/// Counts the attempts of one command, and waits between them.
public struct SCSIPatience: Sendable {
    /// Events that a unit reports once: several may be waiting for a new initiator.
    private static let attentionsMax = 8
    /// Attempts with a unit that is busy: some 6 s altogether.
    private static let attemptsMax = 12

    private var attentions = 0
    private var attempts = 0

    /// The patience for one command.
    public init() {}

    /// Whether the command is to be sent again; waits before it says so, where the unit needs time.
    public mutating func allowsAnother(_ outcome: SCSIOutcome) -> Bool {
        guard outcome.isWorthRepeating else { return false }
        if outcome.sense?.key == 6 {
            attentions += 1
            return attentions <= Self.attentionsMax
        }
        attempts += 1
        if attempts > Self.attemptsMax { return false }
        usleep(UInt32(min(10_000 << attempts, 1_000_000)))
        return true
    }
}
