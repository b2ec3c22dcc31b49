// A remote NBD export as a disk: one source run, read over as many connections as are worth it.
public import Block
import Glibc
import LinuxIO

/// A remote NBD export as a disk.
///
/// Whatever block sizes the server has, every range can be read and written here: what is not aligned goes through a
/// buffer, and parts of blocks are read, changed and written back.
public final class NBDDevice: BlockDevice {
    public let info: DeviceInfo
    let remote: RemoteExport
    private let handle: SourceHandle
    /// What whoever opened it wants to last for as long as it, or any other connection to the same disk, is open.
    private let owner: (any Sendable)?

    /// The most bytes of one read or write here, so that several are on their way and a long one does not hold up
    /// others.
    static let pieceMax: UInt64 = 1 << 20

    /// Connects to the export that a URI names.
    ///
    /// - Parameters:
    ///   - isWritable: whether it is to be changed; if not, nothing is ever written.
    ///   - owner: kept for as long as the disk is open, however often its connections are made again.
    /// - Throws: `BlockError`: no connection (as `ClientConnector.connect`), no bytes, or `.readOnly` when it is to be
    ///   changed and the server does not allow that.
    public static func open(_ uri: NBDURI, isWritable: Bool = false, keeping owner: (any Sendable)? = nil)
        throws(BlockError) -> NBDDevice
    {
        let connector = try ClientConnector(uri)
        return try NBDDevice(connector, first: try connector.connect(), isWritable: isWritable, keeping: owner)
    }

    /// A disk on a connection that is made.
    init(
        _ connector: ClientConnector, first: ClientChannel, isWritable: Bool, keeping owner: (any Sendable)? = nil
    ) throws(BlockError) {
        self.owner = owner
        let agreement = first.agreement
        let uri = connector.uri
        if agreement.size == 0 { throw BlockError(.invalid, "opening \(uri): the export has no bytes") }
        if isWritable && agreement.flags.contains(.readOnly) {
            throw BlockError(.readOnly, "opening \(uri) for writing: the server allows reading only")
        }
        let encryption = first.link.tlsIdentity
        let pool = ChannelPool(connector, first: first)
        var info = DeviceInfo(size: agreement.size, format: "raw", name: uri.description)
        // A server's word for it, within what may be told to clients as their own preferred size.
        info.preferredBlock = min(max(agreement.blockSizes.preferred, 4096), Export.advertisedPayloadMax)
        info.isReadOnly = !isWritable
        info.canZeroFast = isWritable && agreement.flags.isSuperset(of: [.sendWriteZeroes, .sendFastZero])
        info.canDiscard = isWritable && agreement.flags.contains(.sendTrim)
        info.isRotational = agreement.flags.contains(.rotational)
        info.hasLayers = agreement.contextID("qemu:allocation-depth") != nil
        info.dirtyBitmaps = agreement.contexts.map(\.name).filter { $0.hasPrefix(MetaContext.dirtyBitmapPrefix) }
            .map { String($0.dropFirst(MetaContext.dirtyBitmapPrefix.count)) }
        info.identity.append(("server", "\(uri.address)"))
        if let encryption { info.identity.append(("tls", "\(encryption)")) }
        info.identity.append(("replies", "\(agreement.mode)"))
        info.identity.append(("connections", "at most \(pool.connectionsMax)"))
        if let title = agreement.name, !title.isEmpty { info.identity.append(("export", title)) }
        if let text = agreement.exportDescription, !text.isEmpty { info.identity.append(("description", text)) }
        self.info = info
        remote = RemoteExport(pool, agreement, name: info.name)
        handle = SourceHandle(remote)
    }

    public func map(_ range: Range<UInt64>, _ patience: Patience, into extents: inout ExtentList) throws(BlockError)
        -> UInt64
    {
        extents.append(range.count64, .source(handle.reference, offset: range.lowerBound))
            ? range.upperBound : range.lowerBound
    }

