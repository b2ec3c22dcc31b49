// Programs that tests start: found, run to their end with their output kept, and never waited for without a limit.
import CLinux
import Glibc

/// What a test needs and does not have, or what went wrong while it was prepared.
struct Trouble: Error, CustomStringConvertible {
    let description: String
    init(_ text: String) { description = text }
}

/// How a program ended.
struct Outcome: CustomStringConvertible {
    /// The exit status; 128 and the signal's number where a signal ended it.
    var status: Int32
    var output: [UInt8]
    var errors: String

    var description: String { "status \(status)\n\(text)\(errors)" }

    /// The output as text.
    var text: String { String(decoding: output, as: UTF8.self) }
    /// The output's lines, without spaces at their ends.
    var lines: [String] { text.split(separator: "\n").map { String($0).trimmed } }
}

extension String {
    /// Without spaces around it.
    var trimmed: String { String(drop { $0 == " " }.reversed().drop { $0 == " " }.reversed()) }
}

/// A program.
struct Tool {
    let path: String

    /// The Debian packages that tests need programs from.
    private static let packages = [
        "nbdkit": "nbdkit", "qemu-nbd": "qemu-utils", "nbd-server": "nbd-server", "nbdcopy": "libnbd-bin",
        "nbdinfo": "libnbd-bin", "qemu-img": "qemu-utils", "qemu-io": "qemu-utils",
        "fio": "fio", "socat": "socat", "cmp": "diffutils", "sha256sum": "coreutils", "losetup": "mount", "sh": "dash",
        "systemd-socket-activate": "systemd", "python3": "python3-libnbd",
        "curl": "curl", "qemu-system-x86_64": "qemu-system-x86", "flock": "util-linux",
        "vmdkinfo": "libvmdk-utils",
    ]

    /// A program by its name; a test without it fails, since a skipped one would not be missed.
    init(_ name: String) throws {
        for directory in ["/usr/bin", "/bin", "/usr/sbin", "/sbin"] where access("\(directory)/\(name)", X_OK) == 0 {
            path = "\(directory)/\(name)"
            return
        }
        throw Trouble("\(name) is missing: install the Debian package \(Self.packages[name] ?? name)")
    }

    private init(path: String) { self.path = path }

    /// The binary under test, which the build puts beside the tests.
    static var diskgate: Tool {
        var buffer = [CChar](repeating: 0, count: 4096)
        let count = max(0, readlink("/proc/self/exe", &buffer, buffer.count))
        let own = String(decoding: buffer[..<count].map { UInt8(bitPattern: $0) }, as: UTF8.self)
        return Tool(path: own.split(separator: "/").dropLast().reduce("") { "\($0)/\($1)" } + "/diskgate")
    }

    /// Starts the program.
    ///
    /// - Returns: its process id; standard input is empty unless a file is given.
    func start(
        _ arguments: [String], input: String = "/dev/null", output: Int32, errors: Int32, environment: [String] = []
    ) throws -> pid_t {
        var actions = posix_spawn_file_actions_t()
        posix_spawn_file_actions_init(&actions)
        defer { posix_spawn_file_actions_destroy(&actions) }
        posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, input, O_RDONLY, 0)
        posix_spawn_file_actions_adddup2(&actions, output, STDOUT_FILENO)
        posix_spawn_file_actions_adddup2(&actions, errors, STDERR_FILENO)
        var argv: [UnsafeMutablePointer<CChar>?] = ([path] + arguments).map { strdup($0) } + [nil]
        defer { for argument in argv { free(argument) } }
        let kept = ["PATH=/usr/bin:/bin:/usr/sbin:/sbin", "LC_ALL=C", "TMPDIR=/var/tmp"] + sanitizerOptions
        var variables: [UnsafeMutablePointer<CChar>?] = (kept + environment).map { strdup($0) } + [nil]
        defer { for variable in variables { free(variable) } }
        // This process blocks signals that a shell's wait needs.
        var attributes = posix_spawnattr_t()
        posix_spawnattr_init(&attributes)
        defer { posix_spawnattr_destroy(&attributes) }
        var signals = sigset_t()
        sigemptyset(&signals)
        posix_spawnattr_setsigmask(&attributes, &signals)
        for signal in [SIGPIPE, SIGCHLD, SIGTERM, SIGINT] { sigaddset(&signals, signal) }
        posix_spawnattr_setsigdefault(&attributes, &signals)
        posix_spawnattr_setflags(&attributes, Int16(POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF))
        var pid = pid_t()
        let result = posix_spawn(&pid, path, &actions, &attributes, &argv, &variables)
        if result != 0 { throw Trouble("starting \(path): error \(result)") }
        return pid
    }

    /// Runs the program to its end.
    func run(_ arguments: [String], input: String = "/dev/null", environment: [String] = []) throws -> Outcome {
        let output = try namelessFile()
        let errors = try namelessFile()
        defer {
            close(output)
            close(errors)
        }
        let pid = try start(arguments, input: input, output: output, errors: errors, environment: environment)
        let status = try waitForEnd(of: pid, what: path)
        return Outcome(
            status: status, output: try content(of: output),
            errors: String(decoding: try content(of: errors), as: UTF8.self))
    }
}

