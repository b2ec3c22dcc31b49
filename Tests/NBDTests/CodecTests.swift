// Requests and replies against bytes written from the protocol's document, both ways, and cut at every length.
import Block
import NBD
import Testing

@Suite struct CodecTests {
    struct RequestCase: Sendable, CustomTestStringConvertible {
        let name: String
        let mode: HeaderMode
        let request: Request
        let bytes: [UInt8]
        var testDescription: String { name }
    }

    static let requests = [
        RequestCase(
            name: "read", mode: .simple,
            request: Request(NBD.Command.read, cookie: 0x0102_0304_0506_0708, offset: 0x1000, length: 0x200),
            bytes: [
                0x25, 0x60, 0x95, 0x13, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 2, 0,
            ]),
        RequestCase(
            name: "write with FUA, largest numbers", mode: .structured,
            request: Request(NBD.Command.write, flags: .fua, cookie: .max, offset: .max, length: 0xFFFF_FFFF),
            bytes: [0x25, 0x60, 0x95, 0x13, 0, 1, 0, 1] + [UInt8](repeating: 0xFF, count: 20)),
        RequestCase(
            name: "block status with a payload, extended", mode: .extended,
            request: Request(
                NBD.Command.blockStatus, flags: [.payloadLength, .requestOne], cookie: 9, offset: 1 << 40, length: 12),
            bytes: [
                0x21, 0xE4, 0x1C, 0x71, 0, 0x28, 0, 7, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                0,
                12,
            ]),
        RequestCase(
            name: "zeroes of 2^63, extended", mode: .extended,
            request: Request(
                NBD.Command.writeZeroes, flags: [.fastZero, .noHole], cookie: 1, offset: 0, length: 1 << 63),
            bytes: [0x21, 0xE4, 0x1C, 0x71, 0, 0x12, 0, 6, 0, 0, 0, 0, 0, 0, 0, 1] + [UInt8](repeating: 0, count: 8)
                + [0x80, 0, 0, 0, 0, 0, 0, 0]),
    ]

    @Test(arguments: requests) func `a request is its bytes and the bytes are the request`(_ known: RequestCase) {
        var encoded: [UInt8] = []
        known.request.encode(known.mode, into: &encoded)
        #expect(encoded == known.bytes)
        #expect(encoded.count == known.mode.requestSize)
        #expect(known.bytes.withUnsafeBytes { Request($0, known.mode) } == known.request)
    }

    @Test(arguments: requests) func `a request with any other magic is none`(_ known: RequestCase) {
        for index in 0..<4 {
            var wrong = known.bytes
            wrong[index] ^= 1
            #expect(wrong.withUnsafeBytes { Request($0, known.mode) } == nil)
        }
        let other: HeaderMode = known.mode == .extended ? .structured : .extended
        let padded = known.bytes + [0, 0, 0, 0]
        #expect(padded.withUnsafeBytes { Request($0, other) } == nil)
    }

    @Test func `only writes and flagged extended requests have a payload`() {
        let write = Request(NBD.Command.write, cookie: 1, length: 5)
        let flagged = Request(NBD.Command.read, flags: .payloadLength, cookie: 1, length: 5)
        for mode in [HeaderMode.simple, .structured, .extended] { #expect(write.payloadLength(mode) == 5) }
        #expect(flagged.payloadLength(.structured) == 0)
        #expect(flagged.payloadLength(.extended) == 5)
        #expect(Request(NBD.Command.trim, cookie: 1, length: 5).payloadLength(.extended) == 0)
    }

    struct ReplyCase: Sendable, CustomTestStringConvertible {
        let name: String
        let mode: HeaderMode
        let header: ReplyHeader
        let bytes: [UInt8]
        var testDescription: String { name }
    }

    static let simpleError: ReplyHeader = {
        var header = ReplyHeader(flags: 1, type: 0, cookie: 0x0A0B, offset: 0, length: 0)
        header.error = 28
        return header
    }()

    static let replies = [
        ReplyCase(
            name: "simple, out of space", mode: .simple, header: simpleError,
            bytes: [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 28, 0, 0, 0, 0, 0, 0, 0x0A, 0x0B]),
        ReplyCase(
            name: "structured data, done", mode: .structured,
            header: ReplyHeader(flags: 1, type: NBD.Chunk.offsetData, cookie: 3, offset: 0, length: 0x0102_0304),
            bytes: [0x66, 0x8E, 0x33, 0xEF, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 3, 1, 2, 3, 4]),
        ReplyCase(
            name: "extended error with offset", mode: .extended,
            header: ReplyHeader(flags: 0, type: NBD.Chunk.errorOffset, cookie: 4, offset: 5, length: 1 << 32),
            bytes: [
                0x6E, 0x8A, 0x27, 0x8C, 0, 0, 0x80, 2, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 1, 0, 0,
                0, 0,
            ]),
    ]

    @Test(arguments: replies) func `a reply header is its bytes and the bytes are the header`(_ known: ReplyCase) {
        var stored = [UInt8](repeating: 0xAA, count: known.mode.replySize)
        stored.withUnsafeMutableBytes {
            if known.mode == .simple {
                ReplyHeader.storeSimple(error: known.header.error, cookie: known.header.cookie, into: $0)
            } else {
                known.header.store(known.mode, into: $0)
            }
        }
        #expect(stored == known.bytes)
        #expect(known.bytes.withUnsafeBytes { ReplyHeader($0) } == known.header)
    }

    @Test(arguments: replies) func `a reply header cut at any length, or with another magic, is none`(
        _ known: ReplyCase
    ) {
        for count in 0..<known.bytes.count {
            #expect(known.bytes[..<count].withUnsafeBytes { ReplyHeader($0) } == nil, "\(count) bytes")
        }
        for index in 0..<4 {
            var wrong = known.bytes
            wrong[index] ^= 0x40
            #expect(wrong.withUnsafeBytes { ReplyHeader($0) } == nil)
        }
    }

    @Test(
        arguments: [
            (BlockError.Kind.inputOutput, UInt32(5)), (.corrupt, 5), (.notFound, 5), (.noSpace, 28), (.readOnly, 1),
            (.denied, 1), (.outOfRange, 22), (.invalid, 22), (.unsupported, 95), (.tooLarge, 75), (.noMemory, 12),
            (.shutdown, 108),
        ])
    func `every kind of error has the value that the protocol gives it`(_ kind: BlockError.Kind, _ value: UInt32) {
        #expect(kind.errorValue == value)
    }

    @Test func `contexts are listed by name, by namespace and by bitmap prefix`() {
        var info = DeviceInfo(size: 1, format: "raw", name: "x")
        info.dirtyBitmaps = ["one", "two:three"]
        let contexts = MetaContext.contexts(of: info)
        func listed(_ query: String) -> [String] { contexts.filter { $0.isListed(by: query) }.map(\.name) }
        let bitmaps = ["qemu:dirty-bitmap:one", "qemu:dirty-bitmap:two:three"]
        #expect(contexts.map(\.name) == ["base:allocation", "qemu:allocation-depth"] + bitmaps)
        #expect(listed("base:") == ["base:allocation"])
        #expect(listed("qemu:") == ["qemu:allocation-depth"] + bitmaps)
        #expect(listed("qemu:dirty-bitmap:") == bitmaps)
        #expect(listed("qemu:dirty-bitmap:two:three") == [bitmaps[1]])
        for query in ["", ":", "base", "base:alloc", "BASE:", "qemu:dirty-bitmap:t", "qemu:dirty-bitmap:two:", "x:"] {
            #expect(listed(query).isEmpty, "\(query)")
        }
    }
}
