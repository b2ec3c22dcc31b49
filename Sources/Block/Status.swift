// What a disk knows about its ranges besides their bytes: allocation, layers, changes.

/// A kind of knowledge about ranges; each is an NBD meta context of an export.
@frozen public enum StatusContext: Sendable, Equatable {
    /// Holes and zeros, as `AllocationFlags` (NBD protocol, "base:allocation").
    case allocation
    /// The number of the layer that has the bytes, the topmost being 1; 0 where none has
    /// ("qemu:allocation-depth" of QEMU's docs/interop/nbd.txt).
    case depth
    /// 1 where a dirty bitmap, by its index in `DeviceInfo.dirtyBitmaps`, says changed ("qemu:dirty-bitmap:NAME").
    case dirtyBitmap(Int)
}

/// Flags of `StatusContext.allocation` (NBD protocol: NBD_STATE_HOLE, NBD_STATE_ZERO).
public struct AllocationFlags: Sendable {
    /// Allocated data.
    public static let data: UInt32 = 0
    /// Not allocated.
    public static let hole: UInt32 = 1
    /// Reads as zeros.
    public static let zero: UInt32 = 2
}

/// A run of bytes about which a context says the same.
@frozen public struct StatusExtent: BitwiseCopyable, Sendable {
    /// Bytes in the run, never 0.
    public var length: UInt64
    /// What the context says: flags, a depth, or 0 and 1 for clean and dirty.
    public var value: UInt32

    /// A run of `length` bytes with one value.
    @inlinable public init(length: UInt64, value: UInt32) {
        self.length = length
        self.value = value
    }
}

/// Status extents in order, joined where they say the same, up to a limit.
public struct StatusList: ~Copyable {
    /// The extents in order.
    public private(set) var extents: [StatusExtent] = []
    /// The most extents the list may hold.
    public let capacity: Int
    /// The bytes that the extents cover.
    public private(set) var length: UInt64 = 0

    /// An empty list that takes up to `capacity` extents, at least 1.
    public init(capacity: Int) {
        precondition(capacity > 0)
        self.capacity = capacity
    }

    /// Empties the list and keeps its storage.
    public mutating func removeAll() {
        extents.removeAll(keepingCapacity: true)
        length = 0
    }

    /// Adds a run, joined to the last one where it says the same. Adding no bytes changes nothing.
    ///
    /// - Returns: false, and nothing added, when the list is full.
    public mutating func append(_ runLength: UInt64, _ value: UInt32) -> Bool {
        if runLength == 0 { return true }
        let last = extents.count - 1
        if last >= 0, extents[last].value == value {
            extents[last].length &+= runLength
        } else {
            if extents.count == capacity { return false }
            extents.append(StatusExtent(length: runLength, value: value))
        }
        length &+= runLength
        return true
    }
}

extension BlockDevice {
    public func status(_ context: StatusContext, of range: Range<UInt64>, into list: inout StatusList)
        throws(BlockError) -> UInt64
    {
        switch context {
        case .allocation: try allocationFromMap(of: range, into: &list)
        case .depth: list.append(UInt64(range.count64), 1) ? range.upperBound : range.lowerBound
        case .dirtyBitmap(let index):
            throw BlockError(.invalid, "asking \(info.name) for its dirty bitmap \(index): it has no such bitmap")
        }
    }

    /// Allocation as the map tells it, for devices whose map knows all there is to know.
    public func allocationFromMap(of range: Range<UInt64>, into list: inout StatusList) throws(BlockError) -> UInt64 {
        var extents = ExtentList(capacity: 256)
        var position = range.lowerBound
        while position < range.upperBound {
            extents.removeAll()
            let end = try map(position..<range.upperBound, .blocking, into: &extents)
            for index in 0..<extents.count {
                let extent = extents[index]
                let flags: UInt32 =
                    switch extent.place {
                    case .zeros(let allocated): AllocationFlags.zero | (allocated ? 0 : AllocationFlags.hole)
                    case .file, .source: AllocationFlags.data
                    }
                if !list.append(extent.length, flags) { return position }
                position += extent.length
            }
            if end == range.lowerBound || extents.count == 0 {
                throw BlockError(.inputOutput, "mapping \(info.name) at \(position): the map does not advance")
            }
        }
        return position
    }
}

extension Range<UInt64> {
    /// The number of bytes in the range.
    @inlinable public var count64: UInt64 { upperBound &- lowerBound }
}
