// A handshake's bytes on their way: received up to a deadline, given to the handshake, and its answers sent.
import Block
import Glibc
import LinuxIO

/// The client's side of a handshake over a link.
struct HandshakeDialogue: ~Copyable {
    /// What it goes over.
    private(set) var link: ClientLink
    private var handshake: ClientHandshake
    private let deadline: Double
    private let input = Buffer(count: 2 * Int(ClientHandshake.replyLengthMax))
    private var count = 0

    /// - Parameter deadline: when to give up, by `monotonicSeconds()`.
    init(_ link: ClientLink, _ handshake: ClientHandshake, deadline: Double) {
        self.link = link
        self.handshake = handshake
        self.deadline = deadline
    }

    /// Receives more of what the server says.
    mutating func receive() throws(BlockError) {
        count += try receive(into: UnsafeMutableRawBufferPointer(rebasing: input.bytes[count...]))
    }

    /// Gives what has come to the handshake, and sends what it says to it.
    mutating func proceed() throws(BlockError) -> ClientHandshake.Outcome {
        var output: [UInt8] = []
        let received = UnsafeRawBufferPointer(rebasing: input.readable[..<count])
        let (taken, outcome) = try handshake.receive(received, into: &output)
        input.bytes.copyMemory(from: UnsafeRawBufferPointer(rebasing: received[taken...]))
        count -= taken
        try send(output)
        return outcome
    }

    /// Goes on over another link: the same connection in TLS.
    mutating func tlsStarted(over link: ClientLink) throws(BlockError) {
        self.link = link
        var output: [UInt8] = []
        handshake.tlsStarted(into: &output)
        try send(output)
    }

    // MARK: - Bytes

    /// Receives into a place that is not empty.
    ///
    /// - Returns: bytes received, at least 1.
    /// - Throws: `.shutdown` when the server has gone, `.inputOutput` when it says nothing in time.
    func receive(into space: UnsafeMutableRawBufferPointer, during what: String = "the handshake") throws(BlockError)
        -> Int
    {
        let empty = UnsafeMutableRawBufferPointer(start: nil, count: 0)
        while true {
            try check()
            switch link.receive(empty, space, waiting: true) {
            case .bytes(let count): return count
            case .closed(let why): throw BlockError(.shutdown, "the server \(why) during \(what)")
            case .nothing: continue
            }
        }
    }

    /// Sends what a TLS session has to say.
    func sendOutput(of session: TLSSession) throws(BlockError) {
        while !session.output.isEmpty {
            let count = session.output.count
            try send(Array(session.output))
            session.removeOutput(count)
        }
    }

    private func send(_ bytes: [UInt8]) throws(BlockError) {
        var done = 0
        while done < bytes.count || link.hasOutput {
            try check()
            let sent = bytes.withUnsafeBytes {
                link.send(UnsafeRawBufferPointer(rebasing: $0[done...]), UnsafeRawBufferPointer(start: nil, count: 0))
            }
            switch sent {
            case .bytes(let count): done += count
            case .closed(let why):
                throw BlockError(.shutdown, "the server \(lastWord() ?? why) during the handshake")
            case .full: _ = link.waitForRoom(orInput: false, milliseconds: 100)
            }
        }
    }

    /// Why the server has ended TLS, if it said so before nothing could be sent any more.
    private func lastWord() -> String? {
        let space = Buffer(count: 4096)
        let empty = UnsafeMutableRawBufferPointer(start: nil, count: 0)
        while true {
            switch link.receive(empty, space.bytes, waiting: false) {
            case .bytes: continue
            case .nothing: return nil
            case .closed(let why): return why.hasPrefix("broke TLS") ? why : nil
            }
        }
    }

    private func check() throws(BlockError) {
        if monotonicSeconds() > deadline {
            throw BlockError(errno: ETIMEDOUT, "waiting for the server during the handshake")
        }
    }
}
