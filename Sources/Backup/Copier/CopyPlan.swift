// What a copy has to do: the source's allocation where something changed, in order, a window at a time.
import Block

/// A range and what becomes of it on the target.
public struct CopyItem: Sendable, Equatable {
    /// What is to be done.
    public enum Kind: Sendable {
        /// The source's bytes are written.
        case data
        /// The range is made to read as zeros.
        case zero
    }

    /// Bytes on both disks.
    public var range: Range<UInt64>
    /// What is to be done.
    public var kind: Kind

    /// A range and what becomes of it.
    public init(_ range: Range<UInt64>, _ kind: Kind) {
        self.range = range
        self.kind = kind
    }
}

/// The work of a copy as the source tells it, computed as it is needed: its memory does not grow with the disk.
///
/// Items come in ascending order and do not overlap. They begin and end at multiples of the granularity, or at the
/// disk's end; a block of that size that is partly data is data. Data ranges with less than `gapMax` between them
/// become one.
struct CopyPlan: ~Copyable {
    /// Data closer than this, in bytes, is read at once.
    static let gapMax: UInt64 = 65536
    /// Changed ranges with more than this between them, in bytes, are asked about one after the other.
    private static let groupGapMax: UInt64 = 16 << 20

    private let device: any BlockDevice
    private let changed: StatusContext?
    private let granularity: UInt64
    private let size: UInt64
    private var list = StatusList(capacity: 4096)
    // Changed ranges that the source has told and that are not planned yet.
    private var dirty: [Range<UInt64>] = []
    private var nextDirty = 0
    private var asked: UInt64 = 0
    // The last run of one kind, which the next answer may continue.
    private var run: CopyItem?
    // The last data range, which the next may join, and zeros behind it that this would swallow.
    private var held: Range<UInt64>?
    private var heldZeros: [Range<UInt64>] = []
    private var isFlushed = false

    /// Bytes of data and of zeros in the items so far.
    private(set) var dataBytes: UInt64 = 0
    private(set) var zeroBytes: UInt64 = 0

    /// The plan for a source.
    ///
    /// - Parameters:
    ///   - changed: the context that tells what changed; nil for everything.
    ///   - granularity: a power of two, in bytes.
    init(_ device: any BlockDevice, changed: StatusContext?, granularity: UInt64) {
        self.device = device
        self.changed = changed
        self.granularity = max(granularity, 1)
        size = device.info.size
    }

    /// Whether everything is planned.
    var isDone: Bool { isFlushed }

    /// Everything before is in the items that were handed out, or needs no work.
    var settledEnd: UInt64 {
        if isFlushed { return size }
        let planned = nextDirty < dirty.count ? dirty[nextDirty].lowerBound : asked
        let start = min(held?.lowerBound ?? planned, run?.range.lowerBound ?? planned, planned)
        return start / granularity * granularity
    }

    /// Plans on, by one or two questions to the source.
    ///
    /// - Parameter items: gets the next items; perhaps none, which is not the end.
    /// - Throws: what the source says, or `.inputOutput` when its answer makes no sense.
    mutating func next(into items: inout [CopyItem]) throws(BlockError) {
        if isFlushed { return }
        if nextDirty == dirty.count { try askForChanges() }
        if nextDirty < dirty.count { try askForAllocation(into: &items) }
        if nextDirty == dirty.count && asked == size { flush(into: &items) }
    }

    private mutating func ask(_ context: StatusContext, _ range: Range<UInt64>) throws(BlockError) -> UInt64 {
        list.removeAll()
        let end = try device.status(context, of: range, into: &list)
        if end <= range.lowerBound || end > range.upperBound || list.length != end - range.lowerBound {
            throw BlockError(
                .inputOutput,
                "planning the copy of \(device.info.name): its answer about \(range.count64) bytes at "
                    + "\(range.lowerBound) covers \(list.length) bytes, up to \(end)")
        }
        return end
    }

    private mutating func askForChanges() throws(BlockError) {
        dirty.removeAll(keepingCapacity: true)
        nextDirty = 0
        if asked == size { return }
        guard let changed else {
            dirty.append(0..<size)
            asked = size
            return
        }
        let end = try ask(changed, asked..<size)
        var position = asked
        for extent in list.extents {
            let extentEnd = position + extent.length
            if extent.value & 1 != 0 { dirty.append(position..<extentEnd) }
            position = extentEnd
        }
        asked = end
    }

