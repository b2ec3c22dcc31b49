// Where a QEMU is, and what the user says of it: the parts of a qmp+unix: or qmp+tcp: URI.
import Block
import Glibc
import LinuxIO
import NBD
import Transports

/// A QEMU's monitor, and what has to be known to back its machine up.
struct QEMUPlace: Sendable {
    /// How the disks come from QEMU to here.
    enum Serving: Sendable {
        /// Through a Unix socket in a private directory: QEMU runs on this machine.
        case local
        /// Over TCP, from an address of QEMU's machine.
        case network(host: String, port: UInt16)
    }

    /// As the user wrote it.
    let name: String
    /// The monitor.
    let monitor: ServerAddress
    /// The guest agent's socket, where there is one.
    let agent: String?
    /// How the disks are served.
    let serving: Serving
    /// The id of QEMU's TLS credentials for serving over TCP.
    let credentials: String?
    /// The directory of our certificates for that.
    let certificates: String?
    /// Where scratch files are kept, unless the run says so: on QEMU's machine.
    let scratch: String?
    /// Seconds that QEMU has for each answer, of its monitor or its NBD server.
    let answerSeconds: Int

    /// Reads a URI.
    ///
    /// - Throws: `.invalid` that says what is wrong or missing.
    init(_ uri: MachineURI) throws(BlockError) {
        name = uri.text
        agent = uri.parameter("agent")
        scratch = uri.parameter("scratch")
        credentials = uri.parameter("tls-creds")
        certificates = uri.parameter("tls-certificates")
        answerSeconds = try Self.answerSeconds(uri)
        if let agent { try uri.requireAbsolute(agent, "agent") }
        if let scratch { try uri.requireAbsolute(scratch, "scratch") }
        if uri.scheme == "qmp+unix" {
            try uri.allow(["agent", "scratch", "timeout"])
            var path = uri.body
            if path.hasPrefix("///") { path.removeFirst(2) }
            guard (1...107).contains(path.utf8.count) else {
                throw uri.bad("give the path of the monitor's Unix socket, of at most 107 bytes")
            }
            try uri.requireAbsolute(path, "the monitor's path")
            monitor = .unix(path: path)
            serving = .local
            return
        }
        try uri.allow(["agent", "scratch", "timeout", "nbd", "tls", "tls-creds", "tls-certificates"])
        var body = uri.body[...]
        if body.hasPrefix("//") { body = body.dropFirst(2) }
        guard let (host, port) = hostAndPort(String(body)) else { throw uri.bad("give HOST:PORT of the monitor") }
        monitor = .tcp(host: host, port: port)
        guard let (servingHost, servingPort) = uri.parameter("nbd").flatMap(hostAndPort), scratch != nil else {
            throw uri.bad(
                "over TCP, QEMU needs an address to serve the disks from, nbd=HOST:PORT, and a directory of its "
                    + "machine for scratch files, scratch=DIRECTORY")
        }
        serving = .network(host: servingHost, port: servingPort)
        let isLoopback = servingHost == "localhost" || IPAddress(servingHost)?.isLoopback == true
        switch uri.parameter("tls") {
        case nil where credentials == nil && !isLoopback:
            throw uri.bad(
                "the disks would cross the network in clear text: give tls-creds=ID, the id of QEMU's TLS credentials "
                    + "(-object tls-creds-x509,id=ID,endpoint=server,...), or tls=off")
        case nil, "off": break
        default: throw uri.bad("tls= can only be off")
        }
        if certificates != nil && credentials == nil { throw uri.bad("tls-certificates needs tls-creds") }
    }

    private static func answerSeconds(_ uri: MachineURI) throws(BlockError) -> Int {
        guard let text = uri.parameter("timeout") else { return 30 }
        guard let seconds = Int(text), (1...3600).contains(seconds) else {
            throw uri.bad("timeout=\(text): give 1 to 3600 seconds")
        }
        return seconds
    }

    /// Whether QEMU runs on this machine, so that its scratch files can be watched and removed.
    var isLocal: Bool { if case .local = serving { true } else { false } }

    /// Connects to the monitor.
    func connect() throws(BlockError) -> QMPClient {
        do throws(BlockError) {
            return try QMPClient.connect(
                to: monitor, seconds: Double(min(answerSeconds, 10)), commandSeconds: Double(answerSeconds))
        } catch {
            throw error.during("opening the machine \(name)")
        }
    }

    /// Whether it is certain that the QEMU of an obligation runs no more: nobody listens on its socket, and its
    /// process is gone. A socket's file that is missing says nothing by itself: anybody may have removed it.
    func isGone(_ process: QEMUIdentity?) -> Bool {
        guard case .unix(let path) = monitor else { return false }
        if isAbandonedSocket(path) { return process?.lives != true }
        return access(path, F_OK) < 0 && errno == ENOENT && process?.lives == false
    }

    /// The export of a disk, as a source.
    func source(_ export: String, socket: String?) throws(BlockError) -> SourceReference {
        let name = NBDURI.encoded(export)
        if let socket { return try SourceReference("nbd+unix:///\(name)?socket=\(NBDURI.encoded(socket))") }
        guard case .network(let host, let port) = serving else {
            throw BlockError(.invalid, "reading \(export): QEMU does not serve it")
        }
        let place = host.contains(":") ? "[\(host)]:\(port)" : "\(host):\(port)"
        let query = certificates.map { "?tls-certificates=\(NBDURI.encoded($0))" } ?? ""
        return try SourceReference("\(credentials == nil ? "nbd" : "nbds")://\(place)/\(name)\(query)")
    }
}
