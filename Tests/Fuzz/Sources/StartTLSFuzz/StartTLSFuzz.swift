// Fuzzes the way into TLS: before it nothing is told that needs it; nothing that was said before it holds behind it.
import Block
import FuzzSupport
import LinuxIO
import NBD

@main
struct StartTLSFuzz {
    /// Names that are in no message of the server but as names; the second is for one key only.
    private static let names = ["export-for-everybody", "export-for-one-key", "", "nobody"]
    private static let hidden = names[1]

    static func main() throws {
        let exports = try FixedExports(makeExports())
        fuzz { input in
            var choices = Choices(input)
            let shape = choices.byte()
            let policy = TLSPolicy.allCases[Int(shape & 3) % TLSPolicy.allCases.count]
            let split = choices.number()
            var first = Choices(choices.take(split))
            var second = Choices(choices.rest())
            var before = shape & 4 != 0 ? framedOptions(&first, names: names) : Array(first.rest())
            let after =
                shape & 8 != 0 ? framedOptions(&second, names: names, flagged: false) : Array(second.rest())
            if shape & 16 != 0 { before += option(NBD.Option.startTLS) }
            let hasKey = shape & 32 != 0
            check(exports, policy, before, after, hasKey: hasKey)
        }
    }

    private static func makeExports() throws -> [Export] {
        let stub = StubDevice(size: 1 << 40, isReadOnly: false, bitmaps: ["monday"])
        var guarded = ExportOptions()
        guarded.allow = [try AllowRule("psk=backup")]
        return try [
            Export(name: names[0], description: "for everybody", device: stub),
            Export(name: hidden, device: stub, options: guarded),
        ]
    }

    private static func option(_ kind: UInt32) -> [UInt8] {
        var bytes: [UInt8] = []
        bytes.appendBigEndian(NBD.optionMagic)
        bytes.appendBigEndian(kind)
        bytes.appendBigEndian(UInt32(0))
        return bytes
    }

    private static func identity(hasKey: Bool) -> TLSIdentity {
        TLSIdentity(
            pskIdentity: hasKey ? "backup" : "mirror", version: "TLSv1.3", cipher: "TLS_AES_128_GCM_SHA256")
    }

    private static func check(
        _ exports: FixedExports, _ policy: TLSPolicy, _ before: [UInt8], _ after: [UInt8], hasKey: Bool
    ) {
        var conversation = Conversation(exports, policy)
        conversation.hear(before)
        let clear = conversation.output
        require(!contains(clear, hidden), "an export that needs a key is told of in clear text")
        if policy == .require {
            for name in names where !name.isEmpty {
                require(!contains(clear, name), "an export is told of in clear text")
            }
            checkRefusals(clear)
            require(conversation.session == nil, "a session begins in clear text")
        }
        guard conversation.startsTLS else { return }
        require(policy != .off, "TLS begins where there is none")
        require(conversation.rest == 0, "TLS begins with bytes that were sent in clear text")
        conversation.secure(identity(hasKey: hasKey))
        conversation.hear(after)
        let secret = Array(conversation.output[clear.count...])
        require(!conversation.startsTLS, "TLS begins inside of TLS")
        require(hasKey || !contains(secret, hidden), "an export is told of to a client without its key")
        // The number of options is all that is counted on, and the flags are said only once.
        guard before.count + after.count < 16 * (ServerHandshake.optionCountMax - 1) else { return }
        var fresh = Conversation(exports, policy)
        fresh.hear(Array(before.prefix(4)) + option(NBD.Option.startTLS))
        require(fresh.startsTLS, "TLS does not begin")
        let start = fresh.output.count
        fresh.secure(identity(hasKey: hasKey))
        fresh.hear(after)
        require(secret.elementsEqual(fresh.output[start...]), "what was said before TLS changes answers behind it")
        require(conversation.session == fresh.session, "what was said before TLS changes the session")
        require(conversation.hasEnded == fresh.hasEnded, "what was said before TLS changes the end")
    }

    /// Before TLS, where it is required, every option is refused, but for the two that are about that.
    private static func checkRefusals(_ output: [UInt8]) {
        output.withUnsafeBytes { output in
            var position = 0
            while output.count - position >= 20 {
                require(output.bigEndian(position) == NBD.optionReplyMagic, "no reply to an option")
                let kind = output.bigEndian(position + 8, as: UInt32.self)
                let type = output.bigEndian(position + 12, as: UInt32.self)
                let isAboutTLS = kind == NBD.Option.startTLS || kind == NBD.Option.abort
                switch type {
                case NBD.OptionReply.errorTLSRequired: require(!isAboutTLS, "TLS is required for \(kind)")
                case NBD.OptionReply.ack: require(isAboutTLS, "\(kind) is done in clear text")
                case NBD.OptionReply.errorInvalid: require(kind == NBD.Option.startTLS, "\(kind) is looked at")
                case NBD.OptionReply.errorTooBig: break
                default: require(false, "\(kind) is answered with \(type) in clear text")
                }
                position += 20 + Int(output.bigEndian(position + 16, as: UInt32.self))
            }
            require(position == output.count, "\(output.count - position) bytes follow the last reply")
        }
    }

    private static func contains(_ output: [UInt8], _ name: String) -> Bool {
        let wanted = Array(name.utf8)
        guard output.count >= wanted.count else { return false }
        return (0...(output.count - wanted.count)).contains { start in
            output[start] == wanted[0] && output[start..<(start + wanted.count)].elementsEqual(wanted)
        }
    }
}

/// One client's handshake, as far as it has come.
private struct Conversation {
    /// What a session is, in words.
    private(set) var session: String?
    private(set) var output: [UInt8] = []
    private(set) var startsTLS = false
    private(set) var hasEnded = false
    /// Bytes that were not taken when it stopped.
    private(set) var rest = 0
    private var handshake: ServerHandshake

    init(_ exports: FixedExports, _ policy: TLSPolicy) {
        handshake = ServerHandshake(directory: exports, client: Credentials(peer: .inherited), tls: policy)
    }

    mutating func secure(_ identity: TLSIdentity) {
        handshake.secured(identity)
        startsTLS = false
    }

    /// Gives bytes at once, and again what was not taken while some is, as the server does.
    mutating func hear(_ bytes: [UInt8]) {
        var left = bytes[...]
        while true {
            var replies: [UInt8] = []
            let (consumed, outcome) = left.withUnsafeBytes { handshake.receive($0, into: &replies) }
            require(consumed >= 0 && consumed <= left.count, "more was taken than given")
            output += replies
            left = left.dropFirst(consumed)
            rest = left.count
            switch outcome {
            case .more: if consumed == 0 || left.isEmpty { return }
            case .close: return hasEnded = true
            case .startTLS: return startsTLS = true
            case .transmission(let agreed):
                session = "\(agreed.export.name) \(agreed.mode) \(agreed.contexts) \(agreed.isReadOnly)"
                return
            }
        }
    }
}
