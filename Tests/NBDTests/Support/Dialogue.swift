// The handshake state machine without I/O, driven with bytes as a connection drives it.
import Block
import LinuxIO
import NBD

/// One handshake, its input so far not taken, and everything it said.
struct Dialogue {
    private var handshake: ServerHandshake
    private var waiting: [UInt8] = []
    /// What the server has sent.
    var output: [UInt8] = []
    /// How it ended; nil while it goes on.
    var end: End?

    enum End: Equatable {
        case closed
        case startTLS
        case transmission(export: String, mode: HeaderMode, contexts: [UInt32])
    }

    init(_ exports: [Export], peer: Peer = .inherited, flags: UInt32? = 3, tls: TLSPolicy = .off) {
        handshake = ServerHandshake(directory: TestDirectory(exports), client: Credentials(peer: peer), tls: tls)
        if let flags { feed(flags.wire) }
    }

    /// Hands over bytes as they arrive. After the end, bytes stay where they are.
    mutating func feed(_ bytes: [UInt8]) {
        waiting += bytes
        while end == nil {
            let before = output.count
            let (consumed, outcome) = waiting.withUnsafeBytes { handshake.receive($0, into: &output) }
            waiting.removeFirst(consumed)
            switch outcome {
            case .more: break
            case .close: end = .closed
            case .startTLS: end = .startTLS
            case .transmission(let session):
                end = .transmission(export: session.export.name, mode: session.mode, contexts: session.contexts)
            }
            if consumed == 0 && output.count == before { return }
        }
    }

    /// Goes on as after a TLS handshake.
    mutating func secure(_ identity: TLSIdentity) {
        handshake.secured(identity)
        end = nil
    }

    /// Bytes that the handshake has not taken.
    var untaken: [UInt8] { waiting }

    /// Sends an option and returns the new replies.
    mutating func ask(_ option: UInt32, _ payload: [UInt8] = []) -> [OptionAnswer] {
        let before = output.count
        feed(TestClient.option(option, payload))
        return Self.answers(Array(output[before...]), to: option)
    }

    /// The replies in a row of bytes; one that is malformed has type 0.
    static func answers(_ bytes: [UInt8], to option: UInt32) -> [OptionAnswer] {
        var answers: [OptionAnswer] = []
        var rest = bytes[...]
        while !rest.isEmpty {
            let header = Array(rest.prefix(20))
            let length = Int(header.number(16, as: UInt32.self))
            guard header.count == 20, header.number(0) == NBD.optionReplyMagic, header.number(8) == option,
                rest.count >= 20 + length
            else { return answers + [OptionAnswer(type: 0, payload: Array(rest))] }
            answers.append(OptionAnswer(type: header.number(12), payload: Array(rest.dropFirst(20).prefix(length))))
            rest = rest.dropFirst(20 + length)
        }
        return answers
    }

    /// The types of the replies to an option.
    mutating func types(_ option: UInt32, _ payload: [UInt8] = []) -> [UInt32] { ask(option, payload).map(\.type) }
}

/// A read-only export of a size under a name.
func patternExport(
    _ name: String, size: UInt64 = 1 << 20, description: String = "", allow: [AllowRule] = [], bitmaps: [String] = []
) throws -> Export {
    var options = ExportOptions()
    options.allow = allow
    let device = ScriptedDevice(
        [],
        configure: {
            $0.size = size
            $0.isReadOnly = true
            $0.minimumBlock = 512
            $0.dirtyBitmaps = bitmaps
        })
    return try Export(name: name, description: description, device: device, options: options)
}
