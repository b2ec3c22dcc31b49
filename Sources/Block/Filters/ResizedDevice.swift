// A device made shorter, or longer by zeros at its end: --truncate, and rounding up to a block size.

/// Another device with a different size. Bytes past the lower device's end read as zeros and cannot be anything else.
public final class ResizedDevice: BlockDevice {
    public let info: DeviceInfo
    private let lower: any BlockDevice
    private let lowerSize: UInt64

    /// A device of `size` bytes, at least 1, that shows another one from its start.
    ///
    /// - Throws: `.invalid` for a size of 0 or above 2^63-1.
    public init(_ lower: any BlockDevice, size: UInt64) throws(BlockError) {
        var info = lower.info
        if size == 0 || size > UInt64(Int64.max) {
            throw BlockError(.invalid, "resizing \(info.name): \(size) is no size from 1 to 2^63-1")
        }
        // A block that the new end, or the old one inside it, would cut cannot be promised as a minimum.
        let cut = UInt64(info.minimumBlock) | size | (size > info.size ? info.size : 0)
        info.minimumBlock = UInt32(1) << UInt32(min(cut.trailingZeroBitCount, 31))
        lowerSize = info.size
        info.size = size
        self.info = info
        self.lower = lower
    }

    /// A device whose size is rounded up to a multiple of `block`, a power of two in bytes.
    ///
    /// - Throws: `.invalid` when the block is no power of two or the size would pass 2^63-1.
    public convenience init(_ lower: any BlockDevice, roundedUpTo block: UInt64) throws(BlockError) {
        guard block.nonzeroBitCount == 1 else {
            throw BlockError(.invalid, "rounding the size of \(lower.info.name): \(block) is no power of two")
        }
        let (sum, overflow) = lower.info.size.addingReportingOverflow(block - 1)
        try self.init(lower, size: overflow ? 0 : sum & ~(block - 1))
    }

    /// The part of a range that the lower device has; empty where it has none.
    private func inside(_ range: Range<UInt64>) -> Range<UInt64> {
        min(range.lowerBound, lowerSize)..<min(range.upperBound, lowerSize)
    }

    public var mapVersion: UInt64 { lower.mapVersion }
    public func holdingMap(of range: Range<UInt64>, _ body: () throws(BlockError) -> Void) throws(BlockError) {
        let part = inside(range)
        if part.isEmpty { try body() } else { try lower.holdingMap(of: part, body) }
    }
    public func isPrompt(toWrite range: Range<UInt64>) -> Bool {
        let part = inside(range)
        return part.isEmpty || lower.isPrompt(toWrite: part)
    }

    public func map(_ range: Range<UInt64>, _ patience: Patience, into extents: inout ExtentList) throws(BlockError)
        -> UInt64
    {
        let part = inside(range)
        var position = range.lowerBound
        if !part.isEmpty {
            position = try lower.map(part, patience, into: &extents)
            if position < part.upperBound { return position }
        }
        return extents.append(range.upperBound - position, .zeros(allocated: false)) ? range.upperBound : position
    }

    public func status(_ context: StatusContext, of range: Range<UInt64>, into list: inout StatusList)
        throws(BlockError) -> UInt64
    {
        let part = inside(range)
        var position = range.lowerBound
        if !part.isEmpty {
            position = try lower.status(context, of: part, into: &list)
            if position < part.upperBound { return position }
        }
        let beyond: UInt32 = context == .allocation ? AllocationFlags.hole | AllocationFlags.zero : 0
        return list.append(range.upperBound - position, beyond) ? range.upperBound : position
    }

    public func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64, durable: Bool) throws(BlockError) {
        let part = inside(offset..<(offset + UInt64(bytes.count)))
        let kept = Int(part.count64)
        // Zeros may be "written" past the end, since that is what is there.
        if bytes[kept...].contains(where: { $0 != 0 }) {
            throw BlockError(
                .noSpace, "writing at \(lowerSize) of \(info.name): past the end of the device below, only zeros fit")
        }
        if kept > 0 { try lower.write(UnsafeRawBufferPointer(rebasing: bytes[..<kept]), at: offset, durable: durable) }
    }

    public func zero(_ range: Range<UInt64>, _ options: ZeroOptions) throws(BlockError) {
        let part = inside(range)
        if !part.isEmpty { try lower.zero(part, options) }
    }

    public func discard(_ range: Range<UInt64>, durable: Bool) throws(BlockError) {
        let part = inside(range)
        if !part.isEmpty { try lower.discard(part, durable: durable) }
    }

    public func flush() throws(BlockError) { try lower.flush() }
    public func confirm() throws(BlockError) { try lower.confirm() }
    public func prefetch(_ range: Range<UInt64>) {
        let part = inside(range)
        if !part.isEmpty { lower.prefetch(part) }
    }
}
