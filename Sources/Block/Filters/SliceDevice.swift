// A window onto a device: a partition, or --offset and --length. Its map is the lower one, moved.

/// A contiguous part of another device.
public final class SliceDevice: BlockDevice {
    public let info: DeviceInfo
    private let lower: any BlockDevice
    private let start: UInt64

    /// The part `range` of a device. Block sizes shrink to what the start and length allow.
    ///
    /// - Parameter label: appended to the device's name, for example "partition 1".
    /// - Throws: `.outOfRange` when the range is empty or does not lie inside the device.
    public init(_ lower: any BlockDevice, range: Range<UInt64>, label: String) throws(BlockError) {
        let whole = lower.info
        if range.isEmpty || range.upperBound > whole.size {
            throw BlockError(
                .outOfRange,
                "taking \(label) of \(whole.name): bytes \(range.lowerBound) to \(range.upperBound) do not lie "
                    + "inside its \(whole.size) bytes")
        }
        var info = whole
        info.size = range.count64
        info.name = "\(whole.name) \(label)"
        info.minimumBlock = Self.block(whole.minimumBlock, range)
        info.preferredBlock = max(Self.block(whole.preferredBlock, range), info.minimumBlock)
        self.info = info
        self.lower = lower
        start = range.lowerBound
    }

    /// The largest power of two that divides the block size, the start and the length.
    private static func block(_ size: UInt32, _ range: Range<UInt64>) -> UInt32 {
        let bits = UInt64(size) | range.lowerBound | range.count64
        return UInt32(1) << UInt32(min(bits.trailingZeroBitCount, 31))
    }

    private func moved(_ range: Range<UInt64>) -> Range<UInt64> {
        (range.lowerBound + start)..<(range.upperBound + start)
    }

    public var mapVersion: UInt64 { lower.mapVersion }
    public func holdingMap(of range: Range<UInt64>, _ body: () throws(BlockError) -> Void) throws(BlockError) {
        try lower.holdingMap(of: moved(range), body)
    }
    public func isPrompt(toWrite range: Range<UInt64>) -> Bool { lower.isPrompt(toWrite: moved(range)) }

    public func map(_ range: Range<UInt64>, _ patience: Patience, into extents: inout ExtentList) throws(BlockError)
        -> UInt64
    { try lower.map(moved(range), patience, into: &extents) - start }

    public func status(_ context: StatusContext, of range: Range<UInt64>, into list: inout StatusList)
        throws(BlockError) -> UInt64
    { try lower.status(context, of: moved(range), into: &list) - start }

    public func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64, durable: Bool) throws(BlockError) {
        try lower.write(bytes, at: offset + start, durable: durable)
    }
    public func zero(_ range: Range<UInt64>, _ options: ZeroOptions) throws(BlockError) {
        try lower.zero(moved(range), options)
    }
    public func discard(_ range: Range<UInt64>, durable: Bool) throws(BlockError) {
        try lower.discard(moved(range), durable: durable)
    }
    public func flush() throws(BlockError) { try lower.flush() }
    public func confirm() throws(BlockError) { try lower.confirm() }
    public func prefetch(_ range: Range<UInt64>) { lower.prefetch(moved(range)) }
}
