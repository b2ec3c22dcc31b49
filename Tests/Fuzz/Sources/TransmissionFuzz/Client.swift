// The other end of a fuzzed connection: a thread that sends all there is to send while it collects every reply.
import FuzzSupport
import Glibc
import LinuxIO

/// The descriptors of one connection.
struct Ends {
    let serverInput: Int32
    let serverOutput: Int32
    let clientInput: Int32
    let clientOutput: Int32

    static func sockets() -> Ends {
        var pair: [Int32] = [-1, -1]
        require(socketpair(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0, &pair) == 0, "no sockets are left")
        return Ends(serverInput: pair[0], serverOutput: pair[0], clientInput: pair[1], clientOutput: pair[1])
    }

    static func pipes() -> Ends {
        var requests: [Int32] = [-1, -1]
        var replies: [Int32] = [-1, -1]
        require(pipe(&requests) == 0 && pipe(&replies) == 0, "no pipes are left")
        return Ends(
            serverInput: requests[0], serverOutput: replies[1], clientInput: replies[0], clientOutput: requests[1])
    }

    var areSockets: Bool { clientInput == clientOutput }

    func closeServer() {
        close(serverInput)
        if !areSockets { close(serverOutput) }
    }
}

/// One client at a time, on a thread of its own.
final class Client: @unchecked Sendable {
    // Sendable because the two threads take turns, which the semaphores order.

    /// More replies than this are taken and forgotten.
    private static let capacity = 160 << 20

    private let work = UnsafeMutablePointer<sem_t>.allocate(capacity: 1)
    private let done = UnsafeMutablePointer<sem_t>.allocate(capacity: 1)
    private let received = UnsafeMutableRawBufferPointer.allocate(byteCount: capacity, alignment: 4096)
    private var count = 0
    private var isTooMuch = false
    private var ends = Ends(serverInput: -1, serverOutput: -1, clientInput: -1, clientOutput: -1)
    private var sending: [UInt8] = []
    private var piece = 0

    init() throws {
        sem_init(work, 0, 0)
        sem_init(done, 0, 0)
        try startThread(name: "client") { self.run() }
    }

    /// Starts sending bytes, at most `piece` at a time, and receiving.
    func begin(_ ends: Ends, _ bytes: [UInt8], piece: Int) {
        self.ends = ends
        sending = bytes
        self.piece = piece
        sem_post(work)
    }

    /// Everything that was received, valid until the next connection; nil when it was too much to keep.
    func finish() -> UnsafeRawBufferPointer? {
        while sem_wait(done) != 0 {}
        return isTooMuch ? nil : UnsafeRawBufferPointer(rebasing: received[..<count])
    }

    private func run() {
        while true {
            while sem_wait(work) != 0 {}
            converse()
            sem_post(done)
        }
    }

    private func converse() {
        count = 0
        isTooMuch = false
        var sent = 0
        var isSending = true
        _ = fcntl(ends.clientInput, F_SETFL, O_NONBLOCK)
        _ = fcntl(ends.clientOutput, F_SETFL, O_NONBLOCK)
        while true {
            if isSending {
                isSending = send(&sent)
                if !isSending {
                    if ends.areSockets { shutdown(ends.clientOutput, Int32(SHUT_WR)) } else { close(ends.clientOutput) }
                }
            }
            var ready = [
                pollfd(fd: ends.clientInput, events: Int16(POLLIN), revents: 0),
                pollfd(fd: isSending ? ends.clientOutput : -1, events: Int16(POLLOUT), revents: 0),
            ]
            poll(&ready, 2, -1)
            if ready[0].revents != 0 && !receive() { break }
        }
        if isSending && !ends.areSockets { close(ends.clientOutput) }
        close(ends.clientInput)
    }

    /// Sends a piece; false when all is sent or cannot be.
    private func send(_ sent: inout Int) -> Bool {
        let now = min(piece, sending.count - sent)
        let result = sending.withUnsafeBytes { bytes in
            write(ends.clientOutput, bytes.baseAddress?.advanced(by: sent), now)
        }
        if result < 0 { return errno == EAGAIN || errno == EINTR }
        sent += result
        if piece < sending.count { sched_yield() }
        return sent < sending.count
    }

    /// Receives what is there; false at the end.
    private func receive() -> Bool {
        if count == Self.capacity { isTooMuch = true }
        if isTooMuch { count = 0 }
        let result = read(ends.clientInput, received.baseAddress?.advanced(by: count), Self.capacity - count)
        if result < 0 { return errno == EAGAIN || errno == EINTR }
        count += result
        return result > 0
    }
}
