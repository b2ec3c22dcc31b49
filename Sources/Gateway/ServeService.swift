// `diskgate serve` from start to end: exports, listeners, signals, an orderly stop.
public import Block
import CLinux
import Glibc
public import LinuxIO
public import Logging
public import NBD
import Synchronization
public import Transports

/// What `diskgate serve` is asked to do.
public struct ServeRequest: Sendable {
    /// The exports, opened.
    public var exports: [Export] = []
    /// Those of them that keep checkpoints, by name.
    public var checkpointed: [String: CheckpointedDisk] = [:]
    /// Where to listen.
    public var listen: [ListenAddress] = []
    /// Whether to serve one client on standard input and output instead.
    public var usesStandardIO = false
    /// Whether to stop when the last client has gone, after the first has come.
    public var exitsWithLast = false
    /// A shell command to run while serving; serving ends with it.
    public var command: String?
    /// What holds for exports that are added later.
    public var defaults = ExportDefaults()
    /// Whether sockets that other machines can reach may be served: somebody has said how TLS is to be used there.
    public var allowsRemote = false
    /// TLS; nil for none.
    public var tls: TLSServer?
    /// Who may list the exports that it may use; nil for everybody.
    public var listRules: [AllowRule]?
    /// Where to listen for control commands.
    public var control: ListenAddress?
    /// Where to answer scrapes of metrics.
    public var metrics: ListenAddress?
    /// Whether metrics may be read from other machines, in clear text.
    public var allowsRemoteMetrics = false
    /// The version, for the metrics.
    public var version = ""
    /// Limits.
    public var limits = ServerLimits()
    /// Seconds that clients have to go when the server stops.
    public var graceSeconds = 10.0
    /// Where messages go.
    public var log: Logger

    /// Nothing yet.
    public init(log: Logger) { self.log = log }
}

/// Runs a server until it is told to stop.
public struct ServeService {
    /// What was asked for, without the exports: only the registry holds them, so that one that is removed is closed.
    private let request: ServeRequest
    private let firstExport: String
    private let title: String
    private let registry: ExportRegistry
    private let snapshots: Snapshots
    private let stopEvent: Descriptor

    /// A service for a request.
    ///
    /// - Throws: `BlockError`: two exports have the same name, or the system has no descriptor left.
    public init(_ request: ServeRequest) throws(BlockError) {
        var rest = request
        rest.exports = []
        rest.checkpointed = [:]
        self.request = rest
        registry = ExportRegistry(listRules: request.listRules)
        firstExport = request.exports.first?.name ?? ""
        title = request.exports.count == 1 ? request.exports[0].info.name : "\(request.exports.count) exports"
        let number = dg_eventfd()
        if number < 0 { throw BlockError(errno: -number, "starting the server") }
        stopEvent = Descriptor(owning: number)
        for export in request.exports { try registry.add(export) }
        snapshots = Snapshots(
            registry, scratchDirectory: request.defaults.scratchDirectory ?? NamelessFile.scratchDirectory,
            reserve: request.defaults.scratchReserve, log: request.log)
        for (name, disk) in request.checkpointed { snapshots.add(disk, export: name) }
    }

    /// Serves until a signal, the last client or the command ends it.
    ///
    /// - Returns: the exit status: the command's, or 0; 1 instead of 0 when checkpoints could not be stored.
    /// - Throws: `BlockError` when it cannot listen or start.
    public func run() throws(BlockError) -> Int32 {
        let event = stopEvent
        let exitsWithLast = request.exitsWithLast
        let server = try Server(directory: registry, limits: request.limits, tls: request.tls, log: request.log) {
            left, served in
            if exitsWithLast && left == 0 && served > 0 { signalEvent(event) }
        }
        // Threads that end with the process hold the server; what was attached for a disk has to be given back now.
        defer { registry.removeAll() }
        let status: Int32
        do throws(BlockError) { status = try serve(server) } catch {
            _ = snapshots.closeAll(server)
            throw error
        }
        return snapshots.closeAll(server) || status != 0 ? status : 1
    }

