// The control socket of a running server: one JSON object per line in, one per line out.
public import Block
import CLinux
import FoundationEssentials
import Glibc
public import LinuxIO
public import Logging
public import NBD
import Synchronization
import Transports

/// What `serve` was told about its exports, which holds for those that are added later, too.
public struct ExportDefaults: Sendable {
    /// The policies.
    public var options = ExportOptions()
    /// Directories, besides an image's own, beneath which images may name other files.
    public var imageDirectories: [String] = []
    /// Where overlays keep what is written; nil for TMPDIR, or /var/tmp.
    public var scratchDirectory: String?
    /// Bytes that are to stay free where snapshots keep what is overwritten; nil for 5 %, at most 1 GiB.
    public var scratchReserve: UInt64?
    /// Where writable exports keep checkpoints; nil when they keep none.
    public var checkpointDirectory: String?

    /// No policies.
    public init() {}
}

/// Serves the control socket. Only the user who runs the server can reach it: a Unix socket with mode 0600.
public final class ControlServer: Sendable {
    /// The longest request line in bytes.
    static let lineMax = 65536

    private let registry: ExportRegistry
    private let snapshots: Snapshots
    private let server: Server
    private let log: Logger
    private let sockets: [ListeningSocket]
    private let defaults: ExportDefaults
    private let isStopping = Atomic<Bool>(false)

    /// Listens from now on, on a thread of its own.
    ///
    /// - Throws: `BlockError` when it cannot listen there, or the address is not a Unix socket.
    public init(
        _ address: ListenAddress, registry: ExportRegistry, snapshots: Snapshots, server: Server,
        defaults: ExportDefaults, log: Logger
    ) throws(BlockError) {
        guard case .unix(let path) = address else {
            throw BlockError(.invalid, "listening for control commands on \(address): give unix:PATH")
        }
        // The socket must never be reachable for others, not even for a moment.
        let mask = umask(0o177)
        defer { umask(mask) }
        sockets = try ListeningSocket.listen(on: .unix(path: path))
        self.registry = registry
        self.snapshots = snapshots
        self.server = server
        self.defaults = defaults
        self.log = log
        try startThread(name: "control") { self.acceptLoop() }
    }

    /// Accepts no more commands.
    public func stop() {
        isStopping.store(true, ordering: .relaxed)
        for socket in sockets { shutdown(socket.descriptor.number, Int32(SHUT_RDWR)) }
    }

    private func acceptLoop() {
        while !isStopping.load(ordering: .relaxed) {
            let number = dg_accept(sockets[0].descriptor.number)
            if number < 0 {
                usleep(10_000)
                continue
            }
            let client = Descriptor(owning: number)
            do throws(BlockError) {
                try startThread(name: "control client") { self.converse(client) }
            } catch { log.error("serving a control client: \(error)") }
        }
    }

    private func converse(_ client: Descriptor) {
        var limit = timeval(tv_sec: 60, tv_usec: 0)
        setsockopt(client.number, SOL_SOCKET, SO_RCVTIMEO, &limit, socklen_t(MemoryLayout<timeval>.size))
        var received: [UInt8] = []
        var piece = [UInt8](repeating: 0, count: 4096)
        while true {
            let got = recv(client.number, &piece, piece.count, 0)
            if got < 0 && errno == EINTR { continue }
            if got <= 0 { return }
            received += piece[..<got]
            while let end = received.firstIndex(of: UInt8(ascii: "\n")) {
                let reply = answer(Array(received[..<end]))
                received.removeSubrange(...end)
                if send(client.number, reply, reply.count, Int32(MSG_NOSIGNAL)) != reply.count { return }
            }
            if received.count > Self.lineMax { return }
        }
    }

