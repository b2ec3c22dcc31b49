// Other NBD servers for a test: started, waited for, killed and started again.
import CLinux
import Glibc

/// A server that is no diskgate.
final class Peer {
    private let tool: Tool
    private let arguments: [String]
    private let errors: Int32
    private var pid: pid_t = 0
    /// The Unix socket it listens on.
    let socket: String

    /// Starts a program whose arguments name the socket, and waits until it listens there.
    init(_ name: String, _ arguments: [String], socket: String) throws {
        tool = try Tool(name)
        self.arguments = arguments
        self.socket = socket
        errors = try namelessFile()
        try start()
    }

    /// nbdkit with a plugin and filters.
    static func nbdkit(_ arguments: String..., in folder: Folder) throws -> Peer {
        let socket = folder.file("nbdkit")
        return try Peer("nbdkit", ["-f", "-U", socket] + arguments, socket: socket)
    }

    /// nbdkit at a port of this machine. The file that tells when it listens takes the socket's place.
    static func nbdkit(port: String, _ arguments: String..., in folder: Folder) throws -> Peer {
        let started = folder.file("nbdkit-\(port)")
        let words = ["-f", "-i", "127.0.0.1", "-p", port, "-P", started]
        return try Peer("nbdkit", words + arguments, socket: started)
    }

    /// Starts it, again after `kill`.
    func start() throws {
        pid = try tool.start(arguments, output: errors, errors: errors)
        let listens = eventually { access(socket, F_OK) == 0 || !isRunning }
        if !listens || !isRunning { throw Trouble("\(tool.path) does not listen: \(log)") }
        // The socket is bound a moment before it listens.
        usleep(50_000)
    }

    private var isRunning: Bool { Glibc.kill(pid, 0) == 0 && !hasEnded }

    private var hasEnded: Bool {
        var state = siginfo_t()
        return waitid(P_PID, id_t(pid), &state, Int32(WEXITED | WNOHANG | WNOWAIT)) == 0 && state.si_signo != 0
    }

    /// Its process id.
    var processID: pid_t { pid }

    /// What it has said.
    var log: String { (try? content(of: errors)).map { String(decoding: $0, as: UTF8.self) } ?? "" }

    /// Ends it without a warning, as a crash does.
    func kill() {
        if pid == 0 { return }
        Glibc.kill(pid, SIGKILL)
        var status: Int32 = 0
        waitpid(pid, &status, 0)
        pid = 0
        unlink(socket)
    }

    /// The URI of an export, with parameters of ours.
    func uri(_ export: String = "", _ parameters: String...) -> String {
        (["nbd+unix:///\(export)?socket=\(socket)"] + parameters).joined(separator: "&")
    }

    deinit {
        kill()
        close(errors)
    }
}

/// Ports of this machine that nobody listens on.
func freePorts(_ count: Int) throws -> [String] {
    let script = """
        import socket, sys
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(int(sys.argv[1]))]
        for one in sockets: print(one.getsockname()[1])
        """
    return try Tool("python3").run(["-c", script, "\(count)"]).lines
}
