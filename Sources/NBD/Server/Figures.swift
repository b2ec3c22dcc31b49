// What was done for one client, counted by its thread as it goes and summed up by whoever wants to know.
import Synchronization

/// What a request asks for, as figures tell it apart. The raw values are those of `NBD.Command`.
public enum Operation: Int, Sendable, CaseIterable {
    /// NBD_CMD_READ
    case read = 0
    /// NBD_CMD_WRITE
    case write = 1
    /// Commands that are not known; each is answered with an error.
    case other = 2
    /// NBD_CMD_FLUSH
    case flush = 3
    /// NBD_CMD_TRIM
    case trim = 4
    /// NBD_CMD_CACHE
    case cache = 5
    /// NBD_CMD_WRITE_ZEROES
    case zero = 6
    /// NBD_CMD_BLOCK_STATUS
    case status = 7

    /// The operation of a command.
    @inline(__always)
    init(command: UInt16) { self = Operation(rawValue: Int(command)) ?? .other }

    /// The name that metrics and reports give it.
    public var name: String {
        switch self {
        case .read: "read"
        case .write: "write"
        case .other: "other"
        case .flush: "flush"
        case .trim: "trim"
        case .cache: "cache"
        case .zero: "zero"
        case .status: "block_status"
        }
    }
}

/// How long requests took: counts in buckets, each twice as wide as the one before.
public enum LatencyBuckets {
    /// Buckets: up to 1 us, 2 us, 4 us, ... 2^26 us (67 s), and beyond.
    public static let count = 28

    /// The longest time of a bucket in seconds; nil for the last, which has no end.
    public static func limit(_ bucket: Int) -> Double? {
        bucket < count - 1 ? Double(UInt64(1) << UInt64(bucket)) / 1e6 : nil
    }

    /// The bucket of a time in nanoseconds.
    @inline(__always)
    static func bucket(nanoseconds: UInt64) -> Int {
        if nanoseconds <= 1000 { return 0 }
        return min(64 - ((nanoseconds - 1) / 1000).leadingZeroBitCount, count - 1)
    }
}

/// What was done of one operation.
public struct OperationFigures: Sendable {
    /// Bytes that were read, written, zeroed, discarded or prefetched; requests that failed have none.
    public var bytes: UInt64 = 0
    /// Requests answered with an error.
    public var errors: UInt64 = 0
    /// Nanoseconds from the arrival of a request to the sending of its reply, of all requests together.
    public var nanoseconds: UInt64 = 0
    /// Requests by how long they took; see `LatencyBuckets`.
    public var buckets = [UInt64](repeating: 0, count: LatencyBuckets.count)

    /// Nothing.
    public init() {}

    /// Requests answered, errors among them.
    public var count: UInt64 { buckets.reduce(0, &+) }

    /// The time in seconds within which a share of the requests was answered, as exactly as the buckets tell; nil when
    /// there was none, or it was longer than the last limit.
    public func quantile(_ share: Double) -> Double? {
        let wanted = (Double(count) * share).rounded(.up)
        var seen = 0.0
        for (bucket, number) in buckets.enumerated() where number > 0 {
            seen += Double(number)
            if seen >= wanted { return LatencyBuckets.limit(bucket) }
        }
        return nil
    }
}

/// What was done, by operation: a sum over clients at one moment.
public struct FigureSums: Sendable {
    private var operations = [OperationFigures](repeating: OperationFigures(), count: Operation.allCases.count)

    /// Nothing.
    public init() {}

    /// The figures of one operation.
    public subscript(operation: Operation) -> OperationFigures {
        get { operations[operation.rawValue] }
        set { operations[operation.rawValue] = newValue }
    }

    /// Requests answered.
    public var count: UInt64 { operations.reduce(0) { $0 &+ $1.count } }
    /// Requests answered with an error.
    public var errors: UInt64 { operations.reduce(0) { $0 &+ $1.errors } }
    /// Bytes read.
    public var bytesRead: UInt64 { self[.read].bytes }
    /// Bytes written; zeroing and discards are not among them.
    public var bytesWritten: UInt64 { self[.write].bytes }
}