/// Whether the programs carry a sanitizer, which has memory of its own.
var isSanitized: Bool { !sanitizerOptions.isEmpty }

/// What Scripts/sanitize tells the programs that it built.
private let sanitizerOptions: [String] = ["TSAN_OPTIONS", "ASAN_OPTIONS"].compactMap { (name: String) -> String? in
    getenv(name).map { "\(name)=\(String(cString: $0))" }
}

/// Runs a program that must succeed.
@discardableResult
func run(_ name: String, _ arguments: String..., input: String = "/dev/null") throws -> Outcome {
    let tool = name == "diskgate" ? Tool.diskgate : try Tool(name)
    let outcome = try tool.run(arguments, input: input)
    if outcome.status != 0 {
        throw Trouble(
            "\(name) \(arguments.joined(separator: " ")): status \(outcome.status)\n\(outcome.text)\(outcome.errors)")
    }
    return outcome
}

/// Runs a program that may fail.
func attempt(_ name: String, _ arguments: String..., input: String = "/dev/null") throws -> Outcome {
    try (name == "diskgate" ? Tool.diskgate : Tool(name)).run(arguments, input: input)
}

/// Runs a script with Python's libnbd; `uri` and the other arguments are in sys.argv.
func python(_ script: String, _ arguments: String...) throws -> Outcome {
    let tool = try Tool("python3")
    guard try tool.run(["-c", "import nbd"]).status == 0 else {
        throw Trouble("Python's module nbd is missing: install the Debian package python3-libnbd")
    }
    let outcome = try tool.run(["-c", "import nbd, sys, errno, os\n" + script] + arguments)
    if outcome.status != 0 {
        throw Trouble("the script failed with \(outcome.status):\n\(outcome.text)\(outcome.errors)")
    }
    return outcome
}

/// Waits for a child's end, at most two minutes.
func waitForEnd(of pid: pid_t, what: String) throws -> Int32 {
    var status: Int32 = 0
    for _ in 0..<60_000 {
        let result = waitpid(pid, &status, WNOHANG)
        if result == pid { return status & 0x7F == 0 ? (status >> 8) & 0xFF : 128 + (status & 0x7F) }
        if result < 0 && errno != EINTR { throw Trouble("waiting for \(what): error \(errno)") }
        usleep(2000)
    }
    kill(pid, SIGKILL)
    waitpid(pid, &status, 0)
    throw Trouble("\(what) did not end within two minutes")
}

/// A file for a program's output.
func namelessFile() throws -> Int32 {
    let number = dg_open("/var/tmp", O_TMPFILE | O_RDWR | O_CLOEXEC, 0o600)
    if number < 0 { throw Trouble("making a file: error \(-number)") }
    return number
}

/// All bytes of an open file.
func content(of file: Int32) throws -> [UInt8] {
    var status = stat()
    fstat(file, &status)
    var bytes = [UInt8](repeating: 0, count: Int(status.st_size))
    let got = pread(file, &bytes, bytes.count, 0)
    return Array(bytes.prefix(max(0, got)))
}
