// What a pool knows of one of its connections: how it began, whether it has proved itself, and what is not flushed.
import Synchronization

/// A connection in a pool. What changes is touched under the pool's lock, but for `hasAnswered`.
final class PooledChannel: @unchecked Sendable {
    // Sendable because the pool's lock guards what changes.

    let channel: ClientChannel
    /// How many connections the pool had made before.
    let number: UInt64
    /// Whether it was made beside others. Servers may allow fewer than they say, and close one more at once.
    let isAdditional: Bool
    /// Whether the server has answered anything on it.
    let hasAnswered = Atomic<Bool>(false)
    /// Whether the pool uses it no more.
    var isDropped = false
    /// Changes that were answered on it without being durable, and those of them that a flush covers.
    var answered: UInt64 = 0
    var flushed: UInt64 = 0

    init(_ channel: ClientChannel, number: UInt64, isAdditional: Bool) {
        self.channel = channel
        self.number = number
        self.isAdditional = isAdditional
    }

    /// Whether changes may be lost with it.
    var isDirty: Bool { answered > flushed }

    /// Whether its loss is no more than one connection less that could be had.
    var isUnproven: Bool { isAdditional && !hasAnswered.load(ordering: .relaxed) }

    /// Notes that a flush covers the first so many changes.
    func cover(_ count: UInt64) { flushed = max(flushed, count) }
}