/// The figures of one client. Only its thread counts; everybody may look.
///
/// With a single writer, counting is an ordinary load, addition and store: relaxed atomics cost no more than plain
/// integers, so nothing has to be collected and handed over.
final class Figures: @unchecked Sendable {
    // Sendable because the cells are atomics at an address that never changes.
    private let cells: UnsafeMutablePointer<Atomic<UInt64>>

    private static let bytes = 0
    private static let errors = 1
    private static let nanoseconds = 2
    private static let buckets = 3
    /// Cells per operation.
    private static let stride = 32
    private static let count = stride * Operation.allCases.count

    init() {
        cells = .allocate(capacity: Self.count)
        for index in 0..<Self.count { (cells + index).initialize(to: Atomic(0)) }
    }

    deinit {
        cells.deinitialize(count: Self.count)
        cells.deallocate()
    }

    @inline(__always)
    private func add(_ value: UInt64, at index: Int) {
        cells[index].store(cells[index].load(ordering: .relaxed) &+ value, ordering: .relaxed)
    }

    /// Counts bytes of a request. A trim or zeroing may be as long as the largest disk, so the sum may wrap around.
    @inline(__always)
    func add(bytes: UInt64, _ operation: Operation) { add(bytes, at: operation.rawValue * Self.stride + Self.bytes) }

    func addError(_ operation: Operation) { add(1, at: operation.rawValue * Self.stride + Self.errors) }

    /// Counts requests that were answered, and how long each took.
    @inline(__always)
    func add(_ requests: UInt64, _ operation: Operation, nanoseconds: UInt64) {
        let start = operation.rawValue * Self.stride
        add(requests &* nanoseconds, at: start + Self.nanoseconds)
        add(requests, at: start + Self.buckets + LatencyBuckets.bucket(nanoseconds: nanoseconds))
    }

    /// Adds what was counted so far to a sum.
    func add(to sums: inout FigureSums) {
        for operation in Operation.allCases {
            let start = operation.rawValue * Self.stride
            func value(_ index: Int) -> UInt64 { cells[start + index].load(ordering: .relaxed) }
            sums[operation].bytes &+= value(Self.bytes)
            sums[operation].errors &+= value(Self.errors)
            sums[operation].nanoseconds &+= value(Self.nanoseconds)
            for bucket in 0..<LatencyBuckets.count {
                sums[operation].buckets[bucket] &+= value(Self.buckets + bucket)
            }
        }
    }
}

/// Requests that were answered and whose time ends when their replies are sent: the clock is read for all at once.
struct Unsent: ~Copyable {
    /// Requests answered at once, which arrived with the last receive, by operation.
    private var prompt = InlineArray<8, UInt32>(repeating: 0)
    /// Bit N: there are prompt ones of operation N.
    private var promptOperations: UInt8 = 0
    /// Requests that were in a slot, with their arrival.
    private var late: [(operation: Operation, arrival: UInt64)] = []

    @inline(__always)
    var isEmpty: Bool { promptOperations == 0 && late.isEmpty }

    @inline(__always)
    mutating func add(_ operation: Operation) {
        prompt[operation.rawValue] &+= 1
        promptOperations |= 1 << UInt8(operation.rawValue)
    }

    mutating func add(_ operation: Operation, arrival: UInt64) { late.append((operation, arrival)) }

    /// Counts all: their replies have been sent now. Times are in nanoseconds of the monotonic clock.
    mutating func count(in figures: Figures, lastArrival: UInt64, now: UInt64) {
        while promptOperations != 0 {
            let index = promptOperations.trailingZeroBitCount
            promptOperations &= promptOperations - 1
            guard let operation = Operation(rawValue: index) else { continue }
            figures.add(UInt64(prompt[index]), operation, nanoseconds: now > lastArrival ? now - lastArrival : 0)
            prompt[index] = 0
        }
        if late.isEmpty { return }
        for (operation, arrival) in late { figures.add(1, operation, nanoseconds: now > arrival ? now - arrival : 0) }
        late.removeAll(keepingCapacity: true)
    }
}
