// The byte stream below a channel: a connected socket, with TLS over it or without.
import Block
import Glibc
import LinuxIO

/// What receiving from a server brought.
enum LinkReceived {
    /// This many bytes, at least 1.
    case bytes(Int)
    /// Nothing yet.
    case nothing
    /// Nothing will come any more; why.
    case closed(String)
}

/// What sending to a server brought.
enum LinkSent {
    /// This many bytes were taken, perhaps 0 where encrypted ones were still to be sent.
    case bytes(Int)
    /// There is no room now.
    case full
    /// Nothing can be sent any more; why.
    case closed(String)
}

/// A connected socket. One thread may receive while another one sends.
final class ClientLink: @unchecked Sendable {
    // Sendable because the descriptor never changes, and the session is touched under its lock only.

    /// Seconds after which receiving comes back with nothing, for deadlines to be looked at.
    static let tickSeconds = 0.5
    /// The most plain bytes that are encrypted at once: more would wait in memory.
    private static let encryptMax = 256 << 10

    private let descriptor: Descriptor
    private let session: TLSSession?
    private let sessionLock = Lock()

    /// A link over a connected socket, and a TLS session whose handshake is done.
    init(_ descriptor: Descriptor, session: TLSSession? = nil) {
        self.descriptor = descriptor
        self.session = session
        var tick = timeval(tv_sec: 0, tv_usec: Int(Self.tickSeconds * 1e6))
        setsockopt(descriptor.number, SOL_SOCKET, SO_RCVTIMEO, &tick, socklen_t(MemoryLayout<timeval>.size))
        if case .unix = Peer(socket: descriptor.number) { setOption(descriptor.number, SOL_SOCKET, SO_SNDBUF, 2 << 20) }
    }

    /// How the link is encrypted; nil where it is not.
    var tlsIdentity: TLSIdentity? { session?.identity }

    // MARK: - Receiving

    /// Receives what has arrived, first into one place, then into the next, which is not empty. If `waiting`, it waits
    /// for at least a byte, or a tick.
    func receive(
        _ first: UnsafeMutableRawBufferPointer, _ second: UnsafeMutableRawBufferPointer, waiting: Bool
    ) -> LinkReceived {
        guard let session else { return receivePlain(first, second, waiting: waiting) }
        var done = 0
        var startSeconds: Double?
        while done < first.count + second.count {
            let place =
                done < first.count
                ? UnsafeMutableRawBufferPointer(rebasing: first[done...])
                : UnsafeMutableRawBufferPointer(rebasing: second[(done - first.count)...])
            var room = UnsafeMutableRawBufferPointer(start: nil, count: 0)
            let read = sessionLock.withLock {
                let read = session.read(into: place)
                if case .wantsInput = read { room = session.inputSpace }
                return read
            }
            switch read {
            case .bytes(let count): done += count
            case .closed: return done > 0 ? .bytes(done) : .closed("closed the connection")
            case .failed(let error): return done > 0 ? .bytes(done) : .closed("broke TLS: \(error.message)")
            case .wantsInput:
                if done > 0 { return .bytes(done) }
                // A record that comes byte by byte must not keep deadlines from being looked at.
                if let startSeconds {
                    if monotonicSeconds() - startSeconds > Self.tickSeconds { return .nothing }
                } else {
                    startSeconds = monotonicSeconds()
                }
                let empty = UnsafeMutableRawBufferPointer(start: nil, count: 0)
                // Only who receives touches this space, so that sending can go on meanwhile.
                switch receivePlain(empty, room, waiting: waiting) {
                case .bytes(let count): sessionLock.withLock { session.addInput(count) }
                case .nothing: return .nothing
                // Without a word that nothing follows, somebody else may have cut the connection.
                case .closed(let why): return .closed(why)
                }
            }
        }
        return .bytes(done)
    }

