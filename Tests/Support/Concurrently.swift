// Threads for tests: all start, all end, and the first error of any of them is the test's.
import Block
import Dispatch
import LinuxIO

/// Runs the bodies on threads of their own and waits for all of them.
///
/// - Throws: the first error that any of them threw.
public func concurrently(_ bodies: [@Sendable () throws -> Void]) throws {
    let failure = Locked<(any Error)?>(nil)
    let group = DispatchGroup()
    for body in bodies {
        group.enter()
        try startThread(name: "test") {
            do { try body() } catch { failure.withLock { if $0 == nil { $0 = error } } }
            group.leave()
        }
    }
    group.wait()
    if let error = failure.withLock({ $0 }) { throw error }
}
