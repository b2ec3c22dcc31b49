// The command of `serve --run`: started through the shell, waited for, ended with the server.
public import Block
public import Glibc
import LinuxIO

/// A child process.
public enum ChildProcess {
    /// Starts a shell command with this process's environment and default signal handling.
    ///
    /// - Returns: the child's process id.
    /// - Throws: `BlockError` of the system's reason.
    public static func startShell(_ command: String) throws(BlockError) -> pid_t {
        var pid = pid_t()
        var arguments: [UnsafeMutablePointer<CChar>?] = [strdup("/bin/sh"), strdup("-c"), strdup(command), nil]
        defer { for argument in arguments { free(argument) } }
        let result = ChildProgram.withAttributes(hasOwnGroup: false) { attributes in
            posix_spawn(&pid, "/bin/sh", nil, &attributes, &arguments, environ)
        }
        if result != 0 { throw BlockError(errno: result, "starting the command \(command)") }
        return pid
    }

    /// The exit status of a child that has ended, as a shell tells it; nil while it runs.
    static func status(_ pid: pid_t) -> Int32? {
        var status: Int32 = 0
        return waitpid(pid, &status, WNOHANG) == pid ? shellStatus(status) : nil
    }

    /// Asks a child to end, kills it when it does not, and tells its exit status.
    static func end(_ pid: pid_t, graceSeconds: Double) -> Int32 {
        kill(pid, SIGTERM)
        var status: Int32 = 0
        for _ in 0..<Int(max(graceSeconds, 0.1) * 100) {
            if waitpid(pid, &status, WNOHANG) == pid { return shellStatus(status) }
            usleep(10_000)
        }
        kill(pid, SIGKILL)
        while waitpid(pid, &status, 0) < 0 && errno == EINTR {}
        return shellStatus(status)
    }

    private static func shellStatus(_ status: Int32) -> Int32 {
        let signal = status & 0x7f
        return signal == 0 ? (status >> 8) & 0xff : 128 + signal
    }
}
