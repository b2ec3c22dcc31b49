// A disk of any size without storage: alternating data and holes, every kind of context, and writes that vanish.
public import Block

/// A disk that holds nothing and says of itself what the fuzzer's exports need.
public final class StubDevice: BlockDevice {
    public let info: DeviceInfo
    private let run: UInt64

    /// A disk with an allocation that changes every `run` bytes, a power of two, and with dirty bitmaps of these names.
    public init(size: UInt64, run: UInt64 = 4096, isReadOnly: Bool, bitmaps: [String] = []) {
        self.run = run
        var info = DeviceInfo(size: size, format: "stub", name: "stub:\(size)")
        info.isReadOnly = isReadOnly
        info.canZeroFast = !isReadOnly
        info.canDiscard = !isReadOnly
        info.hasLayers = true
        info.isRotational = true
        info.dirtyBitmaps = bitmaps
        self.info = info
    }

    /// Where the run at an offset ends within a range.
    private func runEnd(_ position: UInt64, _ range: Range<UInt64>) -> UInt64 {
        min((position | (run - 1)) + 1, range.upperBound)
    }

    public func map(_ range: Range<UInt64>, _ patience: Patience, into extents: inout ExtentList) throws(BlockError)
        -> UInt64
    {
        var position = range.lowerBound
        while position < range.upperBound {
            // Every fourth MiB plays a device whose metadata is not in memory.
            if patience == .resident && position >> 20 & 3 == 3 { break }
            let end = runEnd(position, range)
            if !extents.append(end - position, .zeros(allocated: position & run != 0)) { break }
            position = end
        }
        return position
    }

    public func status(_ context: StatusContext, of range: Range<UInt64>, into list: inout StatusList)
        throws(BlockError) -> UInt64
    {
        var position = range.lowerBound
        while position < range.upperBound {
            let end = runEnd(position, range)
            if !list.append(end - position, position & run != 0 ? 1 : 0) { break }
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