    private func serve(_ server: Server) throws(BlockError) -> Int32 {
        let inherited = ServiceManager.inheritedSockets()
        // With a socket from its parent (libnbd's "[ COMMAND ]" hands one over), standard input is no client. The one
        // client there has no socket that could be shut down: signals end the process as usual.
        if request.usesStandardIO && inherited.isEmpty {
            server.serve(input: STDIN_FILENO, output: STDOUT_FILENO)
            return 0
        }
        let signals = try blockSignals()
        var cleanUp: [String] = []
        var privateDirectory: String?
        defer {
            for path in cleanUp { unlink(path) }
            if let privateDirectory { rmdir(privateDirectory) }
        }
        var addresses = inherited.isEmpty ? request.listen : []
        if inherited.isEmpty && addresses.isEmpty, request.command != nil {
            let directory = try makePrivateDirectory()
            privateDirectory = directory
            addresses = [.unix(path: "\(directory)/socket")]
        }
        try checkReach(of: inherited.map(\.address) + addresses)
        raiseDescriptorLimit()
        var sockets = inherited
        for address in addresses {
            sockets += try ListeningSocket.listen(on: address)
            if case .unix(let path) = address { cleanUp.insert(path, at: 0) }
        }
        let control = try request.control.map { (address) throws(BlockError) in
            try ControlServer(
                address, registry: registry, snapshots: snapshots, server: server, defaults: request.defaults,
                log: request.log)
        }
        if case .unix(let path)? = request.control { cleanUp.append(path) }
        let metrics = try startMetrics(server)
        if case .unix(let path)? = request.metrics { cleanUp.append(path) }
        try server.accept(on: sockets)
        for socket in sockets {
            request.log.notice("serving \(title) at \(address(socket, export: nil))")
        }
        dg_forget_startup_pages()
        ServiceManager.notify("READY=1")
        let status = try waitForEnd(signals, server, command: startCommand(sockets))
        ServiceManager.notify("STOPPING=1")
        control?.stop()
        server.stop(graceSeconds: request.graceSeconds)
        metrics?.stop()
        for export in registry.all where export.connectionsEver > 0 { request.log.notice("\(export.summary)") }
        return status
    }

    /// Refuses addresses that other machines reach, unless somebody has said what is to be told there and how.
    private func checkReach(of addresses: [ListenAddress]) throws(BlockError) {
        for address in addresses where !address.isLocal && !request.allowsRemote {
            throw BlockError(
                .denied,
                "listening on \(address): other machines could read the disks in clear text; give keys or "
                    + "certificates (--tls-cert, --tls-psk), or say --tls off if you mean it"
            )
        }
        if let metrics = request.metrics, !metrics.isLocal && !request.allowsRemoteMetrics {
            throw BlockError(
                .denied,
                "listening on \(metrics) for metrics: other machines could read names, addresses and figures in clear "
                    + "text; say --metrics-remote if you mean it")
        }
        if let remote = addresses.first(where: { !$0.isLocal }),
            request.tls?.policy == .allow
        {
            request.log.warning(
                "--tls allow: whoever reaches \(remote) may do without TLS; --tls require admits nobody else")
        }
    }

    private func startMetrics(_ server: Server) throws(BlockError) -> MetricsServer? {
        guard let address = request.metrics else { return nil }
        let (registry, snapshots, version) = (registry, snapshots, request.version)
        var time = timespec()
        clock_gettime(CLOCK_REALTIME, &time)
        let startTime = Double(time.tv_sec) + Double(time.tv_nsec) / 1e9
        let metrics = try MetricsServer(address, log: request.log) {
            var text = MetricsText()
            text.add(server, version: version, startTime: startTime)
            text.add(registry.all)
            text.add(snapshots.snapshots(of: nil))
            text.add(server.clients)
            return text.text
        }
        for address in metrics.addresses { request.log.notice("answering scrapes of metrics at \(address)") }
        return metrics
    }

    /// Blocks the signals that end or concern the server, so that only the descriptor tells of them.
    private func blockSignals() throws(BlockError) -> Descriptor {
        let wanted = [SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGCHLD]
        var set = sigset_t()
        sigemptyset(&set)
        for signal in wanted { sigaddset(&set, signal) }
        pthread_sigmask(SIG_BLOCK, &set, nil)
        let number = dg_signalfd(wanted, Int32(wanted.count))
        if number < 0 { throw BlockError(errno: -number, "waiting for signals") }
        return Descriptor(owning: number)
    }

