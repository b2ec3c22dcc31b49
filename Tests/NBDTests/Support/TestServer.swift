// A server in this process that tests reach over socket pairs.
import Block
import CLinux
import Glibc
import LinuxIO
import Logging
import NBD

/// Exports in a list, with the rules that they carry.
final class TestDirectory: ExportDirectory {
    private let exports: Locked<[Export]>
    init(_ exports: [Export]) { self.exports = Locked(exports) }

    func exports(for client: Credentials) -> [Export] {
        exports.withLock { $0 }.filter { $0.admission(of: client) != .refused }
    }
    func export(named name: String, for client: Credentials) -> Export? {
        exports(for: client).first { $0.name == name }
    }
}

/// A log handler that drops everything.
struct NoLog: LogHandler {
    var metadata: Logger.Metadata = [:]
    var logLevel = Logger.Level.critical
    subscript(metadataKey key: String) -> Logger.Metadata.Value? {
        get { nil }
        set { _ = newValue }
    }
    func log(event: LogEvent) {}
}

/// A server and the exports that it has; stopped by its test, or gone with the process.
struct TestServer {
    let server: Server

    init(
        _ exports: [Export], log: RecordedLog? = nil, _ configure: (inout ServerLimits) -> Void = { _ in }
    ) throws {
        var limits = ServerLimits()
        configure(&limits)
        server = try Server(
            directory: TestDirectory(exports), limits: limits,
            log: log?.logger ?? Logger(label: "test") { _ in NoLog() })
    }

    /// A server with one export of the empty name.
    init(
        _ device: any BlockDevice, options: ExportOptions = ExportOptions(), log: RecordedLog? = nil,
        _ configure: (inout ServerLimits) -> Void = { _ in }
    ) throws {
        try self.init([Export(name: "", device: device, options: options)], log: log, configure)
    }

    /// A client that has not said anything.
    func connect() throws -> TestClient {
        var pair: [Int32] = [-1, -1]
        guard socketpair(AF_UNIX, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue), 0, &pair) == 0 else {
            throw BlockError(errno: errno, "making a socket pair")
        }
        server.serve(Descriptor(owning: pair[0]))
        return TestClient(Descriptor(owning: pair[1]))
    }

    /// A client in its transmission phase.
    func enter(_ mode: HeaderMode, export: String = "", contexts: [String] = []) throws -> TestClient {
        let client = try connect()
        try client.enter(mode, export: export, contexts: contexts)
        return client
    }

    /// Whether all clients have gone, waiting for it.
    func isDeserted() -> Bool { eventually { server.clients.isEmpty } }

    /// Whether a client can still be served, which is what no other client may prevent.
    func expectsService() throws {
        let client = try enter(.structured)
        _ = try client.ask(Request(NBD.Command.flush, cookie: 1))
        try client.leave()
    }
}
