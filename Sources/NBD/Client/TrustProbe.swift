// Asks a server for its certificates without trusting it, so that a person can compare them and pin one.
public import Block
import Glibc
public import LinuxIO

/// What a server shows to whoever asks.
public struct ShownCertificates: Sendable {
    /// Whether TLS began with NBD_OPT_STARTTLS; otherwise with the first byte, as HTTPS does.
    public let isNBD: Bool
    /// The certificates, the server's own first.
    public let certificates: [Certificate]
    /// The same certificates in PEM.
    public let pem: [String]
}

extension ShownCertificates {
    /// Seconds that a server has to greet like an NBD server, before TLS is tried with the first byte.
    static let greetingSeconds = 2.0

    /// Connects to a server, shakes hands and leaves. Nothing that it shows is checked.
    ///
    /// - Parameters:
    ///   - hostName: the name to ask for (SNI).
    ///   - seconds: the time limit.
    /// - Throws: `BlockError`: nobody listens, it offers no TLS, or it authenticates without certificates.
    public static func ask(_ address: ServerAddress, hostName: String, seconds: Double = 20) throws(BlockError)
        -> ShownCertificates
    {
        let deadline = monotonicSeconds() + seconds
        let socket = try LinuxIO.connect(to: address, deadline: deadline)
        do throws(BlockError) {
            var probe = Probe(socket: socket, deadline: deadline)
            let isNBD = try probe.startNBD()
            return try probe.shakeHands(hostName: hostName, isNBD: isNBD)
        } catch { throw error.during("asking \(address) for its certificate") }
    }
}

/// One connection that is given up after the handshake.
private struct Probe {
    let socket: Descriptor
    let deadline: Double

    /// Begins as an NBD client, if the server greets like one, as far as TLS; false if it does not greet.
    mutating func startNBD() throws(BlockError) -> Bool {
        guard try waitForInput(seconds: ShownCertificates.greetingSeconds) else { return false }
        var handshake = ClientHandshake(.list, usesTLS: true)
        let input = Buffer(count: 2 * Int(ClientHandshake.replyLengthMax))
        var count = 0
        while true {
            count += try receive(into: UnsafeMutableRawBufferPointer(rebasing: input.bytes[count...]))
            var output: [UInt8] = []
            let received = UnsafeRawBufferPointer(rebasing: input.readable[..<count])
            let (taken, outcome) = try handshake.receive(received, into: &output)
            input.bytes.copyMemory(from: UnsafeRawBufferPointer(rebasing: received[taken...]))
            count -= taken
            try send(output)
            if case .startTLS = outcome { return true }
            guard case .more = outcome else { throw BlockError(.invalid, "it ended the handshake before TLS") }
        }
    }

    func shakeHands(hostName: String, isNBD: Bool) throws(BlockError) -> ShownCertificates {
        var options = TLSClientOptions()
        options.verifiesPeer = false
        let session = try TLSClientContext(options).session(host: hostName)
        var failure: BlockError?
        while failure == nil {
            do throws(BlockError) {
                let isDone = try session.handshake()
                try send(Array(session.output))
                session.removeOutput(session.output.count)
                if isDone { break }
                session.addInput(try receive(into: session.inputSpace))
            } catch { failure = error }
        }
        // A server that wants a certificate from the client has shown its own before it refuses.
        let certificates = session.certificates
        if certificates.isEmpty {
            throw failure ?? BlockError(.notFound, "it shows no certificate; does it use pre-shared keys?")
        }
        session.close()
        try? send(Array(session.output))
        return ShownCertificates(
            isNBD: isNBD, certificates: certificates, pem: certificates.indices.compactMap { session.pem($0) })
    }

    /// Waits until something arrives; false if nothing does in time.
    private func waitForInput(seconds: Double) throws(BlockError) -> Bool {
        let end = min(deadline, monotonicSeconds() + seconds)
        while true {
            let left = end - monotonicSeconds()
            if left <= 0 { return false }
            var ready = pollfd(fd: socket.number, events: Int16(POLLIN), revents: 0)
            let result = poll(&ready, 1, Int32(left * 1000) + 1)
            if result > 0 { return true }
            if result < 0 && errno != EINTR { throw BlockError(errno: errno, "waiting for an answer") }
        }
    }

    private func receive(into space: UnsafeMutableRawBufferPointer) throws(BlockError) -> Int {
        guard try waitForInput(seconds: .greatestFiniteMagnitude) else {
            throw BlockError(errno: ETIMEDOUT, "waiting for an answer")
        }
        let got = recv(socket.number, space.baseAddress, space.count, 0)
        if got < 0 { throw BlockError(errno: errno, "receiving") }
        if got == 0 { throw BlockError(.inputOutput, "it closed the connection; does it offer TLS?") }
        return got
    }

    private func send(_ bytes: [UInt8]) throws(BlockError) {
        var done = 0
        while done < bytes.count {
            let sent = bytes.withUnsafeBytes {
                Glibc.send(socket.number, $0.baseAddress?.advanced(by: done), $0.count - done, Int32(MSG_NOSIGNAL))
            }
            if sent > 0 {
                done += sent
            } else if errno == EAGAIN, monotonicSeconds() < deadline {
                var ready = pollfd(fd: socket.number, events: Int16(POLLOUT), revents: 0)
                poll(&ready, 1, 100)
            } else if errno != EINTR {
                throw BlockError(errno: errno, "sending")
            }
        }
    }
}
