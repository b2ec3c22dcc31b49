// What a server sends to the fuzzed client: an honest handshake, and replies that are framed right and say anything.
import Block
import FuzzSupport
import NBD

/// Bytes of servers.
enum ServerBytes {
    /// The number of base:allocation.
    static let contextID: UInt32 = 7
    /// Bytes on the export.
    static let size: UInt64 = 1 << 20

    /// The disk's byte at an offset: never one that a buffer holds before.
    static func byte(_ offset: UInt64) -> UInt8 { UInt8(truncatingIfNeeded: offset & 0x7F) }

    private static func reply(_ option: UInt32, _ type: UInt32, _ payload: [UInt8] = []) -> [UInt8] {
        var bytes: [UInt8] = []
        bytes.appendBigEndian(NBD.optionReplyMagic)
        bytes.appendBigEndian(option)
        bytes.appendBigEndian(type)
        bytes.appendBigEndian(UInt32(payload.count))
        return bytes + payload
    }

    /// Everything from the greeting to the agreement.
    static func handshake(_ mode: HeaderMode) -> [UInt8] {
        var bytes: [UInt8] = []
        bytes.appendBigEndian(NBD.initMagic)
        bytes.appendBigEndian(NBD.optionMagic)
        bytes.appendBigEndian(UInt16(3))
        let (ack, no) = (NBD.OptionReply.ack, NBD.OptionReply.errorUnsupported)
        bytes += reply(NBD.Option.extendedHeaders, mode == .extended ? ack : no)
        if mode != .extended { bytes += reply(NBD.Option.structuredReply, mode == .structured ? ack : no) }
        if mode != .simple {
            var context: [UInt8] = []
            context.appendBigEndian(contextID)
            context += "base:allocation".utf8
            for option in [NBD.Option.listMetaContext, NBD.Option.setMetaContext] {
                bytes += reply(option, NBD.OptionReply.metaContext, context) + reply(option, ack)
            }
        }
        var export: [UInt8] = []
        export.appendBigEndian(NBD.Info.export)
        export.appendBigEndian(size)
        export.appendBigEndian(UInt16(0x4D))
        return bytes + reply(NBD.Option.go, NBD.OptionReply.info, export) + reply(NBD.Option.go, ack)
    }

    /// Replies from short records: which request, kind, where, how much; and whether every payload is as long as its
    /// header says, so that no header can be taken for data.
    static func replies(_ choices: inout Choices, _ mode: HeaderMode) -> (bytes: [UInt8], areWhole: Bool) {
        // The requests that the client sends, in order; each one's cookie follows from its number.
        let requests: [(offset: UInt64, length: UInt64)] = [
            (0, 512), (4096, 4096), (70_000, 1), (8192, 512), (0, 4096), (4096, 8192),
        ]
        var bytes: [UInt8] = []
        var areWhole = true
        while !choices.isEmpty && bytes.count < 90_000 {
            let bits = choices.byte()
            let index = Int(bits & 7)
            let request = index < requests.count ? requests[index] : (offset: 0, length: 1)
            let cookie = (UInt64(index) + 2) << 6 | UInt64(index)
            let kind = choices.byte()
            let from = UInt64(choices.number()) % (request.length + 2)
            let wanted = choices.number()
            let length = wanted == 0 ? request.length - min(from, request.length) : UInt64(wanted) % 5000
            if mode == .simple || kind & 0xF == 15 {
                bytes += simple(cookie, kind, request, length)
                areWhole = areWhole && length == request.length
                continue
            }
            let isWhole = kind & 0xF0 != 0xF0
            areWhole = areWhole && isWhole
            let (type, payload) = chunk(kind, request.offset &+ from, length, mode, &choices)
            let header = ReplyHeader(
                flags: bits & 8 != 0 ? NBD.Chunk.flagDone : 0, type: type, cookie: cookie,
                offset: bits & 0x80 != 0 ? from : request.offset,
                length: UInt64(payload.count) &+ (isWhole ? 0 : UInt64(wanted)))
            var head = [UInt8](repeating: 0, count: mode.replySize)
            head.withUnsafeMutableBytes { header.store(mode, into: $0) }
            bytes += head + payload
        }
        return (bytes, areWhole)
    }

    private static func simple(
        _ cookie: UInt64, _ kind: UInt8, _ request: (offset: UInt64, length: UInt64), _ length: UInt64
    ) -> [UInt8] {
        var bytes: [UInt8] = []
        bytes.appendBigEndian(NBD.simpleReplyMagic)
        bytes.appendBigEndian(UInt32(kind & 0x70 == 0x70 ? kind : 0))
        bytes.appendBigEndian(cookie)
        return bytes + (0..<length).map { byte(request.offset + $0) }
    }

    private static func chunk(
        _ kind: UInt8, _ offset: UInt64, _ length: UInt64, _ mode: HeaderMode, _ choices: inout Choices
    ) -> (UInt16, [UInt8]) {
        var payload: [UInt8] = []
        switch kind & 7 {
        case 0, 1:
            payload.appendBigEndian(offset)
            payload += (0..<length).map { byte(offset &+ $0) }
            return (NBD.Chunk.offsetData, payload)
        case 2:
            payload.appendBigEndian(offset)
            payload.appendBigEndian(UInt32(truncatingIfNeeded: length))
            return (NBD.Chunk.offsetHole, payload)
        case 3: return (NBD.Chunk.none, kind & 8 != 0 ? [0] : [])
        case 4, 5:
            payload.appendBigEndian(kind & 0x20 != 0 ? UInt32(kind) : contextID)
            let count = Int(choices.byte() & 7)
            if mode == .extended { payload.appendBigEndian(UInt32(count)) }
            for _ in 0..<count {
                let run = choices.number()
                if mode == .extended {
                    payload.appendBigEndian(kind & 0x40 != 0 ? UInt64(run) << 48 : UInt64(run))
                    payload.appendBigEndian(UInt64(choices.byte()))
                } else {
                    payload.appendBigEndian(UInt32(run))
                    payload.appendBigEndian(UInt32(choices.byte()))
                }
            }
            return (mode == .extended ? NBD.Chunk.blockStatusExtended : NBD.Chunk.blockStatus, payload)
        case 6:
            payload.appendBigEndian(UInt32(choices.byte()))
            payload.appendBigEndian(UInt16(length & 15))
            payload += repeatElement(UInt8(ascii: "x"), count: Int(length & 15))
            if kind & 8 != 0 { payload.appendBigEndian(offset) }
            return (kind & 8 != 0 ? NBD.Chunk.errorOffset : NBD.Chunk.error, payload)
        default: return (UInt16(kind) << 8, Array(choices.take(Int(length & 31))))
        }
    }
}
