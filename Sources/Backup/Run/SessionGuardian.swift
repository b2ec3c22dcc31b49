// Looks after a snapshot while it is read, and ends the run when it, or the guest, is in danger.
import Block
import Glibc
import Hypervisors
import LinuxIO

/// Asks a session every second whether it still holds. When it does not, work is cancelled.
final class SessionGuardian: Sendable {
    /// What both threads know.
    private final class State: @unchecked Sendable {
        // Sendable because all of it is touched only under `lock`.
        let lock = Lock()
        let changed = Condition()
        var isStopped = false
        var hasEnded = false
        var failure: BlockError?

        /// Waits, for some seconds or until it is stopped.
        ///
        /// - Returns: whether it goes on.
        func wait(seconds: Double) -> Bool {
            let end = monotonicNanoseconds() + UInt64(max(0, seconds) * 1e9)
            return lock.withLock {
                while !isStopped {
                    if monotonicNanoseconds() >= end { return true }
                    _ = changed.wait(holding: lock, until: end)
                }
                return false
            }
        }
    }

    private let state = State()
    private let session: any SnapshotSession
    private static let interval = 1.0

    /// Begins to look after a session.
    ///
    /// - Parameter cancellation: is cancelled when the session does not hold any more.
    init(_ session: any SnapshotSession, _ cancellation: Cancellation) throws(BlockError) {
        self.session = session
        let state = state
        try startThread(name: "guardian") {
            var delay = 0.0
            while state.wait(seconds: delay) {
                do throws(BlockError) { try session.check(isLast: false) } catch {
                    state.lock.withLock { state.failure = error }
                    cancellation.cancel()
                    break
                }
                delay = Self.interval
            }
            state.lock.withLock {
                state.hasEnded = true
                state.changed.broadcast()
            }
        }
    }

    /// Ends the looking after, and waits for its end: nobody but the caller uses the session then.
    func stop() {
        state.lock.withLock {
            state.isStopped = true
            state.changed.broadcast()
            while !state.hasEnded { state.changed.wait(holding: state.lock) }
        }
    }

    /// Looks once more, after everything has been read.
    ///
    /// - Throws: what made the session useless; the bytes that were read cannot be trusted then.
    func verdict() throws(BlockError) {
        stop()
        if let failure { throw failure }
        try session.check(isLast: true)
    }

    /// Why work was cancelled, if it was for the session's sake.
    var failure: BlockError? { state.lock.withLock { state.failure } }
}