    /// The URI of an export at one of the server's sockets.
    private func address(_ socket: ListeningSocket, export: String?) -> String {
        uri(socket.address, export: export, isSecure: request.tls?.policy == .require)
    }

    private func makePrivateDirectory() throws(BlockError) -> String {
        // mkdtemp chooses a name that was not there, and lets nobody else in.
        var template = Array("\(getenv("TMPDIR").map { String(cString: $0) } ?? "/tmp")/diskgate-XXXXXX".utf8CString)
        guard mkdtemp(&template) != nil else { throw BlockError(errno: errno, "making a directory for a socket") }
        return String(decoding: template.dropLast().map { UInt8(bitPattern: $0) }, as: UTF8.self)
    }

    private func startCommand(_ sockets: [ListeningSocket]) throws(BlockError) -> pid_t? {
        guard let command = request.command else { return nil }
        var environment = [("uri", address(sockets[0], export: firstExport)), ("exportname", firstExport)]
        switch sockets[0].address {
        case .unix(let path): environment += [("unixsocket", path), ("nbd", "nbd:unix:\(path)")]
        case .tcp(let host, let port): environment += [("port", String(port)), ("nbd", "nbd:\(host):\(port)")]
        case .vsock(let port): environment += [("port", String(port))]
        }
        for (name, value) in environment { setenv(name, value, 1) }
        return try ChildProcess.startShell(command)
    }

    /// Waits for a signal, the command's end or the last client.
    private func waitForEnd(_ signals: Descriptor, _ server: Server, command: pid_t?) throws(BlockError) -> Int32 {
        while true {
            var ready = [
                pollfd(fd: signals.number, events: Int16(POLLIN), revents: 0),
                pollfd(fd: stopEvent.number, events: Int16(POLLIN), revents: 0),
            ]
            poll(&ready, 2, -1)
            if ready[1].revents != 0 { return command.map { end($0) } ?? 0 }
            guard ready[0].revents != 0 else { continue }
            let signal = dg_signal_read(signals.number)
            switch signal {
            case SIGCHLD:
                if let command, let status = ChildProcess.status(command) { return status }
            case SIGUSR1:
                for export in registry.all { request.log.notice("\(export.summary)") }
                for client in server.clients { request.log.notice("\(client.summary)") }
            case SIGHUP: request.tls?.reload()
            default:
                request.log.notice("stopping on signal \(signal)")
                return command.map { end($0) } ?? 0
            }
        }
    }

    private func end(_ command: pid_t) -> Int32 { ChildProcess.end(command, graceSeconds: request.graceSeconds) }

    /// Each client may need three descriptors; the usual limit of 1024 is for programs that use select(2).
    private func raiseDescriptorLimit() {
        var limit = rlimit()
        if getrlimit(__rlimit_resource_t(RLIMIT_NOFILE.rawValue), &limit) == 0 {
            limit.rlim_cur = limit.rlim_max
            setrlimit(__rlimit_resource_t(RLIMIT_NOFILE.rawValue), &limit)
        }
    }
}

/// Makes an eventfd readable.
func signalEvent(_ event: Descriptor) {
    var one: UInt64 = 1
    write(event.number, &one, 8)
}

/// The NBD URI of an export at an address (NBD project, doc/uri.md).
public func uri(_ address: ListenAddress, export: String?, isSecure: Bool = false) -> String {
    let scheme = isSecure ? "nbds" : "nbd"
    let name = percentEncoded(export ?? "")
    switch address {
    case .unix(let path): return "\(scheme)+unix:///\(name)?socket=\(percentEncoded(path, keeping: "/"))"
    case .tcp(let host, let port): return "\(scheme)://\(host.contains(":") ? "[\(host)]" : host):\(port)/\(name)"
    case .vsock(let port): return "\(scheme)+vsock://1:\(port)/\(name)"
    }
}

private func percentEncoded(_ text: String, keeping: String = "") -> String {
    let kept = Set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~\(keeping)".utf8)
    let digits = Array("0123456789ABCDEF".utf8)
    var encoded: [UInt8] = []
    for byte in text.utf8 {
        if kept.contains(byte) {
            encoded.append(byte)
        } else {
            encoded += [UInt8(ascii: "%"), digits[Int(byte >> 4)], digits[Int(byte & 15)]]
        }
    }
    return String(decoding: encoded, as: UTF8.self)
}