    /// Asks for the allocation of the next changed ranges that lie close together, as far as one answer goes.
    private mutating func askForAllocation(into items: inout [CopyItem]) throws(BlockError) {
        let first = dirty[nextDirty]
        var last = nextDirty
        while last + 1 < dirty.count, dirty[last + 1].lowerBound - dirty[last].upperBound <= Self.groupGapMax {
            last += 1
        }
        let end = try ask(.allocation, first.lowerBound..<dirty[last].upperBound)
        var position = first.lowerBound
        for index in 0..<list.extents.count {
            let extent = list.extents[index]
            let extentEnd = position + extent.length
            let kind: CopyItem.Kind = extent.value & AllocationFlags.zero != 0 ? .zero : .data
            while nextDirty < dirty.count {
                let part = dirty[nextDirty].clamped(to: position..<extentEnd)
                if !part.isEmpty { add(part, kind, into: &items) }
                if dirty[nextDirty].upperBound > extentEnd { break }
                nextDirty += 1
            }
            position = extentEnd
        }
        if nextDirty < dirty.count {
            dirty[nextDirty] = max(dirty[nextDirty].lowerBound, end)..<dirty[nextDirty].upperBound
        }
    }

    // MARK: - Rounding and joining

    /// Adds a changed run, joined to the last one where it continues it.
    private mutating func add(_ range: Range<UInt64>, _ kind: CopyItem.Kind, into items: inout [CopyItem]) {
        if let last = run, last.kind == kind, last.range.upperBound == range.lowerBound {
            run?.range = last.range.lowerBound..<range.upperBound
            return
        }
        endRun(into: &items)
        run = CopyItem(range, kind)
    }

    private func down(_ offset: UInt64) -> UInt64 { offset / granularity * granularity }
    private func up(_ offset: UInt64) -> UInt64 {
        let (sum, overflow) = offset.addingReportingOverflow(granularity - 1)
        return overflow ? size : min(down(sum), size)
    }

    /// Hands the last run on in whole blocks.
    private mutating func endRun(into items: inout [CopyItem]) {
        guard let run else { return }
        self.run = nil
        let (start, end) = (run.range.lowerBound, run.range.upperBound)
        if run.kind == .data { return addData(down(start)..<up(end), into: &items) }
        let inner = up(start)..<max(up(start), end == size ? size : down(end))
        if inner.isEmpty { return addData(down(start)..<up(end), into: &items) }
        if down(start) < inner.lowerBound { addData(down(start)..<inner.lowerBound, into: &items) }
        addZero(inner, into: &items)
        if inner.upperBound < up(end) { addData(inner.upperBound..<up(end), into: &items) }
    }

    private mutating func addData(_ range: Range<UInt64>, into items: inout [CopyItem]) {
        if let last = held, range.lowerBound < last.upperBound || range.lowerBound - last.upperBound < Self.gapMax {
            held = last.lowerBound..<max(last.upperBound, range.upperBound)
            heldZeros.removeAll(keepingCapacity: true)
            return
        }
        release(into: &items)
        held = range
    }

    private mutating func addZero(_ range: Range<UInt64>, into items: inout [CopyItem]) {
        if let held, range.upperBound - held.upperBound < Self.gapMax {
            heldZeros.append(range)
            return
        }
        release(into: &items)
        append(range, .zero, into: &items)
    }

    private mutating func release(into items: inout [CopyItem]) {
        if let held { append(held, .data, into: &items) }
        held = nil
        for range in heldZeros { append(range, .zero, into: &items) }
        heldZeros.removeAll(keepingCapacity: true)
    }

    private mutating func append(_ range: Range<UInt64>, _ kind: CopyItem.Kind, into items: inout [CopyItem]) {
        if kind == .data { dataBytes += range.count64 } else { zeroBytes += range.count64 }
        items.append(CopyItem(range, kind))
    }

    private mutating func flush(into items: inout [CopyItem]) {
        endRun(into: &items)
        release(into: &items)
        isFlushed = true
    }
}
