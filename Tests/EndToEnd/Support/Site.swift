// A machine and a repository for its backups: runs to their end, and runs that something happens to on their way.
import CLinux
import Glibc

/// A machine and a repository for it.
struct Site {
    let folder: Folder
    let machine: Machine
    /// The machine as backups name it.
    var uri: String
    var repository: String
    var state: String { folder.file("state") }

    init(disks: [String] = ["vda"], options: [String] = []) throws {
        folder = try Folder()
        machine = try Machine(in: folder, disks: disks, options: options)
        uri = machine.uri
        repository = folder.file("repository")
    }

    private func words(_ more: [String]) -> [String] {
        [
            "backup", "--vm", uri, "--repository", repository, "--state-directory", state, "--quiesce", "never",
            "--scratch-reserve", "1M",
        ] + more
    }

    func backup(_ more: String..., environment: [String] = []) throws -> Outcome {
        try Tool.diskgate.run(words(more), environment: environment)
    }

    /// Begins a backup.
    func start(_ more: String...) throws -> Running { try Running(words(more)) }

    /// A backup that has to succeed, as it was asked for.
    func requireBackup(_ more: String...) throws {
        let outcome = try Tool.diskgate.run(words(more))
        if outcome.status != 0 { throw Trouble("backup: status \(outcome.status)\n\(outcome.text)\(outcome.errors)") }
    }

    /// Lets something happen while the run copies a disk, which it does slowly until the body says otherwise.
    ///
    /// - Parameter endsIt: whether the run may be over when the body is.
    func duringBackup(_ more: String..., endsIt: Bool = false, body: () throws -> Void) throws -> Outcome {
        try machine.limit(bytesPerSecond: 1 << 20)
        let run = try Running(words(more + ["--sample", "0"]))
        let partial = "find \(repository) -name '*.qcow2.partial' -size +300k"
        let isCopying = try eventually { try Tool("sh").run(["-c", partial]).text != "" || run.hasEnded }
        if !isCopying || run.hasEnded { throw Trouble("the run does not copy: \(try run.end())") }
        try body()
        if !endsIt && run.hasEnded {
            throw Trouble("the run was over before anything could happen to it: \(try run.end())")
        }
        return try run.end()
    }

    func doctor(_ more: String...) throws -> Outcome {
        try Tool.diskgate.run(["doctor", "--state-directory", state] + more)
    }

    /// Restores a disk of a point over old content, and tells whether it is the same as a raw file.
    func restores(_ point: String, to expected: String, disk: String = "vda") throws -> Bool {
        let target = folder.file("restored")
        unlink(target)
        try run("diskgate", "restore", "--repository", repository, point, target, "--disk", disk)
        return try isSame(target, expected)
    }

    var points: [String] {
        get throws {
            try Tool("sh").run(["-c", "ls \(repository)/vms/*/points 2>/dev/null | grep json || true"]).lines
        }
    }

    /// Files of points that are not whole.
    var halves: [String] {
        get throws { try Tool("sh").run(["-c", "find \(repository) -name '*.partial' -o -name '*.doomed'"]).lines }
    }
}

/// A command that is under way.
final class Running {
    private let pid: pid_t
    private let (output, errors): (Int32, Int32)
    private var status: Int32?

    init(_ arguments: [String], environment: [String] = []) throws {
        (output, errors) = (try namelessFile(), try namelessFile())
        pid = try Tool.diskgate.start(arguments, output: output, errors: errors, environment: environment)
    }

    deinit {
        if status == nil {
            kill(pid, SIGKILL)
            var state: Int32 = 0
            waitpid(pid, &state, 0)
        }
        close(output)
        close(errors)
    }

    var hasEnded: Bool {
        var state = siginfo_t()
        return status != nil
            || waitid(P_PID, id_t(pid), &state, Int32(WEXITED | WNOHANG | WNOWAIT)) == 0 && state.si_signo != 0
    }

    /// Waits for its end.
    func end() throws -> Outcome {
        let ended = try status ?? waitForEnd(of: pid, what: "diskgate")
        status = ended
        return Outcome(
            status: ended, output: try content(of: output),
            errors: String(decoding: try content(of: errors), as: UTF8.self))
    }
}

/// What a guest does between two backups, different each time.
func changes(_ round: Int) -> [String] {
    [
        "write -P \(round + 20) \(round * 3)M 700k", "discard \(round * 2 + 1)M 1M", "write -z \(31 - round)M 300k",
        "write -P \(round + 60) \(17 * 1024 + round * 4)k 4k",
    ]
}

/// A file system in memory, of a size of its own.
final class Mount {
    let path: String
    private let folder: Folder

    /// Whether file systems can be mounted here.
    static let isPossible = geteuid() == 0 && (try? Mount(Folder(), "probe", megabytes: 1)) != nil

    init(_ folder: Folder, _ name: String, megabytes: Int) throws {
        self.folder = folder
        path = folder.file(name)
        mkdir(path, 0o755)
        if mount("tmpfs", path, "tmpfs", 0, "size=\(megabytes)m") < 0 { throw Trouble("mounting a tmpfs: \(errno)") }
    }

    /// Fills it up to the last byte.
    func fill() throws { _ = try Tool("sh").run(["-c", "cat /dev/zero >\(path)/filler 2>/dev/null || true"]) }

    func makeRoom() { unlink("\(path)/filler") }

    func remount(readOnly: Bool) throws {
        let flags = UInt(MS_REMOUNT) | (readOnly ? UInt(MS_RDONLY) : 0)
        if mount("tmpfs", path, "tmpfs", flags, nil) < 0 { throw Trouble("mounting \(path) again: \(errno)") }
    }

    deinit { umount2(path, Int32(MNT_DETACH)) }
}
