// systemd's two small protocols, spoken directly: sockets it has bound, and telling it that we are ready.
import CLinux
import Glibc
public import LinuxIO

/// What a service manager hands over and wants to know (sd_listen_fds(3), sd_notify(3)). The protocols are an
/// environment variable each; libsystemd would cost every server its start-up time and memory.
public enum ServiceManager {
    /// Sockets that were passed to this process, from descriptor 3 on. The environment is cleared, so that children
    /// do not take them for theirs.
    public static func inheritedSockets() -> [ListeningSocket] {
        defer {
            unsetenv("LISTEN_PID")
            unsetenv("LISTEN_FDS")
            unsetenv("LISTEN_FDNAMES")
        }
        guard let pid = environment("LISTEN_PID").flatMap({ Int32($0) }), pid == getpid(),
            let count = environment("LISTEN_FDS").flatMap({ Int32($0) }), count > 0, count <= 1024
        else { return [] }
        return (3..<(3 + count)).map { number in
            _ = dg_set_close_on_exec(number)
            return ListeningSocket(inherited: Descriptor(owning: number))
        }
    }

    /// Tells the service manager, where there is one, for example "READY=1".
    public static func notify(_ state: String) {
        guard let path = environment("NOTIFY_SOCKET"), let first = path.utf8.first, path.utf8.count <= 107 else {
            return
        }
        let number = socket(AF_UNIX, Int32(SOCK_DGRAM.rawValue | SOCK_CLOEXEC.rawValue), 0)
        if number < 0 { return }
        let descriptor = Descriptor(owning: number)
        var name = sockaddr_un()
        name.sun_family = sa_family_t(AF_UNIX)
        var bytes = Array(path.utf8)
        // An abstract socket is written with @ for its leading zero.
        if first == UInt8(ascii: "@") { bytes[0] = 0 }
        withUnsafeMutableBytes(of: &name.sun_path) { $0.copyBytes(from: bytes) }
        let length = UInt32(MemoryLayout<sa_family_t>.size + bytes.count)
        if dg_connect(descriptor.number, &name, length) == 0 {
            _ = state.withCString { send(descriptor.number, $0, strlen($0), Int32(MSG_NOSIGNAL)) }
        }
    }

    private static func environment(_ name: String) -> String? { getenv(name).map { String(cString: $0) } }
}
