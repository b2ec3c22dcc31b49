// Programs that diskgate starts: in a process group of their own, with an end to their time.
public import Block
public import Glibc

/// Starts programs, in a process group of their own and with all signals as they are by default.
public enum ChildProgram {
    /// Starts a program.
    ///
    /// - Parameters:
    ///   - words: the program and its arguments.
    ///   - input: its standard input; nil for none.
    ///   - output: its standard output; nil for none.
    ///   - errors: its standard error; nil for ours.
    ///   - environment: NAME=VALUE, besides ours.
    ///   - hint: what an error says behind the program's name.
    /// - Throws: `BlockError` of the system's reason.
    public static func start(
        _ words: [String], input: Int32?, output: Int32?, errors: Int32?, environment: [String] = [],
        hint: String = ""
    ) throws(BlockError) -> pid_t {
        var actions = posix_spawn_file_actions_t()
        posix_spawn_file_actions_init(&actions)
        defer { posix_spawn_file_actions_destroy(&actions) }
        if let input {
            posix_spawn_file_actions_adddup2(&actions, input, STDIN_FILENO)
        } else {
            posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0)
        }
        if let output {
            posix_spawn_file_actions_adddup2(&actions, output, STDOUT_FILENO)
        } else {
            posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, "/dev/null", O_WRONLY, 0)
        }
        if let errors { posix_spawn_file_actions_adddup2(&actions, errors, STDERR_FILENO) }
        var arguments: [UnsafeMutablePointer<CChar>?] = words.map { strdup($0) } + [nil]
        defer { for argument in arguments { free(argument) } }
        var process = pid_t()
        var variables: [UnsafeMutablePointer<CChar>?] = environment.map { strdup($0) }
        let ownCount = variables.count
        defer { for variable in variables[..<ownCount] { free(variable) } }
        var variable = environ
        while let text = variable.pointee {
            variables.append(text)
            variable += 1
        }
        variables.append(nil)
        let result = withAttributes(hasOwnGroup: true) { attributes in
            posix_spawnp(&process, words.first ?? "", &actions, &attributes, &arguments, &variables)
        }
        if result != 0 { throw BlockError(errno: result, "starting \(words.first ?? "")\(hint)") }
        return process
    }

    /// What posix_spawn(3) is told so that a program has all signals as they are by default.
    ///
    /// - Parameter hasOwnGroup: whether it leads a process group of its own, so that it is ended with all that it
    ///   started, and no signal for us reaches it.
    public static func withAttributes(hasOwnGroup: Bool, _ spawn: (inout posix_spawnattr_t) -> Int32) -> Int32 {
        var attributes = posix_spawnattr_t()
        posix_spawnattr_init(&attributes)
        defer { posix_spawnattr_destroy(&attributes) }
        var signals = sigset_t()
        sigemptyset(&signals)
        posix_spawnattr_setsigmask(&attributes, &signals)
        sigaddset(&signals, SIGPIPE)
        posix_spawnattr_setsigdefault(&attributes, &signals)
        posix_spawnattr_setpgroup(&attributes, 0)
        let group = hasOwnGroup ? POSIX_SPAWN_SETPGROUP : 0
        posix_spawnattr_setflags(&attributes, Int16(POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF | group))
        return spawn(&attributes)
    }

    /// A standard input that has some bytes and then ends.
    ///
    /// - Throws: `BlockError` of the system's reason.
    public static func input(_ bytes: [UInt8]) throws(BlockError) -> Descriptor {
        let number = memfd_create("input", UInt32(MFD_CLOEXEC))
        if number < 0 { throw BlockError(errno: errno, "making a file in memory") }
        let file = Descriptor(owning: number)
        var done = 0
        while done < bytes.count {
            let written = bytes.withUnsafeBytes { write(number, $0.baseAddress?.advanced(by: done), $0.count - done) }
            if written <= 0 { throw BlockError(errno: errno, "writing a file in memory") }
            done += written
        }
        lseek(number, 0, SEEK_SET)
        return file
    }

    /// The exit status of a process that has ended; nil while it runs.
    public static func reapIfEnded(_ process: pid_t) -> Int32? {
        var status: Int32 = 0
        return waitpid(process, &status, WNOHANG) == process ? exitStatus(status) : nil
    }

    /// Waits for the end of a process.
    ///
    /// - Returns: its exit status, or 128 and the signal's number.
    @discardableResult
    public static func reap(_ process: pid_t) -> Int32 {
        var status: Int32 = 0
        while waitpid(process, &status, 0) < 0 { if errno != EINTR { return 127 } }
        return exitStatus(status)
    }

    /// The exit status of a process that ends before the deadline; nil when it does not.
    private static func reap(_ process: pid_t, deadline: Double) -> Int32? {
        var pause: UInt32 = 500
        while true {
            var status: Int32 = 0
            let result = waitpid(process, &status, WNOHANG)
            if result == process { return exitStatus(status) }
            if result < 0 && errno != EINTR { return 127 }
            if monotonicSeconds() >= deadline { return nil }
            usleep(pause)
            pause = min(pause * 2, 20_000)
        }
    }

    private static func exitStatus(_ status: Int32) -> Int32 {
        let signal = status & 0x7F
        return signal == 0 ? (status >> 8) & 0xFF : 128 + signal
    }

    /// Runs a program that ends by itself, and takes what it says.
    ///
    /// - Parameters:
    ///   - seconds: when it has taken longer, it is killed with all that it started.
    ///   - environment: NAME=VALUE, besides ours.
    /// - Returns: its exit status, its standard output and its standard error.
    /// - Throws: `BlockError` when it cannot be started or takes too long.
    public static func run(_ words: [String], seconds: Double, environment: [String] = []) throws(BlockError) -> (
        status: Int32, output: [UInt8], errors: [UInt8]
    ) {
        let (process, output, errors) = try startPiped(words, environment)
        let deadline = monotonicSeconds() + seconds
        let said = readAll([output, errors], deadline: deadline)
        // It may have closed what it says things on, and go on nevertheless.
        let ended = said == nil ? nil : reap(process, deadline: deadline)
        guard let said, let status = ended else {
            kill(-process, SIGKILL)
            reap(process)
            throw BlockError(
                .inputOutput, "\(words.prefix(4).joined(separator: " ")): it did not end within \(Int(seconds)) s")
        }
        return (status, said[0], said[1])
    }

    /// Starts a program whose standard output and error can be read. Their other ends are closed here, so that
    /// they end with the program.
    private static func startPiped(_ words: [String], _ environment: [String]) throws(BlockError) -> (
        pid_t, Descriptor, Descriptor
    ) {
        let (output, outputEnd) = try pipe()
        let (errors, errorsEnd) = try pipe()
        let process = try start(
            words, input: nil, output: outputEnd.number, errors: errorsEnd.number, environment: environment)
        return (process, output, errors)
    }

    private static func pipe() throws(BlockError) -> (reading: Descriptor, writing: Descriptor) {
        var pair: [Int32] = [-1, -1]
        if pipe2(&pair, O_CLOEXEC) < 0 { throw BlockError(errno: errno, "making a pipe") }
        return (Descriptor(owning: pair[0]), Descriptor(owning: pair[1]))
    }

    /// Bytes that are kept of what a program says.
    private static let outputMax = 64 << 20

    /// What comes from descriptors until they all end; nil when they have not at the deadline.
    private static func readAll(_ descriptors: [Descriptor], deadline: Double) -> [[UInt8]]? {
        var contents = [[UInt8]](repeating: [], count: descriptors.count)
        var ready = descriptors.map { pollfd(fd: $0.number, events: Int16(POLLIN), revents: 0) }
        var bytes = [UInt8](repeating: 0, count: 65536)
        while ready.contains(where: { $0.fd >= 0 }) {
            let left = deadline - monotonicSeconds()
            if left <= 0 { return nil }
            if poll(&ready, nfds_t(ready.count), Int32(min(left, 3600) * 1000) + 1) <= 0 { continue }
            for index in ready.indices where ready[index].fd >= 0 && ready[index].revents != 0 {
                let got = read(ready[index].fd, &bytes, bytes.count)
                if got == 0 || got < 0 && errno != EINTR { ready[index].fd = -1 }
                if got > 0 && contents[index].count < outputMax { contents[index] += bytes[..<got] }
            }
        }
        return contents
    }
}
