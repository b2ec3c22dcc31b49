// Running the programs that tests compare with, and knowing which of them are there.
import Block
import Glibc
import LinuxIO

/// An external program.
public enum Tool {
    /// What a program left behind.
    public struct Result: Sendable {
        /// The exit status, or 128 and the signal's number.
        public let status: Int32
        /// What it wrote to standard output.
        public let output: String
        /// What it wrote to standard error.
        public let errors: String
    }

    /// Whether a program of this name is in PATH or the system's own folders.
    public static func exists(_ name: String) -> Bool { path(of: name) != nil }

    /// Where a program is.
    public static func path(of name: String) -> String? {
        if name.hasPrefix("/") { return access(name, X_OK) == 0 ? name : nil }
        let path = getenv("PATH").map { String(cString: $0) } ?? ""
        let folders = path.split(separator: ":").map(String.init) + ["/usr/sbin", "/sbin", "/usr/bin", "/bin"]
        return folders.map { "\($0)/\(name)" }.first { access($0, X_OK) == 0 }
    }

    /// The path of the binary under test, which the build puts beside the tests.
    public static var diskgate: String {
        var buffer = [CChar](repeating: 0, count: 4096)
        let count = max(0, readlink("/proc/self/exe", &buffer, buffer.count))
        let own = String(decoding: buffer[..<count].map { UInt8(bitPattern: $0) }, as: UTF8.self)
        return own.split(separator: "/").dropLast().reduce("") { "\($0)/\($1)" } + "/diskgate"
    }

    /// Whether this process may do what only root may: loop devices, mounts.
    public static let isRoot = geteuid() == 0

    /// Runs a program and waits for its end.
    ///
    /// - Throws: when it does not exist or cannot be started. A failure of the program itself is in the result.
    public static func run(_ name: String, _ arguments: [String]) throws -> Result {
        guard let program = path(of: name) else { throw CheckFailure("\(name) is not installed") }
        return try withTemporaryDirectory { directory in
            var actions = posix_spawn_file_actions_t()
            posix_spawn_file_actions_init(&actions)
            defer { posix_spawn_file_actions_destroy(&actions) }
            let flags = O_CREAT | O_WRONLY | O_TRUNC
            posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0)
            posix_spawn_file_actions_addopen(&actions, 1, directory.file("output"), flags, 0o600)
            posix_spawn_file_actions_addopen(&actions, 2, directory.file("errors"), flags, 0o600)
            // The threads that run tests take no signals; programs are to.
            var attributes = posix_spawnattr_t()
            posix_spawnattr_init(&attributes)
            defer { posix_spawnattr_destroy(&attributes) }
            var none = sigset_t()
            sigemptyset(&none)
            posix_spawnattr_setsigmask(&attributes, &none)
            posix_spawnattr_setflags(&attributes, Int16(POSIX_SPAWN_SETSIGMASK))
            var words: [UnsafeMutablePointer<CChar>?] = ([name] + arguments).map { strdup($0) } + [nil]
            defer { for word in words { free(word) } }
            var process: pid_t = 0
            let result = posix_spawn(&process, program, &actions, &attributes, &words, environ)
            try require(result == 0, "starting \(name): \(systemErrorText(result))")
            var status: Int32 = 0
            while waitpid(process, &status, 0) < 0 {
                try require(errno == EINTR, "waiting for \(name): \(systemErrorText(errno))")
            }
            let signal = status & 0x7F
            return Result(
                status: signal == 0 ? (status >> 8) & 0xFF : 128 + signal,
                output: String(decoding: try contentOfFile(directory.file("output")), as: UTF8.self),
                errors: String(decoding: try contentOfFile(directory.file("errors")), as: UTF8.self))
        }
    }

    /// Runs a program that must succeed and returns its standard output without white space at its end.
    public static func output(_ name: String, _ arguments: [String]) throws -> String {
        let result = try run(name, arguments)
        try require(result.status == 0, "\(name) \(arguments): exit status \(result.status): \(result.errors)")
        var text = result.output[...]
        while text.last?.isWhitespace == true { text.removeLast() }
        return String(text)
    }
}
