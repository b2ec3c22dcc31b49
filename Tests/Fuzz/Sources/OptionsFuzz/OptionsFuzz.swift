// Fuzzes the server's side of the handshake: whatever a client sends, replies are well formed, bounded, and the same
// however the bytes are cut into pieces.
import Block
import FuzzSupport
import LinuxIO
import NBD

@main
struct OptionsFuzz {
    static func main() throws {
        let exports = try FixedExports(makeExports())
        fuzz { input in
            var choices = Choices(input)
            let shape = choices.byte()
            let peer: Peer = shape & 2 != 0 ? .unix(pid: 1, uid: 1000, gid: 1000) : .inherited
            let cut = choices.number()
            let names = ["a", "", "secret", "nobody"]
            let stream = shape & 1 != 0 ? framedOptions(&choices, names: names) : Array(choices.rest())
            let whole = Conversation(exports, peer, stream, pieces: [stream.count])
            let start = min(cut, stream.count)
            require(
                whole == Conversation(exports, peer, stream, pieces: [start, stream.count - start]),
                "cut at \(start), the handshake goes otherwise")
            if shape & 4 != 0 {
                let small = [Int](repeating: 1 + cut % 16, count: stream.count / (1 + cut % 16) + 1)
                require(
                    whole == Conversation(exports, peer, stream, pieces: small),
                    "in pieces of \(small[0]) bytes, the handshake goes otherwise")
            }
            checkReplies(whole, to: stream, exports)
        }
    }

    private static func makeExports() throws -> [Export] {
        let stub = StubDevice(size: 1 << 40, isReadOnly: false, bitmaps: ["monday", "", "däily:1"])
        var guarded = ExportOptions()
        guarded.allow = [try AllowRule("uid=1000")]
        let long = String(repeating: "n", count: NBD.stringLengthMax)
        return try [
            Export(name: "a", description: "the first", device: stub),
            Export(name: "", device: StubDevice(size: 513, isReadOnly: true)),
            Export(name: "secret", description: "for one user", device: stub, options: guarded),
            Export(name: long, description: long, device: stub),
        ]
    }

    /// Every reply is whole, answers an option that was sent, in order, and each option gets one final reply.
    private static func checkReplies(_ conversation: Conversation, to stream: [UInt8], _ exports: FixedExports) {
        let sent = optionsSent(stream)
        var position = 0
        var answered = 0
        conversation.output.withUnsafeBytes { output in
            while output.count - position >= 20, output.bigEndian(position) == NBD.optionReplyMagic {
                let option = output.bigEndian(position + 8, as: UInt32.self)
                let type = output.bigEndian(position + 12, as: UInt32.self)
                let length = Int(output.bigEndian(position + 16, as: UInt32.self))
                require(output.count - position - 20 >= length, "a reply is cut off")
                require(answered < sent.count && sent[answered] == option, "a reply to \(option), which was not sent")
                let isFinal = type == NBD.OptionReply.ack || type >> 31 == 1
                require(type != NBD.OptionReply.ack || length == 0, "an acknowledgement with data")
                require(type != NBD.OptionReply.info || length >= 2, "an info without a type")
                if isFinal { answered += 1 }
                position += 20 + length
            }
            let rest = output.count - position
            let isOldStyle = conversation.isTransmission && (rest == 10 || rest == 134)
            require(rest == 0 || isOldStyle, "\(rest) bytes follow the last reply")
        }
        // The most that one option can ask for: all names and descriptions, or all contexts.
        let most = exports.all.reduce(1000) { $0 + 2 * (100 + $1.name.utf8.count + $1.description.utf8.count) }
        require(conversation.output.count <= (sent.count + 1) * most, "\(conversation.output.count) bytes of replies")
    }

    /// The kinds of the options in a stream, as far as it is well formed.
    private static func optionsSent(_ stream: [UInt8]) -> [UInt32] {
        var options: [UInt32] = []
        var position = 4
        stream.withUnsafeBytes { stream in
            while stream.count - position >= 16, stream.bigEndian(position) == NBD.optionMagic {
                options.append(stream.bigEndian(position + 8))
                let length = Int(stream.bigEndian(position + 12, as: UInt32.self))
                position += 16 + min(length, stream.count)
            }
        }
        return options
    }
}

/// One client's handshake from start to end.
private struct Conversation: Equatable {
    var output: [UInt8] = []
    private var taken = 0
    private var ending = "more"
    var isTransmission: Bool { ending.hasPrefix("transmission") }

    init(_ exports: FixedExports, _ peer: Peer, _ stream: [UInt8], pieces: [Int]) {
        var handshake = ServerHandshake(directory: exports, client: Credentials(peer: peer))
        var arrived = 0
        for piece in pieces {
            arrived = min(arrived + piece, stream.count)
            if take(&handshake, stream[taken..<arrived]) { return }
        }
        require(arrived - taken <= 16 + Int(ServerHandshake.optionLengthMax), "too much is kept for later")
    }
    /// Gives what has arrived, and what is left of it again while some is taken; whether the handshake is over.
    private mutating func take(_ handshake: inout ServerHandshake, _ arrived: ArraySlice<UInt8>) -> Bool {
        var rest = arrived
        while true {
            var replies: [UInt8] = []
            let (consumed, outcome) = rest.withUnsafeBytes { handshake.receive($0, into: &replies) }
            require(consumed >= 0 && consumed <= rest.count, "more was taken than given")
            // One option may be answered after the limit is almost reached: 100 KiB are more than any answer has here.
            require(replies.count <= ServerHandshake.outputMax + (100 << 10), "\(replies.count) bytes at once")
            rest = rest.dropFirst(consumed)
            taken += consumed
            output += replies
            switch outcome {
            case .more: if consumed == 0 || rest.isEmpty { return false }
            case .close: ending = "close"
            case .startTLS: require(false, "TLS begins where there is none")
            case .transmission(let session):
                require(
                    session.contexts.allSatisfy { Int($0) < session.export.contexts.count }, "a context without a name")
                ending = "transmission \(session.export.name) \(session.mode) \(session.contexts)"
            }
            if case .more = outcome { continue }
            return true
        }
    }
}
