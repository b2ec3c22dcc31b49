// Servers for the client's tests: ours in this process, and other programs, on Unix sockets.
import Block
import Glibc
import LinuxIO
import NBD
import Support

extension TestServer {
    /// Has the server listen in a directory; where its default export is.
    func listen(in directory: TemporaryDirectory) throws -> NBDURI {
        let path = directory.file("socket-\(UInt64.random(in: 0...UInt64.max))")
        try server.accept(on: ListeningSocket.listen(on: .unix(path: path)))
        return NBDURI(.unix(path: path))
    }
}

/// Another NBD server, for as long as this is kept.
final class PeerServer {
    /// Where it listens.
    let path: String
    private var process: pid_t = 0

    var uri: NBDURI { NBDURI(.unix(path: path)) }

    /// Starts nbdkit with these arguments and waits until it listens.
    static func nbdkit(_ arguments: [String], in directory: TemporaryDirectory) throws -> PeerServer {
        let path = directory.file("nbdkit-\(UInt64.random(in: 0...UInt64.max))")
        return try PeerServer("nbdkit", ["-f", "-U", path] + arguments, path: path)
    }

    /// Starts a program and waits until something accepts connections at the path.
    init(_ name: String, _ arguments: [String], path: String) throws {
        self.path = path
        guard let program = Tool.path(of: name) else { throw CheckFailure("\(name) is not installed") }
        var actions = posix_spawn_file_actions_t()
        posix_spawn_file_actions_init(&actions)
        defer { posix_spawn_file_actions_destroy(&actions) }
        posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0)
        posix_spawn_file_actions_addopen(&actions, 1, "/dev/null", O_WRONLY, 0)
        posix_spawn_file_actions_addopen(&actions, 2, "/dev/null", O_WRONLY, 0)
        var words: [UnsafeMutablePointer<CChar>?] = ([name] + arguments).map { strdup($0) } + [nil]
        defer { for word in words { free(word) } }
        let result = posix_spawn(&process, program, &actions, nil, &words, environ)
        try require(result == 0, "starting \(name): \(systemErrorText(result))")
        let listens = eventually {
            access(path, F_OK) == 0 && (try? connect(to: .unix(path: path), deadline: monotonicSeconds() + 1)) != nil
        }
        try require(listens, "\(name) \(arguments) does not listen")
    }

    /// Ends it at once.
    func kill() {
        if process == 0 { return }
        _ = Glibc.kill(process, SIGKILL)
        var status: Int32 = 0
        while waitpid(process, &status, 0) < 0 && errno == EINTR {}
        process = 0
        unlink(path)
    }

    deinit { kill() }
}