    private func receivePlain(
        _ first: UnsafeMutableRawBufferPointer, _ second: UnsafeMutableRawBufferPointer, waiting: Bool
    ) -> LinkReceived {
        let flags = waiting ? 0 : Int32(MSG_DONTWAIT)
        let got: Int
        if first.isEmpty {
            got = recv(descriptor.number, second.baseAddress, second.count, flags)
        } else {
            got = withUnsafeTemporaryAllocation(of: iovec.self, capacity: 2) { vectors in
                vectors.initializeElement(at: 0, to: iovec(iov_base: first.baseAddress, iov_len: first.count))
                vectors.initializeElement(at: 1, to: iovec(iov_base: second.baseAddress, iov_len: second.count))
                var message = msghdr()
                message.msg_iov = vectors.baseAddress
                message.msg_iovlen = 2
                return recvmsg(descriptor.number, &message, flags)
            }
        }
        if got > 0 { return .bytes(got) }
        if got == 0 { return .closed("closed the connection") }
        if errno == EAGAIN || errno == EINTR { return .nothing }
        return .closed("is gone: \(systemErrorText(errno))")
    }

    // MARK: - Sending

    /// Sends as much as there is room for, first of one place, then of the next, without waiting.
    func send(_ first: UnsafeRawBufferPointer, _ second: UnsafeRawBufferPointer) -> LinkSent {
        guard let session else { return sendPlain(first, second) }
        return sessionLock.withLock {
            let place = first.isEmpty ? second : first
            do throws(BlockError) {
                let part = UnsafeRawBufferPointer(rebasing: place.prefix(Self.encryptMax))
                let taken = part.isEmpty ? 0 : try session.write(part)
                let empty = UnsafeRawBufferPointer(start: nil, count: 0)
                switch session.output.isEmpty ? .bytes(0) : sendPlain(session.output, empty) {
                case .bytes(let count): session.removeOutput(count)
                case .full: if taken == 0 { return .full }
                case .closed(let why): return .closed(why)
                }
                return .bytes(taken)
            } catch { return .closed("broke TLS: \(error.message)") }
        }
    }

    /// Whether encrypted bytes are still to be sent: by `send` with nothing new.
    var hasOutput: Bool {
        guard let session else { return false }
        return sessionLock.withLock { !session.output.isEmpty }
    }

    private func sendPlain(_ first: UnsafeRawBufferPointer, _ second: UnsafeRawBufferPointer) -> LinkSent {
        let sent = withUnsafeTemporaryAllocation(of: iovec.self, capacity: 2) { vectors in
            vectors.initializeElement(at: 0, to: Self.vector(first))
            vectors.initializeElement(at: 1, to: Self.vector(second))
            var message = msghdr()
            message.msg_iov = vectors.baseAddress
            message.msg_iovlen = 2
            return sendmsg(descriptor.number, &message, Int32(MSG_NOSIGNAL) | Int32(MSG_DONTWAIT))
        }
        if sent >= 0 { return .bytes(sent) }
        if errno == EAGAIN || errno == EINTR { return .full }
        return .closed("is gone: \(systemErrorText(errno))")
    }

    private static func vector(_ bytes: UnsafeRawBufferPointer) -> iovec {
        iovec(iov_base: UnsafeMutableRawPointer(mutating: bytes.baseAddress), iov_len: bytes.count)
    }

    // MARK: - Waiting and ending

    /// Waits until there is room to send, or, if `orInput`, something arrives.
    ///
    /// - Returns: whether something arrived, or the connection ended.
    func waitForRoom(orInput: Bool, milliseconds: Int32) -> Bool {
        let events = Int16(POLLOUT) | (orInput ? Int16(POLLIN) : 0)
        var ready = pollfd(fd: descriptor.number, events: events, revents: 0)
        poll(&ready, 1, milliseconds)
        return ready.revents & ~Int16(POLLOUT) != 0
    }

    /// Waits until something arrives, or the connection ends.
    ///
    /// - Returns: false when nothing did in time.
    @discardableResult
    func waitForInput(milliseconds: Int32) -> Bool {
        var ready = pollfd(fd: descriptor.number, events: Int16(POLLIN), revents: 0)
        return poll(&ready, 1, milliseconds) > 0
    }

    /// Ends the connection at once, which wakes who waits for it.
    func cut() { shutdown(descriptor.number, Int32(SHUT_RDWR)) }

    /// Ends the connection in the orderly way, as far as that needs no waiting.
    func sayGoodbye() {
        if let session {
            sessionLock.withLock { session.close() }
            let empty = UnsafeRawBufferPointer(start: nil, count: 0)
            _ = send(empty, empty)
        }
        shutdown(descriptor.number, Int32(SHUT_WR))
    }
}
