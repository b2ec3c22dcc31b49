// Fuzzes the client: whatever a server sends, in the handshake or as replies, requests end once each, nothing beside
// their buffers is written, and a read that succeeds has the bytes that were sent for it.
import Block
import FuzzSupport
import Glibc
import LinuxIO
import NBD

@main
struct ClientFuzz {
    static func main() throws {
        fuzz { input in
            var choices = Choices(input)
            let shape = choices.byte()
            switch shape & 3 {
            case 0: shakeHands(&choices, shape)
            case 1: converse(&choices, .simple, isRaw: shape & 4 != 0)
            case 2: converse(&choices, .structured, isRaw: shape & 4 != 0)
            default: converse(&choices, .extended, isRaw: shape & 4 != 0)
            }
        }
    }

    // MARK: - The handshake

    /// The handshake goes the same however the bytes are cut.
    private static func shakeHands(_ choices: inout Choices, _ shape: UInt8) {
        let goals: [ClientHandshake.Goal] = [
            .enter(export: "disk", contexts: nil), .list, .enter(export: "", contexts: ["base:allocation"]),
            .enter(export: "disk", contexts: []),
        ]
        let goal = goals[Int(shape >> 4 & 3)]
        let cut = choices.number()
        var stream = Array(choices.rest())
        if shape & 4 != 0 {
            // Most inputs are to get past the greeting.
            var greeting: [UInt8] = []
            greeting.appendBigEndian(NBD.initMagic)
            greeting.appendBigEndian(NBD.optionMagic)
            greeting.appendBigEndian(UInt16(3))
            stream = greeting + stream
        }
        let usesTLS = shape & 8 != 0
        let whole = Talk(goal, usesTLS, stream, pieces: [stream.count])
        let start = min(cut, stream.count)
        let parts = Talk(goal, usesTLS, stream, pieces: [start, stream.count - start])
        // What is glued behind the end is seen only when it has come.
        if whole.end != .failed && parts.end != .failed {
            require(whole == parts, "cut at \(start), it goes otherwise")
        }
    }

    // MARK: - Replies

    /// Sends requests to a server that answers with what the input says.
    private static func converse(_ choices: inout Choices, _ mode: HeaderMode, isRaw: Bool) {
        var pair: [Int32] = [-1, -1]
        guard socketpair(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0, &pair) == 0 else { return }
        let server = Descriptor(owning: pair[0])
        send(ServerBytes.handshake(mode), to: server)
        guard let connector = try? ClientConnector(NBDURI(.unix(path: "x"))),
            let channel = try? connector.connect(
                over: Descriptor(owning: pair[1]), deadline: monotonicSeconds() + 10)
        else { return require(false, "the handshake failed") }
        let (replies, areWhole) = isRaw ? (Array(choices.rest()), false) : ServerBytes.replies(&choices, mode)
        send(Array(replies.prefix(100_000)), to: server)
        shutdown(server.number, Int32(SHUT_WR))
        var reads = [Read(0, 512), Read(4096, 4096), Read(70_000, 1)]
        let payload = [UInt8](repeating: 1, count: 512)
        payload.withUnsafeBytes { payload in
            var pending: Set<UInt64> = []
            for (token, read) in reads.enumerated() {
                if (try? channel.submitRead(into: read.buffer, at: read.offset, token: UInt64(token))) != nil {
                    pending.insert(UInt64(token))
                }
            }
            if (try? channel.submitWrite(payload, at: 8192, durable: false, token: 3)) != nil { pending.insert(3) }
            if (try? channel.submitZero(0..<4096, flags: [], token: 4)) != nil { pending.insert(4) }
            if mode != .simple {
                let extents = try? channel.status(ServerBytes.contextID, of: 4096..<12_288, mask: 3, capacity: 8)
                let length = (extents ?? []).reduce(0) { $0 + $1.length }
                require(length <= 8192 && (extents?.count ?? 0) <= 8, "a status of \(length) bytes")
                require((extents ?? []).allSatisfy { $0.length > 0 && $0.value <= 3 }, "a status that says nothing")
            }
            while let completion = channel.nextCompletion() {
                require(pending.remove(completion.token) != nil, "the request \(completion.token) ended twice")
                guard completion.error == nil, completion.token < 3 else { continue }
                if areWhole { reads[Int(completion.token)].checkContent() }
            }
            require(pending.isEmpty, "the requests \(pending) did not end")
        }
        for read in reads { read.checkGuards() }
        reads.removeAll()
        channel.close()
    }

    private static func send(_ bytes: [UInt8], to socket: Descriptor) {
        var size: Int32 = 1 << 20
        setsockopt(socket.number, SOL_SOCKET, SO_SNDBUF, &size, socklen_t(MemoryLayout<Int32>.size))
        _ = Glibc.send(socket.number, bytes, bytes.count, Int32(MSG_NOSIGNAL) | Int32(MSG_DONTWAIT))
    }
}

/// One handshake from start to end.
private struct Talk: Equatable {
    enum End { case more, failed, startTLS, ready, listed }

    var output: [UInt8] = []
    var end = End.more

    init(_ goal: ClientHandshake.Goal, _ usesTLS: Bool, _ stream: [UInt8], pieces: [Int]) {
        var handshake = ClientHandshake(goal, usesTLS: usesTLS)
        var arrived = 0
        var taken = 0
        for piece in pieces {
            arrived += piece
            let rest = stream[taken..<arrived]
            let result = rest.withUnsafeBytes { input in try? handshake.receive(input, into: &output) }
            guard let (count, outcome) = result else {
                end = .failed
                return
            }
            require(count >= 0 && count <= rest.count, "more was taken than given")
            require(rest.count - count <= 20 + Int(ClientHandshake.replyLengthMax), "too much is kept for later")
            taken += count
            switch outcome {
            case .more: continue
            case .startTLS: end = .startTLS
            case .ready(let agreement):
                require(agreement.size <= UInt64(Int64.max), "a size of \(agreement.size)")
                end = .ready
            case .listed: end = .listed
            }
            return
        }
    }
}

/// A read's buffer, with bytes on both sides that nobody may touch.
private final class Read {
    private static let guarded = 64
    let offset: UInt64
    let buffer: UnsafeMutableRawBufferPointer
    private let memory: UnsafeMutableRawBufferPointer

    init(_ offset: UInt64, _ count: Int) {
        self.offset = offset
        memory = .allocate(byteCount: count + 2 * Self.guarded, alignment: 16)
        memory.initializeMemory(as: UInt8.self, repeating: 0xA5)
        buffer = UnsafeMutableRawBufferPointer(rebasing: memory[Self.guarded..<(Self.guarded + count)])
    }

    deinit { memory.deallocate() }

    func checkGuards() {
        let sides = [memory.prefix(Self.guarded), memory.suffix(Self.guarded)]
        require(sides.allSatisfy { $0.allSatisfy { $0 == 0xA5 } }, "bytes outside of a buffer were written")
    }

    /// Every byte is zero, from a hole, or what `ServerBytes` has at its offset.
    func checkContent() {
        for (index, byte) in buffer.enumerated() where byte != 0 {
            require(byte == ServerBytes.byte(offset + UInt64(index)), "a byte that was not sent at \(index)")
        }
    }
}
