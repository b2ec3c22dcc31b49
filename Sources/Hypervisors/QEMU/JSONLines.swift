// A socket that carries one JSON text in a line, each way, with a deadline for every wait.
import Block
import CLinux
import Glibc
import LinuxIO

/// The connection to a monitor or an agent. Used by one thread at a time.
final class JSONLines {
    /// The longest line that is taken: QEMU's description of its whole interface has 0.2 MiB.
    static let lineBytesMax = 16 << 20

    private let socket: Descriptor
    private let name: String
    private var received: [UInt8] = []
    /// Bytes of `received` that are known to have no end of a line.
    private var searched = 0

    /// Takes over a connected socket.
    ///
    /// - Parameter name: who is at the other end, for people.
    init(_ socket: Descriptor, name: String) {
        self.socket = socket
        self.name = name
        let flags = dg_get_flags(socket.number)
        if flags >= 0 { _ = dg_set_flags(socket.number, flags | O_NONBLOCK) }
    }

    /// Sends bytes.
    ///
    /// - Throws: `.shutdown` when the other end is gone, `.inputOutput` when it takes nothing until the deadline.
    func send(_ bytes: [UInt8], deadline: Double) throws(BlockError) {
        var done = 0
        while done < bytes.count {
            let sent = bytes.withUnsafeBytes {
                Glibc.send(
                    socket.number, $0.baseAddress?.advanced(by: done), $0.count - done, Int32(MSG_NOSIGNAL))
            }
            if sent > 0 {
                done += sent
            } else if errno == EAGAIN {
                try wait(POLLOUT, deadline: deadline, "it takes no commands")
            } else if errno != EINTR {
                throw BlockError(.shutdown, "talking to \(name): \(systemErrorText(errno))")
            }
        }
    }

    /// The next line, without its end.
    ///
    /// - Throws: `.shutdown` when the other end is gone, `.inputOutput` when nothing comes until the deadline,
    ///   `.tooLarge` for a line without end.
    func line(deadline: Double) throws(BlockError) -> [UInt8] {
        while true {
            if let end = received[searched...].firstIndex(of: UInt8(ascii: "\n")) {
                var line = Array(received[..<end])
                received.removeFirst(end + 1)
                searched = 0
                if line.last == UInt8(ascii: "\r") { line.removeLast() }
                return line
            }
            searched = received.count
            if searched > Self.lineBytesMax {
                throw BlockError(.tooLarge, "talking to \(name): it sends a line of more than 16 MiB")
            }
            try receive(deadline: deadline)
        }
    }

    /// Ends the connection for both sides.
    func shut() { shutdown(socket.number, Int32(SHUT_RDWR)) }

    private func receive(deadline: Double) throws(BlockError) {
        try wait(POLLIN, deadline: deadline, "it does not answer")
        var problem: Int32 = 0
        let more = [UInt8](unsafeUninitializedCapacity: 65536) { buffer, count in
            let got = recv(socket.number, buffer.baseAddress, buffer.count, 0)
            if got < 0 { problem = errno }
            count = max(0, got)
        }
        if more.isEmpty && problem != EAGAIN && problem != EINTR {
            let reason = problem == 0 ? "it has closed the connection" : systemErrorText(problem)
            throw BlockError(.shutdown, "talking to \(name): \(reason)")
        }
        received += more
    }

    private func wait(_ events: Int32, deadline: Double, _ problem: String) throws(BlockError) {
        var ready = pollfd(fd: socket.number, events: Int16(events), revents: 0)
        while true {
            let left = deadline - monotonicSeconds()
            if left <= 0 { throw BlockError(.inputOutput, "talking to \(name): \(problem)") }
            let result = poll(&ready, 1, Int32(min(left, 3600) * 1000) + 1)
            if result > 0 { return }
            if result < 0 && errno != EINTR { throw BlockError(errno: errno, "talking to \(name)") }
        }
    }
}
