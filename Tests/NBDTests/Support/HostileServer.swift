// A server that shakes hands honestly and then does whatever a test wants.
import Block
import CLinux
import Glibc
import LinuxIO
import NBD
import Support

/// One connection of a hostile server, in its transmission phase.
final class HostileConnection: @unchecked Sendable {
    // Sendable because its thread alone receives, and a simple reply is sent at once.

    let mode: HeaderMode
    private let socket: TestClient

    init(_ socket: TestClient, mode: HeaderMode) {
        self.socket = socket
        self.mode = mode
    }

    /// The next request and what it writes; nil when the client has gone.
    func request() -> (header: Request, payload: [UInt8])? {
        guard let bytes = try? socket.receive(mode.requestSize),
            let request = bytes.withUnsafeBytes({ Request($0, mode) })
        else { return nil }
        let payload = try? socket.receive(Int(clamping: request.payloadLength(mode)))
        return payload.map { (request, $0) }
    }

    func send(_ bytes: [UInt8]) { try? socket.send(bytes) }

    /// Sends a chunk as an answer to a request.
    func chunk(
        _ request: Request, _ type: UInt16, _ payload: [UInt8], done: Bool = true, length: UInt64? = nil,
        cookie: UInt64? = nil, offset: UInt64? = nil
    ) {
        let header = ReplyHeader(
            flags: done ? NBD.Chunk.flagDone : 0, type: type, cookie: cookie ?? request.cookie,
            offset: offset ?? request.offset, length: length ?? UInt64(payload.count))
        var bytes = [UInt8](repeating: 0, count: mode.replySize)
        bytes.withUnsafeMutableBytes { header.store(mode, into: $0) }
        send(bytes + payload)
    }

    /// Sends data of a read, each byte the lowest byte of its offset.
    func data(_ request: Request, _ offset: UInt64, _ count: Int, done: Bool = true) {
        let bytes = offset.wire + (0..<count).map { UInt8(truncatingIfNeeded: offset &+ UInt64($0)) }
        chunk(request, NBD.Chunk.offsetData, bytes, done: done)
    }

    func simple(_ request: Request, error: UInt32 = 0, payload: [UInt8] = []) {
        send(bytes(NBD.simpleReplyMagic, error, request.cookie, payload))
    }

    /// Answers everything that is asked, honestly.
    func serveHonestly() {
        while let (request, _) = request() {
            switch request.command {
            case NBD.Command.disconnect: return
            case NBD.Command.read where mode == .simple:
                simple(request, payload: (0..<request.length).map { UInt8(truncatingIfNeeded: request.offset + $0) })
            case NBD.Command.read: data(request, request.offset, Int(request.length))
            default: if mode == .simple { simple(request) } else { chunk(request, NBD.Chunk.none, []) }
            }
        }
    }
}

/// A server on a Unix socket that runs a script on each connection, with the connection's number.
final class HostileServer: Sendable {
    /// What it says about its export.
    struct Facts: Sendable {
        var size: UInt64 = 1 << 20
        var flags: NBD.TransmissionFlags = [.hasFlags, .sendFlush]
        var name: String?
    }

    /// What its context base:allocation is called on every connection.
    static let contextID: UInt32 = 5

    let uri: NBDURI
    private let listener: [ListeningSocket]

    convenience init(
        in directory: TemporaryDirectory, mode: HeaderMode, size: UInt64 = 1 << 20,
        flags: NBD.TransmissionFlags = [.hasFlags, .sendFlush],
        _ script: @escaping @Sendable (HostileConnection, Int) -> Void
    ) throws {
        try self.init(in: directory, mode: mode, facts: { _ in Facts(size: size, flags: flags) }, script)
    }

    /// A server that may say something else on each connection.
    ///
    /// - Parameter isConcurrent: whether connections are served at once, not one after the other.
    init(
        in directory: TemporaryDirectory, mode: HeaderMode, isConcurrent: Bool = false,
        facts: @escaping @Sendable (Int) -> Facts, _ script: @escaping @Sendable (HostileConnection, Int) -> Void
    ) throws {
        let path = directory.file("hostile-\(UInt64.random(in: 0...UInt64.max))")
        listener = try ListeningSocket.listen(on: .unix(path: path))
        var uri = NBDURI(.unix(path: path))
        uri.reconnectSeconds = 5
        uri.timeoutSeconds = 20
        self.uri = uri
        let descriptor = listener[0].descriptor
        try startThread(name: "hostile") {
            var count = 0
            while true {
                let accepted = dg_accept(descriptor.number)
                if accepted < 0 { return }
                count += 1
                let (number, socket) = (count, Descriptor(owning: accepted))
                let serve: @Sendable () -> Void = {
                    let client = TestClient(socket)
                    guard (try? Self.shakeHands(client, mode, facts(number))) != nil else { return }
                    script(HostileConnection(client, mode: mode), number)
                    // Whatever else still knows the socket, the connection has ended.
                    shutdown(socket.number, Int32(SHUT_RDWR))
                }
                if !isConcurrent || (try? startThread(name: "hostile-\(number)", serve)) == nil { serve() }
            }
        }
    }

    deinit { for socket in listener { shutdown(socket.descriptor.number, Int32(SHUT_RDWR)) } }

    private static func shakeHands(_ client: TestClient, _ mode: HeaderMode, _ facts: Facts) throws {
        try client.send(bytes(NBD.initMagic, NBD.optionMagic, UInt16(3)))
        _ = try client.receive(4)
        while true {
            let header = try client.receive(16)
            let option: UInt32 = header.number(8)
            _ = try client.receive(Int(header.number(12, as: UInt32.self)))
            func reply(_ type: UInt32, _ payload: [UInt8] = []) throws {
                try client.send(bytes(NBD.optionReplyMagic, option, type, UInt32(payload.count), payload))
            }
            let isOther =
                option == NBD.Option.extendedHeaders && mode != .extended
                || option == NBD.Option.structuredReply && mode == .simple
            if isOther {
                try reply(NBD.OptionReply.errorUnsupported)
                continue
            }
            if option == NBD.Option.listMetaContext || option == NBD.Option.setMetaContext {
                try reply(NBD.OptionReply.metaContext, bytes(contextID, "base:allocation"))
            }
            if option == NBD.Option.go {
                try reply(NBD.OptionReply.info, bytes(NBD.Info.export, facts.size, facts.flags.rawValue))
                if let name = facts.name { try reply(NBD.OptionReply.info, bytes(NBD.Info.name, name)) }
            }
            try reply(NBD.OptionReply.ack)
            if option == NBD.Option.go { return }
        }
    }
}
