// Programs that are started with a socket as their standard input and output: ssh, or a server of one's own.
import Block
import CLinux
import Glibc

/// Starts programs to talk to, and ends them with their connection.
enum ConnectedProcess {
    /// Starts a program. When the socket is closed, it ends, or is ended, whatever it still waits for.
    ///
    /// - Returns: a socket whose other end is the program's standard input and output.
    /// - Throws: `BlockError` of the system's reason, with `hint` behind it.
    static func start(_ program: String, _ arguments: [String], hint: String = "") throws(BlockError) -> Descriptor {
        var pair: [Int32] = [-1, -1]
        guard socketpair(AF_UNIX, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue), 0, &pair) == 0 else {
            throw BlockError(errno: errno, "making a socket for \(program)")
        }
        let (ours, theirs) = (Descriptor(owning: pair[0]), Descriptor(owning: pair[1]))
        // In a group of its own, so that it is ended with all that it started.
        let child = try ChildProgram.start(
            [program] + arguments, input: theirs.number, output: theirs.number, errors: nil, hint: hint)
        running.withLock { $0[ours.number] = child }
        // Somebody has to end it, and to take its exit status.
        do throws(BlockError) {
            try startThread(name: program, stackSize: 128 * 1024) { attend(child, theirs) }
        } catch {
            kill(-child, SIGKILL)
            reap(child)
            throw error
        }
        return ours
    }

    /// Processes that were started and not taken back, by the socket that is ours.
    private static let running = Locked<[Int32: pid_t]>([:])

    /// Ends the process behind a socket at once, if there is one: for who gives up before anything was agreed on.
    static func abandon(_ socket: Descriptor) {
        running.withLock { if let child = $0[socket.number] { kill(-child, SIGTERM) } }
    }

    /// Seconds that a program has to end by itself when the socket was closed, and again when it was told to end.
    private static let graceSeconds = 2.0

    /// Waits for the end of a process, and ends it when the socket that it was given is not used any more here.
    private static func attend(_ child: pid_t, _ socket: Descriptor) {
        defer { reap(child) }
        let number = dg_pidfd(child)
        if number < 0 { return }
        let end = Descriptor(owning: number)
        // A closed socket ends the wait (POLLHUP) without being asked for.
        if waits(for: [end.number, socket.number], seconds: .infinity), waits(for: [end.number], seconds: 0) { return }
        for signal in [0, SIGTERM, SIGKILL] {
            if signal != 0 { kill(-child, signal) }
            if waits(for: [end.number], seconds: graceSeconds) { return }
        }
    }

    /// Whether a process of these has ended, or a socket of these was closed at its other end, within some time.
    private static func waits(for numbers: [Int32], seconds: Double) -> Bool {
        let deadline = monotonicSeconds() + seconds
        var ready = numbers.map { pollfd(fd: $0, events: 0, revents: 0) }
        ready[0].events = Int16(POLLIN)
        while true {
            let left = min(max(deadline - monotonicSeconds(), 0), 3600)
            let result = poll(&ready, nfds_t(ready.count), Int32(left * 1000))
            if result > 0 { return true }
            if result < 0 && errno != EINTR || monotonicSeconds() >= deadline { return false }
        }
    }

    private static func reap(_ child: pid_t) {
        // Until its status is taken, the number belongs to no other process.
        var information = siginfo_t()
        while waitid(P_PID, id_t(child), &information, WEXITED | WNOWAIT) < 0 && errno == EINTR {}
        running.withLock { running in
            for (number, other) in running where other == child { running[number] = nil }
        }
        var status: Int32 = 0
        while waitpid(child, &status, 0) < 0 && errno == EINTR {}
    }
}
