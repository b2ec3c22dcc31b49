// Requests that have to wait for storage: each holds a slot of its connection until its reply is made.
import Block
import CLinux
import Glibc
import LinuxIO

/// One operation in flight outside the connection's own thread.
struct Slot {
    /// What the slot's result becomes.
    enum Kind {
        /// A chunk of a structured or extended read.
        case chunk
        /// The whole of a read that is answered in one piece.
        case whole
        /// A command without data in its reply, or one whose reply was made on the lane.
        case plain
    }

    var kind = Kind.plain
    var operation = Operation.read
    /// When the request arrived, in nanoseconds of the monotonic clock; 0 while the slot is free.
    var arrival: UInt64 = 0
    var cookie: UInt64 = 0
    /// The request's offset, which extended replies repeat.
    var requestOffset: UInt64 = 0
    /// Bytes to count for the request when the slot is done; 0 for the slots of a chunked read.
    var requestLength: UInt64 = 0
    /// Where on the device the slot's bytes are.
    var offset: UInt64 = 0
    /// How many bytes.
    var length = 0
    /// The map version that the place was found under.
    var version: UInt64 = 0
    /// The index of the read whose chunk this is; -1 for none.
    var read = -1
    /// Ring reads: the file, where in it, the aligned bytes asked for and had, and those before the wanted ones.
    var file = FileRef(descriptor: -1, traits: [])
    var fileOffset: UInt64 = 0
    var wanted = 0
    var had = 0
    var skip = 0
    /// Memory that stays with the slot while there is enough; only grows.
    var pages: SlotPages?
    /// The same, as bytes.
    var memory: UnsafeMutableRawBufferPointer? { pages?.bytes }
    /// Bytes that the request holds elsewhere, on the budget until the slot is free.
    var extra = 0

    /// The wanted bytes after a completed read.
    var bytes: UnsafeRawBufferPointer {
        guard let memory else { return UnsafeRawBufferPointer(start: nil, count: 0) }
        return UnsafeRawBufferPointer(rebasing: memory[skip..<(skip + length)])
    }
}

/// A read that is answered in chunks, some of which wait for slots.
struct ChunkedRead {
    var cookie: UInt64 = 0
    var offset: UInt64 = 0
    var length: UInt64 = 0
    /// When it arrived, in nanoseconds of the monotonic clock.
    var arrival: UInt64 = 0
    /// Whether a part of it has failed.
    var hasFailed = false
    /// Slots that still have to finish.
    var outstanding = 0
    /// Whether the connection is still handing out parts of it.
    var isIssuing = false
}

/// The slots of one connection, owned by its thread. A slot gets memory when it is first used.
struct SlotTable: ~Copyable {
    /// The most operations in flight per connection: two full queues of the deepest common client (nbdcopy: 64).
    static let countMax = 64

    let slots: UnsafeMutablePointer<Slot>
    let reads: UnsafeMutablePointer<ChunkedRead>
    private var free: [Int] = Array((0..<countMax).reversed())
    private var freeReads: [Int] = Array((0..<(countMax + 1)).reversed())

    private let budget: SlotBudget
    /// Bytes of the budget that this connection has.
    private(set) var bytes = 0

    init(budget: SlotBudget) {
        self.budget = budget
        slots = .allocate(capacity: Self.countMax)
        slots.initialize(repeating: Slot(), count: Self.countMax)
        reads = .allocate(capacity: Self.countMax + 1)
        reads.initialize(repeating: ChunkedRead(), count: Self.countMax + 1)
    }

    deinit {
        for index in 0..<Self.countMax { slots[index].pages?.deallocate() }
        budget.giveBack(bytes)
        slots.deinitialize(count: Self.countMax)
        slots.deallocate()
        reads.deallocate()
    }

    var inFlight: Int { Self.countMax - free.count }
    var isFull: Bool { free.isEmpty }

