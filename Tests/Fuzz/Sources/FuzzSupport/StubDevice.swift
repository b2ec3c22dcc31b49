// A disk of any size without storage: alternating data and holes, every kind of context, and writes that vanish.
public import Block

/// A disk that holds nothing and says of itself what the fuzzer's exports need.
public final class StubDevice: BlockDevice {
    public let info: DeviceInfo

    /// A disk with an allocation that changes every 4 KiB, and with dirty bitmaps of these names.
    public init(size: UInt64, isReadOnly: Bool, bitmaps: [String] = []) {
        var info = DeviceInfo(size: size, format: "stub", name: "stub:\(size)")
        info.isReadOnly = isReadOnly
        info.canZeroFast = !isReadOnly
        info.canDiscard = !isReadOnly
        info.hasLayers = true
        info.isRotational = true
        info.dirtyBitmaps = bitmaps
        self.info = info
    }

    /// Where the 4 KiB block at an offset ends within a range.
    private func blockEnd(_ position: UInt64, _ range: Range<UInt64>) -> UInt64 {
        min((position | 4095) + 1, range.upperBound)
    }

    public func map(_ range: Range<UInt64>, _ patience: Patience, into extents: inout ExtentList) throws(BlockError)
        -> UInt64
    {
        var position = range.lowerBound
        while position < range.upperBound {
            let end = blockEnd(position, range)
            if !extents.append(end - position, .zeros(allocated: position & 4096 != 0)) { break }
            position = end
        }
        return position
    }

    public func status(_ context: StatusContext, of range: Range<UInt64>, into list: inout StatusList)
        throws(BlockError) -> UInt64
    {
        var position = range.lowerBound
        while position < range.upperBound {
            let end = blockEnd(position, range)
            if !list.append(end - position, position & 4096 != 0 ? 1 : 0) { break }
            position = end
        }
        return position
    }

    public func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64, durable: Bool) throws(BlockError) {
        try refuseIfReadOnly()
    }
    public func zero(_ range: Range<UInt64>, _ options: ZeroOptions) throws(BlockError) { try refuseIfReadOnly() }
    public func discard(_ range: Range<UInt64>, durable: Bool) throws(BlockError) { try refuseIfReadOnly() }

    private func refuseIfReadOnly() throws(BlockError) {
        if info.isReadOnly { throw BlockError(.readOnly, "changing \(info.name): it is open for reading only") }
    }
}