    // MARK: - Status

    public func status(_ context: StatusContext, of range: Range<UInt64>, into list: inout StatusList)
        throws(BlockError) -> UInt64
    {
        let name: String
        let mask: UInt64
        switch context {
        case .allocation: (name, mask) = ("base:allocation", UInt64(AllocationFlags.hole | AllocationFlags.zero))
        case .depth: (name, mask) = ("qemu:allocation-depth", .max)
        case .dirtyBitmap(let index):
            guard info.dirtyBitmaps.indices.contains(index) else {
                throw BlockError(.invalid, "asking \(info.name) for its dirty bitmap \(index): it has no such bitmap")
            }
            (name, mask) = (MetaContext.dirtyBitmapPrefix + info.dirtyBitmaps[index], 1)
        }
        if remote.agreement.contextID(name) == nil {
            // What the server does not tell is data, in one layer.
            let value = context == .allocation ? AllocationFlags.data : 1
            return list.append(range.count64, value) ? range.upperBound : range.lowerBound
        }
        var position = range.lowerBound
        while position < range.upperBound {
            let room = list.capacity - list.extents.count + 2
            let asked = remote.outwards(position..<min(range.upperBound, position &+ remote.agreement.effectMax))
            let extents = try remote.status(name, of: asked, mask: mask, capacity: room)
            var start = asked.lowerBound
            let before = position
            for extent in extents {
                let part = (start..<(start + extent.length)).clamped(to: position..<range.upperBound)
                start += extent.length
                if !list.append(part.count64, extent.value) { return position }
                position = max(position, part.upperBound)
            }
            if position == before {
                throw BlockError(.inputOutput, "asking \(info.name) for the status at \(position): no answer")
            }
        }
        return position
    }

    // MARK: - Changes

    private func requireWritable(_ doing: String) throws(BlockError) {
        if info.isReadOnly { throw BlockError(.readOnly, "\(doing) \(info.name): it is open for reading only") }
    }

    public func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64, durable: Bool) throws(BlockError) {
        if bytes.isEmpty { return }
        try requireWritable("writing to")
        try remote.write(bytes, at: offset, durable: durable)
    }

    public func zero(_ range: Range<UInt64>, _ options: ZeroOptions) throws(BlockError) {
        try requireWritable("zeroing a range of")
        if options.contains(.fastOnly) && !info.canZeroFast {
            throw BlockError(.unsupported, "zeroing a range of \(info.name) fast: the server cannot promise it")
        }
        try remote.zero(range, options)
    }

    public func discard(_ range: Range<UInt64>, durable: Bool) throws(BlockError) {
        try requireWritable("discarding a range of")
        try remote.discard(range, durable: durable)
    }

    public func flush() throws(BlockError) {
        if !info.isReadOnly { try remote.flush() }
    }

    public func prefetch(_ range: Range<UInt64>) { remote.prefetch(range) }

    // MARK: - For one who keeps many requests in flight

    /// What was agreed on with the server.
    public var agreement: ClientAgreement { remote.agreement }

    /// Runs a body, which changes nothing, on a connection; once more on another one when that breaks under it. What
    /// goes on for long catches the breaking itself and returns, so that the next call begins with new patience.
    ///
    /// - Throws: what the server answered, or why no connection can be had.
    public func withChannel<R>(_ body: (ClientChannel) throws(ChannelError) -> R) throws(BlockError) -> R {
        try remote.pool.run(body)
    }

    /// The same disk over one more connection, which is its own and never shared with others.
    ///
    /// - Parameter seconds: how long to wait for the connection.
    /// - Throws: `BlockError`: no connection within that time, or it leads to another disk.
    public func another(seconds: Int) throws(BlockError) -> NBDDevice {
        let (connector, channel) = try remote.pool.connectApart(seconds: seconds)
        return try NBDDevice(connector, first: channel, isWritable: !info.isReadOnly, keeping: owner)
    }
}