    /// Takes a free slot with room for `bytes`, for a request that holds `extra` bytes elsewhere; nil when there is
    /// none or no memory for it, until one that is in flight is released.
    mutating func take(bytes: Int, extra: Int = 0) -> Int? {
        guard let index = free.last else { return nil }
        if !charge(index, bytes, extra) {
            // What free slots keep may be enough for this one.
            giveMemoryBack()
            if !charge(index, bytes, extra) { return nil }
        }
        free.removeLast()
        var pages = slots[index].pages
        if bytes > pages?.bytes.count ?? 0 {
            pages?.deallocate()
            pages = SlotPages(bytes)
        }
        slots[index] = Slot()
        slots[index].pages = pages
        slots[index].extra = extra
        return index
    }

    /// Takes what a slot will hold more than it does from the budget.
    private mutating func charge(_ index: Int, _ bytes: Int, _ extra: Int) -> Bool {
        let more = extra + max(0, SlotPages.size(bytes) - (slots[index].memory?.count ?? 0))
        if more > 0 && !budget.take(more, isFirst: inFlight == 0) { return false }
        self.bytes += more
        return true
    }

    mutating func release(_ index: Int) {
        slots[index].arrival = 0
        free.append(index)
        giveBack(slots[index].extra)
        slots[index].extra = 0
        if budget.isTight { giveMemoryBack(of: index) }
    }

    /// Gives back the memory of all free slots.
    mutating func giveMemoryBack() {
        if bytes == 0 { return }
        for index in free { giveMemoryBack(of: index) }
    }

    private mutating func giveMemoryBack(of index: Int) {
        guard let pages = slots[index].pages else { return }
        pages.deallocate()
        slots[index].pages = nil
        giveBack(pages.bytes.count)
    }

    private mutating func giveBack(_ count: Int) {
        if count == 0 { return }
        bytes -= count
        budget.giveBack(count)
    }

    /// Requests in slots.
    var requests: Int {
        var chunks = 0
        for index in 0..<Self.countMax where slots[index].arrival != 0 && slots[index].kind == .chunk { chunks += 1 }
        return inFlight - chunks + Self.countMax + 1 - freeReads.count
    }

    /// The request that has been in a slot longest, and the bytes it waits for; without an arrival when there is none.
    var oldest: Activity.Work {
        var oldest = Activity.Work()
        for index in 0..<Self.countMax {
            let slot = slots[index]
            if slot.arrival == 0 || (oldest.arrival != 0 && slot.arrival >= oldest.arrival) { continue }
            let isPlain = slot.kind == .plain
            oldest = Activity.Work(
                operation: slot.operation, offset: isPlain ? slot.requestOffset : slot.offset,
                length: isPlain ? slot.requestLength : UInt64(slot.length), arrival: slot.arrival)
        }
        return oldest
    }

    /// Takes an entry for a read; there is always one, since each but the one being issued holds a slot.
    mutating func takeRead() -> Int {
        let index = freeReads.removeLast()
        reads[index] = ChunkedRead()
        return index
    }

    mutating func releaseRead(_ index: Int) { freeReads.append(index) }
}

/// Memory of a slot on its way to a lane. The connection neither touches nor frees it before the lane has finished.
struct SlotMemory: @unchecked Sendable {
    let bytes: UnsafeMutableRawBufferPointer
}

/// Where lanes put their results for one connection, which is woken by an eventfd.
final class CompletionPort: Sendable {
    /// A finished lane job.
    struct Finished: Sendable {
        let slot: Int
        let error: BlockError?
        /// A complete reply, where the lane made it.
        let reply: [UInt8]
    }

    private let finished = Locked<[Finished]>([])
    private let event: Descriptor

    /// A port, or nil when the system has no descriptor left.
    init?() {
        let number = dg_eventfd()
        if number < 0 { return nil }
        event = Descriptor(owning: number)
    }

    /// Readable when something has finished.
    var descriptor: Int32 { event.number }

    func finish(_ job: Finished) {
        let isFirst = finished.withLock { list in
            list.append(job)
            return list.count == 1
        }
        if isFirst {
            var one: UInt64 = 1
            write(event.number, &one, 8)
        }
    }

    /// Takes what has finished.
    func takeAll() -> [Finished] {
        var count: UInt64 = 0
        read(event.number, &count, 8)
        return finished.withLock { list in
            defer { list = [] }
            return list
        }
    }
}
