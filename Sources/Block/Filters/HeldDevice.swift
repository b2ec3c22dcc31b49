// A device with something to do once it is closed: giving back what was made for it to be there.

/// Another device, and what happens when nobody has it open any more.
public final class HeldDevice: BlockDevice, @unchecked Sendable {
    // Sendable because `lower` changes in deinit only, when nobody else is left.

    public let info: DeviceInfo
    private var lower: (any BlockDevice)?
    private let whenClosed: @Sendable () -> Void

    /// A device over another one.
    ///
    /// - Parameters:
    ///   - identity: what more is to be told of how it is known on this machine.
    ///   - whenClosed: called once the lower device is closed, provided that nobody else holds it.
    public init(
        _ lower: any BlockDevice, identity: [(key: String, value: String)] = [],
        whenClosed: @escaping @Sendable () -> Void
    ) {
        var info = lower.info
        info.identity += identity
        self.info = info
        self.lower = lower
        self.whenClosed = whenClosed
    }

    deinit {
        lower = nil
        whenClosed()
    }

    private var device: any BlockDevice {
        get throws(BlockError) {
            guard let lower else { throw BlockError(.shutdown, "using \(info.name): it is closed") }
            return lower
        }
    }

    public var mapVersion: UInt64 { lower?.mapVersion ?? 0 }
    public func holdingMap(of range: Range<UInt64>, _ body: () throws(BlockError) -> Void) throws(BlockError) {
        try device.holdingMap(of: range, body)
    }
    public func isPrompt(toWrite range: Range<UInt64>) -> Bool { lower?.isPrompt(toWrite: range) ?? false }

    public func map(_ range: Range<UInt64>, _ patience: Patience, into extents: inout ExtentList) throws(BlockError)
        -> UInt64
    { try device.map(range, patience, into: &extents) }

    public func status(_ context: StatusContext, of range: Range<UInt64>, into list: inout StatusList)
        throws(BlockError) -> UInt64
    { try device.status(context, of: range, into: &list) }

    public func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64, durable: Bool) throws(BlockError) {
        try device.write(bytes, at: offset, durable: durable)
    }
    public func zero(_ range: Range<UInt64>, _ options: ZeroOptions) throws(BlockError) {
        try device.zero(range, options)
    }
    public func discard(_ range: Range<UInt64>, durable: Bool) throws(BlockError) {
        try device.discard(range, durable: durable)
    }
    public func flush() throws(BlockError) { try device.flush() }
    public func confirm() throws(BlockError) { try device.confirm() }
    public func prefetch(_ range: Range<UInt64>) { lower?.prefetch(range) }
}
