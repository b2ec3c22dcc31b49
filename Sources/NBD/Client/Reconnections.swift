// How often connections were made in place of lost ones: whoever has read before and after may have read two disks.
import Block

/// Counts, for this process, the connections that were made after all of a disk were lost. The disk behind them may be
/// another one by then, below whatever formats and filters it is read through.
public enum Reconnections {
    private static let counts = Locked<[String: Int]>([:])

    /// Connections to an export that were made in place of lost ones.
    public static func count(of uri: NBDURI) -> Int { counts.withLock { $0[uri.description] ?? 0 } }

    static func note(_ uri: NBDURI) { counts.withLock { $0[uri.description, default: 0] += 1 } }
}
