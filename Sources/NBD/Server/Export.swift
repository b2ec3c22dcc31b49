// A disk as clients see it: a name, a device, and the policies under which it is given away.
public import Block
public import LinuxIO
public import Synchronization

/// How an export is given away.
public struct ExportOptions: Sendable {
    /// Whether writes are refused even where the device takes them.
    public var isReadOnly = false
    /// Bytes per second that all clients of the export together may read and write; nil for no limit.
    public var bytesPerSecondMax: UInt64?
    /// Milliseconds that every read waits first, for tests.
    public var readDelayMS: UInt32 = 0
    /// Milliseconds that every write, zeroing, discard and flush waits first, for tests.
    public var writeDelayMS: UInt32 = 0
    /// Who may use the export; empty for everybody.
    public var allow: [AllowRule] = []
    /// The most connections at once.
    public var connectionsMax = 1024

    /// Everything the device can do, for everybody, without limits.
    public init() {}
}

/// What has been done on an export, counted since it was added.
public final class ExportCounters: Sendable {
    /// Read requests answered.
    public let reads = Atomic<UInt64>(0)
    /// Bytes of read requests answered.
    public let bytesRead = Atomic<UInt64>(0)
    /// Write requests answered, zeroing and discards among them.
    public let writes = Atomic<UInt64>(0)
    /// Bytes of write requests answered.
    public let bytesWritten = Atomic<UInt64>(0)
    /// Requests answered with an error.
    public let errors = Atomic<UInt64>(0)
    /// Connections at this time.
    public let connections = Atomic<Int>(0)
}

/// A disk under a name, with its policies. Immutable but for its counters.
public final class Export: Sendable {
    /// The name that clients ask for, at most 4096 bytes.
    public let name: String
    /// Free text for people, at most 4096 bytes.
    public let description: String
    /// The disk.
    public let device: any BlockDevice
    /// What the device said of itself.
    public let info: DeviceInfo
    private let size: UInt64
    /// The policies.
    public let options: ExportOptions
    /// The contexts that clients may ask for; a context's index is its id on the wire.
    public let contexts: [MetaContext]
    /// What has been done.
    public let counters = ExportCounters()
    /// The rate limit, shared by all clients.
    let bucket: TokenBucket?

    /// The largest read or write that is taken, in bytes: what QEMU and nbdkit allow their clients to send.
    public static let payloadMax: UInt64 = 64 << 20
    /// The size that clients are told not to exceed: what every client knows as the default (proto.md, "Block size
    /// constraints").
    public static let advertisedPayloadMax: UInt32 = 32 << 20

    /// A disk under a name.
    ///
    /// - Throws: `.invalid` when the name or description has more than 4096 bytes.
    public init(
        name: String, description: String = "", device: any BlockDevice, options: ExportOptions = ExportOptions()
    ) throws(BlockError) {
        guard name.utf8.count <= NBD.stringLengthMax, description.utf8.count <= NBD.stringLengthMax else {
            throw BlockError(.invalid, "exporting \(device.info.name): names and descriptions have at most 4096 bytes")
        }
        self.name = name
        self.description = description
        self.device = device
        info = device.info
        size = info.size
        var options = options
        if info.isReadOnly { options.isReadOnly = true }
        self.options = options
        contexts = MetaContext.contexts(of: info)
        bucket = options.bytesPerSecondMax.map { TokenBucket(bytesPerSecond: $0) }
    }

    /// The range of `length` bytes at `offset`, as `DeviceInfo.check`, without copying the info for each request.
    @inline(__always)
    func check(offset: UInt64, length: UInt64) throws(BlockError) -> Range<UInt64> {
        if length == 0 || offset > size || length > size - offset {
            return try info.check(offset: offset, length: length)
        }
        return offset..<(offset + length)
    }

    /// What clients may do (NBD protocol, "Transmission flags"). Every client works on the same device, so a write that
    /// was answered is seen by all, and a flush makes durable what was answered to any: multi-conn holds.
    public func transmissionFlags(_ mode: HeaderMode) -> NBD.TransmissionFlags {
        var flags: NBD.TransmissionFlags = [.hasFlags, .sendFlush, .sendFUA, .sendCache, .canMultiConn]
        if mode != .simple { flags.insert(.sendDF) }
        if mode == .extended { flags.insert(.blockStatusPayload) }
        if info.isRotational { flags.insert(.rotational) }
        if options.isReadOnly {
            flags.insert(.readOnly)
        } else {
            flags.formUnion([.sendWriteZeroes, .sendTrim])
            if info.canZeroFast { flags.insert(.sendFastZero) }
        }
        return flags
    }
}

/// The exports that a server has, as one client may see them. A client that may not use an export is told the same as
/// if it did not exist.
public protocol ExportDirectory: AnyObject, Sendable {
    /// The exports that a peer may use, in the order to list them.
    func exports(for peer: Peer) -> [Export]
    /// The export that a peer means by a name; "" means the default export.
    func export(named name: String, for peer: Peer) -> Export?
    /// Whether an export is still served, this very one and not another of its name.
    func serves(_ export: Export) -> Bool
}

extension ExportDirectory {
    /// Directories that never lose an export serve what they gave.
    public func serves(_ export: Export) -> Bool { true }
}
