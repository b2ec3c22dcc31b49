// Looks after a snapshot while it is read, and ends the run when it, or the guest, is in danger.
import Block
import Glibc
import Hypervisors
import LinuxIO

/// Asks a session every second whether it still holds. When it does not, work is cancelled.
final class SessionGuardian: Sendable {
    private struct State {
        var isStopped = false
        var hasEnded = false
        var failure: BlockError?
    }

    private let state = Locked(State())
    private let session: any SnapshotSession
    private static let interval = 1.0

    /// Begins to look after a session.
    ///
    /// - Parameter cancellation: is cancelled when the session does not hold any more.
    init(_ session: any SnapshotSession, _ cancellation: Cancellation) throws(BlockError) {
        self.session = session
        let state = state
        try startThread(name: "guardian") {
            var next = monotonicSeconds()
            while !state.withLock({ $0.isStopped }) {
                if monotonicSeconds() >= next {
                    do throws(BlockError) { try session.check(isLast: false) } catch {
                        state.withLock { $0.failure = error }
                        cancellation.cancel()
                        break
                    }
                    next = monotonicSeconds() + Self.interval
                }
                usleep(20_000)
            }
            state.withLock { $0.hasEnded = true }
        }
    }

    /// Ends the looking after, and waits for its end: nobody but the caller uses the session then.
    func stop() {
        state.withLock { $0.isStopped = true }
        while !state.withLock({ $0.hasEnded }) { usleep(1000) }
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
    var failure: BlockError? { state.withLock { $0.failure } }
}