    private func answer(_ line: [UInt8]) -> [UInt8] {
        var reply = ControlReply()
        do {
            let request = try JSONDecoder().decode(ControlRequest.self, from: Data(line))
            reply = try perform(request)
        } catch let error as BlockError {
            reply.error = error.message
        } catch {
            reply.error = "the request is no JSON object with a command: \(error)"
        }
        let bytes =
            (try? JSONEncoder().encode(reply)).map { Array($0) } ?? Array(#"{"error":"encoding the reply"}"#.utf8)
        return bytes + [UInt8(ascii: "\n")]
    }

    private func perform(_ request: ControlRequest) throws(BlockError) -> ControlReply {
        var reply = ControlReply()
        switch request.command {
        case "exports": reply.exports = registry.all.map { Self.status($0) }
        case "clients": reply.clients = server.clients.map { Self.status($0) }
        case "add": reply.exports = [Self.status(try add(request))]
        case "remove": try remove(request.name ?? "")
        case "disconnect":
            guard let id = request.client, server.disconnect(id) else {
                throw BlockError(.notFound, "disconnecting the client \(request.client ?? 0): there is none of this id")
            }
        default: reply = try performOnSnapshots(request)
        }
        return reply
    }

    private func performOnSnapshots(_ request: ControlRequest) throws(BlockError) -> ControlReply {
        var reply = ControlReply()
        let export = request.export ?? ""
        switch request.command {
        case "snapshots": reply.snapshots = snapshots.snapshots(of: request.export)
        case "snapshot":
            reply.snapshots = [try snapshots.make(of: export, checkpoint: request.checkpoint, as: request.name)]
        case "release":
            if !snapshots.release(request.name ?? "", server) {
                throw BlockError(
                    .notFound,
                    "releasing the snapshot \"\(request.name ?? "")\": there is none exported under this name")
            }
        case "checkpoints": reply.checkpoints = try snapshots.checkpoints(of: export)
        case "drop-checkpoint": try snapshots.drop(request.checkpoint ?? "", of: export)
        default:
            throw BlockError(
                .invalid,
                "\"\(request.command)\" is no control command: give exports, add, remove, clients, disconnect, "
                    + "snapshot, snapshots, release, checkpoints or drop-checkpoint")
        }
        return reply
    }

    private func remove(_ name: String) throws(BlockError) {
        if snapshots.release(name, server) { return }
        guard let export = registry.remove(name) else {
            throw BlockError(.notFound, "removing the export \"\(name)\": there is none of this name")
        }
        server.disconnectAll(from: export, seconds: 10)
        log.notice("removed the export \"\(name)\"")
        try snapshots.close(name, server)
    }

    private func add(_ request: ControlRequest) throws(BlockError) -> Export {
        guard let source = request.source, let name = request.name else {
            throw BlockError(.invalid, "adding an export: give source and name")
        }
        var disk = DiskSpecification(try SourceReference(source))
        switch request.access ?? "read-only" {
        case "read-only": disk.access = .readOnly
        case "writable": disk.access = .writable
        case "overlay": disk.access = .overlay
        case let other:
            throw BlockError(.invalid, "adding an export: \(other) is no access: give read-only, writable or overlay")
        }
        disk.partition = request.partition
        disk.offset = request.offset ?? 0
        disk.length = request.length
        disk.imageDirectories = defaults.imageDirectories
        disk.scratchDirectory = defaults.scratchDirectory
        var options = defaults.options
        if let rules = request.allow {
            options.allow = []
            for rule in rules { options.allow.append(try AllowRule(rule)) }
        }
        options.isReadOnly = disk.access == .readOnly
        var checkpointed: CheckpointedDisk?
        let device: any BlockDevice
        if let directory = defaults.checkpointDirectory, disk.access == .writable {
            let log = log
            let opened = try disk.openCheckpointed(in: directory) { log.warning("\($0)") }
            device = opened.device
            checkpointed = opened
        } else {
            device = try disk.open()
        }
        let export = try Export(
            name: name, description: request.description ?? "", device: device, options: options)
        try registry.add(export)
        if let checkpointed { snapshots.add(checkpointed, export: name) }
        log.notice("added the export \"\(name)\" of \(source)")
        return export
    }

    private static func status(_ export: Export) -> ExportStatus {
        let sums = export.sums
        return ExportStatus(
            name: export.name, source: export.info.name, format: export.info.format, size: export.info.size,
            readOnly: export.options.isReadOnly, description: export.description,
            clients: export.connections, bytesRead: sums.bytesRead, bytesWritten: sums.bytesWritten,
            errors: sums.errors, inFlight: export.inFlight, operations: OperationStatus.all(sums))
    }

    private static func status(_ client: ClientRecord) -> ClientStatus {
        let sums = client.sums
        return ClientStatus(
            id: client.id, peer: client.peer.description, export: client.export, bytesRead: sums.bytesRead,
            bytesWritten: sums.bytesWritten, errors: sums.errors, inFlight: client.inFlight,
            oldestRequestSeconds: client.oldestRequestSeconds, operations: OperationStatus.all(sums))
    }
}

/// Speaks to the control socket of a running server.
public enum ControlClient {
    /// Sends one request and waits for its answer.
    ///
    /// - Throws: `BlockError`: nobody listens there, the answer is malformed, or the answer is an error.
    public static func send(_ request: ControlRequest, to address: ListenAddress) throws(BlockError) -> ControlReply {
        guard case .unix(let path) = address else {
            throw BlockError(.invalid, "\(address) is no control socket: give unix:PATH")
        }
        let socket = try connect(to: .unix(path: path), deadline: monotonicSeconds() + 10)
        let doing = "asking the server at \(address)"
        guard let line = try? JSONEncoder().encode(request) else { throw BlockError(.invalid, "\(doing): encoding") }
        let bytes = Array(line) + [UInt8(ascii: "\n")]
        if Glibc.send(socket.number, bytes, bytes.count, Int32(MSG_NOSIGNAL)) != bytes.count {
            throw BlockError(errno: errno, doing)
        }
        var received: [UInt8] = []
        var piece = [UInt8](repeating: 0, count: 65536)
        while received.last != UInt8(ascii: "\n") {
            let got = recv(socket.number, &piece, piece.count, 0)
            if got < 0 && errno == EINTR { continue }
            if got <= 0 { throw BlockError(.inputOutput, "\(doing): the connection ended before the answer") }
            received += piece[..<got]
        }
        guard let reply = try? JSONDecoder().decode(ControlReply.self, from: Data(received)) else {
            throw BlockError(.invalid, "\(doing): the answer is malformed; is it a diskgate control socket?")
        }
        if let error = reply.error { throw BlockError(.invalid, error) }
        return reply
    }
}
