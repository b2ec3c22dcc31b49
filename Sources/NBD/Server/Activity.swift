// What a connection is doing at this moment: published by its thread in a few relaxed stores, for the watcher.
import Synchronization

/// The present of one connection. Only its thread writes it; a reader may see fields of neighbouring moments together.
final class Activity: Sendable {
    /// What the connection's thread waits for, or does.
    enum Phase: UInt8 {
        /// The next request; nothing is in flight.
        case idle
        /// The rest of a request, or of its payload.
        case receiving
        /// A request is being answered: it computes, or storage is slow.
        case working
        /// The client has to take what is sent.
        case sending
        /// A rate limit.
        case throttled
        /// Requests in slots: storage, or more requests.
        case waiting
    }

    /// A request as far as messages tell of it.
    struct Work: Equatable {
        var operation = Operation.other
        var offset: UInt64 = 0
        var length: UInt64 = 0
        /// When it arrived, in nanoseconds of the monotonic clock; 0 for no request.
        var arrival: UInt64 = 0
    }

    private let phaseValue = Atomic<UInt8>(Phase.idle.rawValue)
    private let steps = Atomic<UInt64>(0)
    private let arrivalTime = Atomic<UInt64>(0)
    private let command = Atomic<UInt8>(0)
    private let offset = Atomic<UInt64>(0)
    private let length = Atomic<UInt64>(0)
    private let oldestArrival = Atomic<UInt64>(0)
    private let oldestCommand = Atomic<UInt8>(0)
    private let oldestOffset = Atomic<UInt64>(0)
    private let oldestLength = Atomic<UInt64>(0)
    private let requestsInSlots = Atomic<Int>(0)
    private let memory = Atomic<Int>(0)
    private let memoryIsWanted = Atomic<Bool>(false)

    // MARK: - For the connection

    /// Something arrived from the client.
    @inline(__always)
    func arrived(_ time: UInt64) {
        arrivalTime.store(time, ordering: .relaxed)
        step()
    }

    /// Made progress: what comes next is not what it was busy with before.
    @inline(__always)
    func step() { steps.store(steps.load(ordering: .relaxed) &+ 1, ordering: .relaxed) }

    /// Begins to answer a request.
    @inline(__always)
    func begin(_ request: Request) {
        command.store(UInt8(truncatingIfNeeded: min(request.command, 255)), ordering: .relaxed)
        offset.store(request.offset, ordering: .relaxed)
        length.store(request.length, ordering: .relaxed)
        step()
    }

    @inline(__always)
    func enter(_ phase: Phase) { phaseValue.store(phase.rawValue, ordering: .relaxed) }

    /// Tells how many requests are in slots, and the one that has been there longest.
    func publish(inSlots: Int, oldest: Work) {
        requestsInSlots.store(inSlots, ordering: .relaxed)
        oldestArrival.store(oldest.arrival, ordering: .relaxed)
        oldestCommand.store(UInt8(truncatingIfNeeded: oldest.operation.rawValue), ordering: .relaxed)
        oldestOffset.store(oldest.offset, ordering: .relaxed)
        oldestLength.store(oldest.length, ordering: .relaxed)
    }

    /// Tells how many bytes the connection's slots hold.
    func publish(memory bytes: Int) { memory.store(bytes, ordering: .relaxed) }

    // MARK: - For those who look

    /// Bytes that the connection's slots hold.
    var memoryHeld: Int { memory.load(ordering: .relaxed) }
    /// Whether the connection should give back memory that it does not need.
    @inline(__always)
    var isAskedForMemory: Bool { memoryIsWanted.load(ordering: .relaxed) }
    func askForMemory(_ wanted: Bool) { memoryIsWanted.store(wanted, ordering: .relaxed) }

    var phase: Phase { Phase(rawValue: phaseValue.load(ordering: .relaxed)) ?? .idle }
    /// A number that changes with every step forward.
    var position: UInt64 { steps.load(ordering: .relaxed) }
    /// When something last arrived from the client, in nanoseconds of the monotonic clock.
    var lastArrival: UInt64 { arrivalTime.load(ordering: .relaxed) }

    /// The request that the thread itself is answering, or answered last.
    var current: Work {
        Work(
            operation: Operation(command: UInt16(command.load(ordering: .relaxed))),
            offset: offset.load(ordering: .relaxed), length: length.load(ordering: .relaxed), arrival: lastArrival)
    }

    /// The request that has been in a slot longest; its arrival is 0 when there is none.
    var oldest: Work {
        Work(
            operation: Operation(command: UInt16(oldestCommand.load(ordering: .relaxed))),
            offset: oldestOffset.load(ordering: .relaxed), length: oldestLength.load(ordering: .relaxed),
            arrival: oldestArrival.load(ordering: .relaxed))
    }

    /// Whether the thread itself has a request that is not answered.
    private var hasCurrent: Bool {
        switch phase {
        case .idle, .waiting: false
        case .receiving, .working, .sending, .throttled: true
        }
    }

    /// Requests that were received and are not answered; those that wait behind the one being answered are not seen.
    var inFlight: Int { requestsInSlots.load(ordering: .relaxed) + (hasCurrent ? 1 : 0) }

    /// When the oldest of them arrived, in nanoseconds of the monotonic clock; nil when there is none.
    var oldestStart: UInt64? {
        let inSlot = oldestArrival.load(ordering: .relaxed)
        if inSlot != 0 { return inSlot }
        return hasCurrent ? lastArrival : nil
    }
}
