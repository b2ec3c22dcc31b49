// TLS behind the seam of a connection's byte stream: encrypts what is sent in one go, or lets the kernel do it.
import Block
import Glibc
import LinuxIO

/// A byte stream over TLS. What is sent leaves as many records at once, not one by one.
struct TLSTransport: Transport, ~Copyable {
    static var pieceMax: Int { 65536 }
    /// How often bytes are received that bring nothing before the caller is asked whether it goes on.
    private static var fruitlessTurnsMax: Int { 16 }
    private var plain: PlainTransport
    private let session: TLSSession
    /// Whether the kernel encrypts what is sent on the socket (kTLS); then files can be sent by reference, too.
    private let kernelSends: Bool

    /// A stream over a session whose handshake is done.
    init(_ plain: consuming PlainTransport, session: TLSSession, kernelSends: Bool) {
        self.plain = plain
        self.session = session
        self.kernelSends = kernelSends
    }

    var canSendFile: Bool { kernelSends }
    var inputDescriptor: Int32 { plain.inputDescriptor }

    mutating func receive(into buffer: UnsafeMutableRawBufferPointer, waiting: Bool) -> Received {
        var done = 0
        var turns = 0
        while done < buffer.count {
            // A read gives one record at most; a batch of requests may lie in many.
            switch session.read(into: UnsafeMutableRawBufferPointer(rebasing: buffer[done...])) {
            case .bytes(let count): done += count
            case .wantsInput:
                if !flushOutput() { return .closed }
                if done > 0 { return .bytes(done) }
                // Messages of TLS itself bring nothing. Whoever sends no end of them gets no end of looks at its time
                // limits, either.
                if turns == Self.fruitlessTurnsMax { return .nothing }
                turns += 1
                switch plain.receive(into: session.inputSpace, waiting: waiting) {
                case .bytes(let count): session.addInput(count)
                case .nothing: return .nothing
                case .closed: return .closed
                }
            case .closed, .failed: return done > 0 ? .bytes(done) : .closed
            }
        }
        return .bytes(done)
    }

    mutating func send(_ bytes: UnsafeRawBufferPointer, more: Bool) -> Bool {
        if kernelSends { return plain.send(bytes, more: more) }
        var done = 0
        while done < bytes.count {
            guard let taken = try? session.write(UnsafeRawBufferPointer(rebasing: bytes[done...])) else { return false }
            done += taken
            // Full, and so sent before there is room for the rest.
            if taken == 0 && !flushOutput() { return false }
        }
        return more || flushOutput()
    }

    private mutating func flushOutput() -> Bool {
        let output = session.output
        if output.isEmpty { return true }
        guard plain.send(output, more: false) else { return false }
        session.removeOutput(output.count)
        return true
    }

    mutating func sendFile(_ file: Int32, at offset: UInt64, count: Int) -> Int? {
        plain.sendFile(file, at: offset, count: count)
    }

    mutating func setTimeout(seconds: Int) { plain.setTimeout(seconds: seconds) }

    mutating func sayGoodbye() {
        session.close()
        // As far as there is room: nobody waits for a client that takes nothing any more.
        session.removeOutput(plain.sendNow(session.output))
    }

    mutating func close(waitingSeconds: Double) {
        sayGoodbye()
        plain.close(waitingSeconds: waitingSeconds)
    }
}
