// What this process holds outside itself for as long as a disk is open, given back however the process ends.
import Block

/// Things that are given back when nobody uses them any more, or else when the process ends.
///
/// A disk may still be open then: a thread was reading when a signal came, or is about to let go of its last reference.
public enum ProcessLeases {
    /// Gives something back.
    ///
    /// - Parameter isEnding: whether the process may still have the disk open itself.
    typealias Release = @Sendable (_ isEnding: Bool) -> Void

    private struct State {
        var held: [Int: Release] = [:]
        var next = 0
        /// Releases that are going on.
        var going = 0
        /// Whether something could not be given back.
        var hasLeft = false
    }

    private static let state = Guarded(State())

    /// Notes something that has to be given back.
    ///
    /// - Returns: what to give it back with.
    static func hold(_ release: @escaping Release) -> Int {
        state.withLock { state in
            state.next += 1
            state.held[state.next] = release
            return state.next
        }
    }

    /// Gives something back, once.
    static func release(_ id: Int) {
        let release = state.withLock { state -> Release? in
            let release = state.held.removeValue(forKey: id)
            if release != nil { state.going += 1 }
            return release
        }
        guard let release else { return }
        release(false)
        end()
    }

    /// Gives everything back that is held, and waits for what others are giving back. The process is about to end:
    /// nothing may be opened any more.
    public static func releaseAll() {
        while let release = state.withLock({ state -> Release? in
            guard let id = state.held.keys.max() else { return nil }
            state.going += 1
            return state.held.removeValue(forKey: id)
        }) {
            release(true)
            end()
        }
        state.wait { $0.going == 0 }
    }

    /// Notes that something could not be given back, of which people were told.
    static func noteLeft() { state.withLock { $0.hasLeft = true } }

    /// Whether something could not be given back.
    public static var hasLeft: Bool { state.withLock { $0.hasLeft } }

    private static func end() { state.withLock { $0.going -= 1 } }
}

/// A value under a lock, whose changes can be waited for.
private final class Guarded<Value>: @unchecked Sendable {
    // Sendable because the value is touched under the lock only.
    private let lock = Lock()
    private let changed = Condition()
    private var value: Value

    init(_ value: Value) { self.value = value }

    func withLock<Result>(_ body: (inout Value) -> Result) -> Result {
        lock.lock()
        defer {
            changed.broadcast()
            lock.unlock()
        }
        return body(&value)
    }

    func wait(until isSo: (Value) -> Bool) {
        lock.lock()
        defer { lock.unlock() }
        while !isSo(value) { changed.wait(holding: lock) }
    }
}
