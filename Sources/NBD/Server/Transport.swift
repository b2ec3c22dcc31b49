// How bytes travel between a client and its connection: plain sockets and pipes here, TLS behind the same seam.
import Block
import CLinux
import Glibc
import LinuxIO

/// What a receive brought.
enum Received {
    /// This many bytes, at least 1.
    case bytes(Int)
    /// Nothing has arrived yet, or a signal interrupted the wait.
    case nothing
    /// The peer has closed, the connection broke, or it made no progress in time.
    case closed
}

/// A byte stream to one client, used by one thread.
protocol Transport: ~Copyable {
    /// The longest piece that is best read and sent at once, in bytes. Where bytes are changed on their way, all their
    /// copies should fit the L2 cache.
    static var pieceMax: Int { get }
    /// Whether `sendFile` hands pages to the stream as they are.
    var canSendFile: Bool { get }
    /// The descriptor that becomes readable when something arrives.
    var inputDescriptor: Int32 { get }
    /// Receives what has arrived; waits for at least one byte, or a signal, if `waiting`.
    mutating func receive(into buffer: UnsafeMutableRawBufferPointer, waiting: Bool) -> Received
    /// Sends all bytes; false when the stream is broken. `more` tells that further bytes follow at once.
    mutating func send(_ bytes: UnsafeRawBufferPointer, more: Bool) -> Bool
    /// Sends bytes of a file by reference.
    ///
    /// - Returns: the bytes sent, fewer than asked when the file ends or fails; nil when the stream is broken.
    mutating func sendFile(_ file: Int32, at offset: UInt64, count: Int) -> Int?
    /// The longest that sending or receiving may make no progress, in seconds; 0 for no limit.
    mutating func setTimeout(seconds: Int)
    /// Tells the peer that nothing follows, where the stream can say so, without waiting for anything.
    mutating func sayGoodbye()
    /// Ends the stream after everything that was sent has reached the peer, waiting for it at most so long.
    mutating func close(waitingSeconds: Double)
}

/// A connected socket, or a pair of pipes, without encryption.
struct PlainTransport: Transport, ~Copyable {
    static var pieceMax: Int { 256 * 1024 }
    let inputDescriptor: Int32
    private let outputDescriptor: Int32
    private let isSocket: Bool

    /// A stream over descriptors that its maker keeps open.
    init(input: Int32, output: Int32) {
        inputDescriptor = input
        outputDescriptor = output
        var status = stat()
        isSocket = fstat(output, &status) == 0 && status.st_mode & S_IFMT == S_IFSOCK
        if isSocket {
            setOption(output, Int32(IPPROTO_TCP), TCP_NODELAY, 1)
            setOption(output, SOL_SOCKET, SO_KEEPALIVE, 1)
            if case .unix = Peer(socket: output) { setOption(output, SOL_SOCKET, SO_SNDBUF, 2 << 20) }
        }
    }

    var canSendFile: Bool { isSocket }

    mutating func receive(into buffer: UnsafeMutableRawBufferPointer, waiting: Bool) -> Received {
        let got =
            isSocket
            ? recv(inputDescriptor, buffer.baseAddress, buffer.count, waiting ? 0 : Int32(MSG_DONTWAIT))
            : readPipe(buffer, waiting: waiting)
        if got > 0 { return .bytes(got) }
        if got == 0 { return .closed }
        return errno == EINTR || (errno == EAGAIN && !waiting) ? .nothing : .closed
    }

    private func readPipe(_ buffer: UnsafeMutableRawBufferPointer, waiting: Bool) -> Int {
        var ready = pollfd(fd: inputDescriptor, events: Int16(POLLIN), revents: 0)
        if !waiting && poll(&ready, 1, 0) == 0 {
            errno = EAGAIN
            return -1
        }
        return read(inputDescriptor, buffer.baseAddress, buffer.count)
    }

    mutating func send(_ bytes: UnsafeRawBufferPointer, more: Bool) -> Bool {
        var done = 0
        let flags = Int32(MSG_NOSIGNAL) | (more ? Int32(MSG_MORE) : 0)
        while done < bytes.count {
            let start = bytes.baseAddress?.advanced(by: done)
            let sent =
                isSocket
                ? Glibc.send(outputDescriptor, start, bytes.count - done, flags)
                : Glibc.write(outputDescriptor, start, bytes.count - done)
            if sent > 0 {
                done += sent
            } else if sent == 0 || errno != EINTR {
                return false
            }
        }
        return true
    }

    /// Sends what there is room for without waiting, and says how much.
    mutating func sendNow(_ bytes: UnsafeRawBufferPointer) -> Int {
        guard isSocket else { return send(bytes, more: false) ? bytes.count : 0 }
        let flags = Int32(MSG_NOSIGNAL) | Int32(MSG_DONTWAIT)
        return max(0, Glibc.send(outputDescriptor, bytes.baseAddress, bytes.count, flags))
    }

    mutating func sendFile(_ file: Int32, at offset: UInt64, count: Int) -> Int? {
        var position = off_t(truncatingIfNeeded: offset)
        var done = 0
        while done < count {
            let sent = sendfile(outputDescriptor, file, &position, count - done)
            if sent > 0 {
                done += sent
            } else if sent == 0 {
                return done
            } else if errno == EIO || errno == EINVAL || errno == EOVERFLOW {
                return done
            } else if errno != EINTR {
                return nil
            }
        }
        return done
    }

    mutating func setTimeout(seconds: Int) {
        guard isSocket else { return }
        var limit = timeval(tv_sec: seconds, tv_usec: 0)
        setsockopt(outputDescriptor, SOL_SOCKET, SO_SNDTIMEO, &limit, socklen_t(MemoryLayout<timeval>.size))
    }

    mutating func sayGoodbye() {}

    mutating func close(waitingSeconds: Double) {
        guard isSocket else { return }
        shutdown(outputDescriptor, Int32(SHUT_WR))
        // Closing a socket with unread requests in it resets the connection, which can throw away replies that are
        // still on their way: requests are read and dropped until the client has seen the end and closes, too.
        let deadline = monotonicSeconds() + waitingSeconds
        var dropped = [UInt8](repeating: 0, count: 65536)
        while monotonicSeconds() < deadline {
            let got = recv(inputDescriptor, &dropped, dropped.count, Int32(MSG_DONTWAIT))
            if got < 0 && errno != EAGAIN && errno != EINTR { return }
            if got <= 0 {
                if dg_peer_has_closed(inputDescriptor) { return }
                usleep(5000)
            }
        }
    }
}
