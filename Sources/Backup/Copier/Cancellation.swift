// How long work is told to end early: by a signal, by a failure elsewhere, by whoever runs it.
public import Block
import Synchronization

/// Tells work to end. It stays told.
public final class Cancellation: Sendable {
    private struct Actions {
        var next = 0
        var byNumber: [Int: @Sendable () -> Void] = [:]
    }

    private let flag = Atomic<Bool>(false)
    private let actions = Locked(Actions())

    /// Nobody has told anything yet.
    public init() {}

    /// Whether the work is to end.
    public var isCancelled: Bool { flag.load(ordering: .acquiring) }

    /// Tells the work to end. May be called from any thread, and more than once.
    public func cancel() {
        let todo = actions.withLock { (actions) -> [@Sendable () -> Void] in
            flag.store(true, ordering: .releasing)
            defer { actions.byNumber.removeAll() }
            return Array(actions.byNumber.values)
        }
        for action in todo { action() }
    }

    /// Runs an action when the work is told to end, on the thread that tells it; at once if that has happened. It must
    /// not wait for the work.
    ///
    /// - Returns: a number to `forget` it by.
    public func whenCancelled(_ action: @escaping @Sendable () -> Void) -> Int {
        let number = actions.withLock { (actions) -> Int? in
            if isCancelled { return nil }
            actions.next += 1
            actions.byNumber[actions.next] = action
            return actions.next
        }
        if number == nil { action() }
        return number ?? 0
    }

    /// Forgets an action.
    public func forget(_ number: Int) {
        actions.withLock { $0.byNumber[number] = nil }
    }

    /// Throws when the work is to end.
    ///
    /// - Parameter doing: what was being done, for the message.
    /// - Throws: `.shutdown`.
    public func check(_ doing: @autoclosure () -> String) throws(BlockError) {
        if isCancelled { throw BlockError(.shutdown, "\(doing()): it was told to stop") }
    }
}
