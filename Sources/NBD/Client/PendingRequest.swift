// A request that the client waits for: what was asked, what has come of the answer, and whether that can be right.
import Block
import Glibc

/// Which parts of a read's range have come. Parts in ascending order, the usual case, cost one comparison each.
struct Coverage {
    /// The most parts that may lie apart from what has come without a gap.
    static let islandsMax = 1024

    /// Everything up to here has come.
    private(set) var end: UInt64 = 0
    /// Parts further on: sorted, apart from each other and from `end`.
    private(set) var islands: [Range<UInt64>] = []

    /// Adds a part, which is not empty.
    ///
    /// - Returns: false when some of it has come before, or parts lie about in too many places.
    mutating func add(_ part: Range<UInt64>) -> Bool {
        if part.lowerBound == end && islands.isEmpty {
            end = part.upperBound
            return true
        }
        if part.lowerBound < end { return false }
        let index = islands.firstIndex { $0.lowerBound >= part.lowerBound } ?? islands.count
        if index < islands.count && islands[index].lowerBound < part.upperBound { return false }
        if index > 0 && islands[index - 1].upperBound > part.lowerBound { return false }
        if islands.count >= Self.islandsMax { return false }
        islands.insert(part, at: index)
        if index + 1 < islands.count && islands[index + 1].lowerBound == part.upperBound {
            islands[index] = part.lowerBound..<islands[index + 1].upperBound
            islands.remove(at: index + 1)
        }
        if index > 0 && islands[index - 1].upperBound == part.lowerBound {
            islands[index - 1] = islands[index - 1].lowerBound..<islands[index].upperBound
            islands.remove(at: index)
        }
        if let first = islands.first, first.lowerBound == end {
            end = first.upperBound
            islands.removeFirst()
        }
        return true
    }
}

/// What a block status request wants to know, and what has come.
struct StatusQuestion {
    /// The number of the context on this connection.
    let contextID: UInt32
    /// The bits of the values that mean something.
    let mask: UInt64
    /// The most extents that are kept.
    let capacity: Int
    /// The extents, joined where they say the same.
    var extents: [StatusExtent] = []
    /// Whether further ones are dropped.
    var isFull = false
    /// The contexts that were answered.
    var answered: [UInt32] = []

    init(contextID: UInt32, mask: UInt64, capacity: Int) {
        self.contextID = contextID
        self.mask = mask
        self.capacity = capacity
    }

    /// Keeps a run of `length` bytes, as long as there is room.
    mutating func keep(_ length: UInt64, _ value: UInt64) {
        if isFull { return }
        let known = UInt32(clamping: value & mask)
        if let last = extents.last, last.value == known {
            extents[extents.count - 1].length = last.length &+ length
        } else if extents.count < capacity {
            extents.append(StatusExtent(length: length, value: known))
        } else {
            isFull = true
        }
    }
}

/// One request in flight. A channel has a fixed number of them and uses them again.
final class PendingRequest: @unchecked Sendable {
    // Sendable because a free request belongs to its table, one in flight to who receives for the channel, and one that
    // is done to who sent it; the channel's lock is between these times.

    /// What becomes of the result.
    enum Disposition {
        /// Somebody waits for this very request.
        case awaited
        /// It is handed out as a completion with this token.
        case queued(token: UInt64)
        /// Nobody wants to know.
        case ignored
    }

    /// Its number in the table.
    let index: Int
    /// What it is called on the wire; 0 while free.
    var cookie: UInt64 = 0
    var request = Request(NBD.Command.flush, cookie: 0)
    var disposition = Disposition.awaited
    /// Where a read's bytes go: as many as were asked for.
    var destination = UnsafeMutableRawBufferPointer(start: nil, count: 0)
    var coverage = Coverage()
    var status: StatusQuestion?
    /// The first error that the server named.
    var error: BlockError?
    /// Errors that the server named.
    var errorCount = 0
    /// What ended the connection before the answer was complete.
    var loss: ChannelError?
    var isDone = false
    /// Whether a thread sleeps until it is done, or until somebody has to receive.
    var isWaitedFor = false
    /// When it was sent, by `monotonicSeconds()`, and the bytes that the channel had moved then.
    var startSeconds = 0.0
    var startBytes: UInt64 = 0
    /// Bytes of it that are to be moved, and those of all requests that were in flight when it was sent.
    var expectedBytes: UInt64 = 0
    var extraMax: UInt64 = 0
    private let condition = Condition()

    init(index: Int) { self.index = index }

    /// Begins a new life in flight.
    func reset(_ request: Request, _ disposition: Disposition) {
        self.request = request
        self.disposition = disposition
        cookie = request.cookie
        destination = UnsafeMutableRawBufferPointer(start: nil, count: 0)
        coverage = Coverage()
        status = nil
        error = nil
        errorCount = 0
        loss = nil
        isDone = false
        isWaitedFor = false
    }

    /// Sleeps until woken; the lock is held.
    func sleep(holding lock: Lock) {
        isWaitedFor = true
        condition.wait(holding: lock)
        isWaitedFor = false
    }

    /// Wakes the thread that sleeps.
    func wake() { condition.signal() }

    /// What was asked, for messages.
    var doing: String {
        let (offset, length) = (request.offset, request.length)
        return switch request.command {
        case NBD.Command.read: "reading \(length) bytes at \(offset)"
        case NBD.Command.write: "writing \(length) bytes at \(offset)"
        case NBD.Command.trim: "discarding \(length) bytes at \(offset)"
        case NBD.Command.writeZeroes: "zeroing \(length) bytes at \(offset)"
        case NBD.Command.blockStatus: "asking for the status of \(length) bytes at \(offset)"
        case NBD.Command.cache: "prefetching \(length) bytes at \(offset)"
        default: "flushing"
        }
    }
}

/// Who knows which requests are in flight.
protocol PendingRequests: AnyObject {
    /// The request in flight with a cookie.
    func find(cookie: UInt64) -> PendingRequest?
}
