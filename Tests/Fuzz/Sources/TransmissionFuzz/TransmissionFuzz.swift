// Fuzzes a whole connection: a client negotiates, sends what the input says, and every reply must be well formed, in
// its request's bounds, right, and there exactly once.
import Block
import FuzzSupport
import Glibc
import LinuxIO
import Logging
import NBD

@main
struct TransmissionFuzz {
    static func main() throws {
        let exports = try FixedExports(SampleExports.make())
        var log = Logger(label: "fuzz") { _ in SwiftLogNoOpLogHandler() }
        log.logLevel = .critical
        let server = try Server(directory: exports, log: log)
        let client = try Client()
        fuzz { input in
            var choices = Choices(input)
            let shape = Shape(&choices, exports.all)
            let script = shape.isRaw ? Array(choices.rest()) : makeRequests(&choices, shape)
            let sent = shape.handshake + script
            let ends = shape.usesPipes ? Ends.pipes() : Ends.sockets()
            client.begin(ends, sent, piece: shape.sendsPieces && sent.count < 4096 ? 1 + sent.count % 61 : sent.count)
            server.serve(input: ends.serverInput, output: ends.serverOutput)
            ends.closeServer()
            guard let received = client.finish() else { return }
            var checker = ReplyChecker(shape, requests: script)
            checker.check(received)
        }
    }
}

/// What the first bytes of an input choose: the session.
struct Shape {
    let mode: HeaderMode
    let export: Export
    let hasContexts: Bool
    /// Whether the rest of the input is sent as it is.
    let isRaw: Bool
    let usesPipes: Bool
    let sendsPieces: Bool
    /// The most bytes that the requests of a script may ask for.
    let readBudget: UInt64

    init(_ choices: inout Choices, _ exports: [Export]) {
        let bits = choices.byte()
        mode = [.simple, .structured, .extended, .extended][Int(bits & 3)]
        hasContexts = bits & 4 != 0 && mode != .simple
        usesPipes = bits & 0x10 != 0
        sendsPieces = bits & 0x20 != 0
        // Long reads are slow, so few inputs get to make them.
        readBudget = [600 << 10, 2 << 20, 600 << 10, 66 << 20][Int(bits >> 6)]
        let chosen = choices.pick(exports)
        // Scripts keep to their budget; raw bytes do not know it, so they get small disks.
        isRaw = bits & 8 != 0 && chosen.info.size <= 4 << 20
        export = chosen
    }

    /// What the client sends before its requests.
    var handshake: [UInt8] {
        var bytes: [UInt8] = []
        bytes.appendBigEndian(UInt32(NBD.HandshakeFlags.fixedNewstyle | NBD.HandshakeFlags.noZeroes))
        func option(_ kind: UInt32, _ payload: [UInt8]) {
            bytes.appendBigEndian(NBD.optionMagic)
            bytes.appendBigEndian(kind)
            bytes.appendBigEndian(UInt32(payload.count))
            bytes += payload
        }
        func string(_ text: String) -> [UInt8] {
            var bytes: [UInt8] = []
            bytes.appendBigEndian(UInt32(text.utf8.count))
            return bytes + text.utf8
        }
        if mode == .structured { option(NBD.Option.structuredReply, []) }
        if mode == .extended { option(NBD.Option.extendedHeaders, []) }
        if hasContexts {
            var payload = string(export.name)
            payload.appendBigEndian(UInt32(export.contexts.count))
            for context in export.contexts { payload += string(context.name) }
            option(NBD.Option.setMetaContext, payload)
        }
        option(NBD.Option.go, string(export.name) + [0, 0])
        return bytes
    }
}
