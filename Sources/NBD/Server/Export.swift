// A disk as clients see it: a name, a device, and the policies under which it is given away.
public import Block

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

/// The clients of one export, and what those who have gone have done.
final class ExportUsers: Sendable {
    private struct State {
        var present: [ObjectIdentifier: ClientRecord] = [:]
        var past = FigureSums()
        var connectionsEver: UInt64 = 0
    }

    private let state = Locked(State())

    /// Adds a client, and says how many there are now.
    func enter(_ client: ClientRecord) -> Int {
        state.withLock { state in
            state.present[ObjectIdentifier(client)] = client
            state.connectionsEver &+= 1
            return state.present.count
        }
    }

    func leave(_ client: ClientRecord) {
        state.withLock { state in
            let wasPresent = state.present.removeValue(forKey: ObjectIdentifier(client)) != nil
            if wasPresent { client.figures.add(to: &state.past) }
        }
    }

    var count: Int { state.withLock { $0.present.count } }
    var countEver: UInt64 { state.withLock { $0.connectionsEver } }
    var inFlight: Int { state.withLock { $0.present.values.reduce(0) { $0 + $1.inFlight } } }

    var sums: FigureSums {
        state.withLock { state in
            var sums = state.past
            for client in state.present.values { client.figures.add(to: &sums) }
            return sums
        }
    }
}

/// A disk under a name, with its policies. Immutable but for its figures.
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
    let users = ExportUsers()
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

    /// What was done on it since it was made.
    public var sums: FigureSums { users.sums }
    /// Connections at this time.
    public var connections: Int { users.count }
    /// Connections since it was made.
    public var connectionsEver: UInt64 { users.countEver }
    /// Requests received and not yet answered.
    public var inFlight: Int { users.inFlight }

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
    ///
    /// - Parameter isReadOnly: whether the client may not write even where others may.
    public func transmissionFlags(_ mode: HeaderMode, isReadOnly: Bool = false) -> NBD.TransmissionFlags {
        var flags: NBD.TransmissionFlags = [.hasFlags, .sendFlush, .sendFUA, .sendCache, .canMultiConn]
        if mode != .simple { flags.insert(.sendDF) }
        if mode == .extended { flags.insert(.blockStatusPayload) }
        if info.isRotational { flags.insert(.rotational) }
        if options.isReadOnly || isReadOnly {
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
    /// The exports that a client may use, in the order to list them.
    func exports(for client: Credentials) -> [Export]
    /// The export that a client means by a name, if it may use it; "" means the default export.
    func export(named name: String, for client: Credentials) -> Export?
    /// Whether a client may have the list of the exports that it may use.
    func mayList(_ client: Credentials) -> Bool
    /// Whether an export is still served, this very one and not another of its name.
    func serves(_ export: Export) -> Bool
}

extension ExportDirectory {
    /// Directories without a rule about it give the list to everybody.
    public func mayList(_ client: Credentials) -> Bool { true }
    /// Directories that never lose an export serve what they gave.
    public func serves(_ export: Export) -> Bool { true }
}
