// The client's handshake, driven with bytes as a server sends them: what it asks, and what it does not believe.
import Block
import NBD
import Testing

private typealias Rep = NBD.OptionReply
private typealias Opt = NBD.Option

/// One handshake and what it has sent.
private struct Talk {
    var handshake: ClientHandshake
    var waiting: [UInt8] = []
    var output: [UInt8] = []
    var outcome = ClientHandshake.Outcome.more

    init(_ goal: ClientHandshake.Goal = .enter(export: "disk", contexts: nil), usesTLS: Bool = false) {
        handshake = ClientHandshake(goal, usesTLS: usesTLS)
    }

    /// Bytes of the server, in pieces of a size.
    mutating func hear(_ bytes: [UInt8], by size: Int = .max) throws {
        var rest = bytes[...]
        repeat {
            waiting += rest.prefix(size)
            rest = rest.dropFirst(size)
            let (taken, outcome) = try waiting.withUnsafeBytes { raw in
                try handshake.receive(raw, into: &output)
            }
            waiting.removeFirst(taken)
            self.outcome = outcome
        } while !rest.isEmpty
    }

    /// The options sent so far, without the flags in front.
    var options: [UInt32] {
        var options: [UInt32] = []
        var position = 4
        while output.count - position >= 16 {
            options.append(output.number(position + 8))
            position += 16 + Int(output.number(position + 12, as: UInt32.self))
        }
        return options
    }
}

private func greeting(_ flags: UInt16 = 3) -> [UInt8] { bytes(NBD.initMagic, NBD.optionMagic, flags) }

private func reply(_ option: UInt32, _ type: UInt32, _ payload: [UInt8] = []) -> [UInt8] {
    bytes(NBD.optionReplyMagic, option, type, UInt32(payload.count), payload)
}

private func exportInfo(_ size: UInt64 = 1 << 20, _ flags: UInt16 = 0x3) -> [UInt8] {
    reply(Opt.go, Rep.info, bytes(NBD.Info.export, size, flags))
}

private func sizes(_ minimum: UInt32, _ preferred: UInt32, _ maximum: UInt32) -> [UInt8] {
    reply(Opt.go, Rep.info, bytes(NBD.Info.blockSize, minimum, preferred, maximum))
}

private func context(_ option: UInt32, _ id: UInt32, _ name: String) -> [UInt8] {
    reply(option, Rep.metaContext, bytes(id, name))
}

/// Everything a server says that has structured replies and two contexts.
private let wholeStory: [UInt8] =
    greeting() + reply(Opt.extendedHeaders, Rep.errorUnsupported, bytes("not here"))
    + reply(Opt.structuredReply, Rep.ack)
    + context(Opt.listMetaContext, 0, "base:allocation") + context(Opt.listMetaContext, 0, "qemu:dirty-bitmap:b")
    + reply(Opt.listMetaContext, Rep.ack)
    + context(Opt.setMetaContext, 7, "base:allocation") + context(Opt.setMetaContext, 9, "qemu:dirty-bitmap:b")
    + reply(Opt.setMetaContext, Rep.ack)
    + exportInfo(5 << 30, 0x10d) + sizes(512, 4096, 1 << 20)
    + reply(Opt.go, Rep.info, bytes(NBD.Info.description, "a \u{1b}[2Jdisk")) + reply(Opt.go, Rep.ack)

/// What a handshake does not believe, with a word of what it says.
private func expectDisbelief(_ story: [UInt8], _ word: String, usesTLS: Bool = false) {
    var talk = Talk(usesTLS: usesTLS)
    let error = #expect(throws: BlockError.self) { try talk.hear(story) }
    #expect(error?.message.contains(word) == true, "\(error?.message ?? "nothing")")
}

@Suite struct ClientHandshakeTests {
    @Test(arguments: [1, 2, 7, 19, 21, 100, Int.max])
    func `the outcome does not depend on how bytes arrive`(size: Int) throws {
        var talk = Talk()
        try talk.hear(wholeStory, by: size)
        guard case .ready(let agreement) = talk.outcome else {
            Issue.record("\(talk.outcome)")
            return
        }
        #expect(agreement.size == 5 << 30 && agreement.mode == .structured)
        #expect(agreement.flags.contains(.canMultiConn) && !agreement.flags.contains(.readOnly))
        #expect(agreement.contexts.map(\.name) == ["base:allocation", "qemu:dirty-bitmap:b"])
        #expect(agreement.contexts.map(\.id) == [7, 9])
        #expect(agreement.blockSizes.minimum == 512 && agreement.blockSizes.maximum == 1 << 20)
        #expect(agreement.exportDescription == "a ?[2Jdisk")
        #expect(
            talk.options == [
                Opt.extendedHeaders, Opt.structuredReply, Opt.listMetaContext, Opt.setMetaContext, Opt.go,
            ])
    }

    @Test func `cut off at any byte, it waits for more and takes nothing for granted`() throws {
        for count in 0..<wholeStory.count {
            var talk = Talk()
            try talk.hear(Array(wholeStory[..<count]))
            #expect(talk.outcome == .more, "\(count)")
        }
    }

    @Test func `extended headers are taken where they are`() throws {
        var talk = Talk()
        try talk.hear(
            greeting() + reply(Opt.extendedHeaders, Rep.ack) + reply(Opt.listMetaContext, Rep.ack) + exportInfo()
                + reply(Opt.go, Rep.ack))
        guard case .ready(let agreement) = talk.outcome else { throw Violation("\(talk.outcome)") }
        #expect(agreement.mode == .extended && agreement.contexts.isEmpty)
    }

    @Test(arguments: [UInt16(1), 3]) func `an old server is asked by EXPORT_NAME`(flags: UInt16) throws {
        var talk = Talk()
        let start =
            greeting(flags) + reply(Opt.extendedHeaders, Rep.errorUnsupported)
            + reply(Opt.structuredReply, Rep.errorUnsupported) + reply(Opt.go, Rep.errorUnsupported)
        try talk.hear(start + bytes(UInt64(4096), UInt16(3)))
        if flags & 2 == 0 {
            #expect(talk.outcome == .more)
            try talk.hear([UInt8](repeating: 0, count: 124))
        }
        guard case .ready(let agreement) = talk.outcome else { throw Violation("\(talk.outcome)") }
        #expect(agreement.size == 4096 && agreement.mode == .simple)
        #expect(talk.options.last == Opt.exportName)
    }

    @Test func `a list is taken whole, with names as they are`() throws {
        var talk = Talk(.list)
        let entry = { (name: String, text: String) in
            reply(Opt.list, Rep.server, bytes(UInt32(name.utf8.count), name, text))
        }
        try talk.hear(
            greeting() + entry("a", "first\nsecond") + entry("", "") + entry("ü", "x") + reply(Opt.list, Rep.ack), by: 3
        )
        guard case .listed(let listings) = talk.outcome else { throw Violation("\(talk.outcome)") }
        #expect(listings.map(\.name) == ["a", "", "ü"])
        #expect(listings.first?.exportDescription == "first?second")
        #expect(talk.options == [Opt.list, Opt.abort])
    }

    // MARK: - TLS

    @Test func `nothing but STARTTLS is said in clear text, and nothing before it survives`() throws {
        var talk = Talk(usesTLS: true)
        try talk.hear(greeting())
        #expect(talk.options == [Opt.startTLS])
        try talk.hear(reply(Opt.startTLS, Rep.ack))
        #expect(talk.outcome == .startTLS)
        talk.handshake.tlsStarted(into: &talk.output)
        #expect(talk.options == [Opt.startTLS, Opt.extendedHeaders])
        try talk.hear(reply(Opt.extendedHeaders, Rep.errorUnsupported))
        #expect(talk.outcome == .more)
    }

    @Test func `CVE-2021-3716: bytes glued behind STARTTLS are an error`() {
        for glued in [[UInt8(0)], reply(Opt.extendedHeaders, Rep.ack), wholeStory] {
            expectDisbelief(greeting() + reply(Opt.startTLS, Rep.ack) + glued, "nobody asked", usesTLS: true)
        }
    }

    @Test(arguments: [Rep.errorUnsupported, Rep.errorPolicy, Rep.errorInvalid, Rep.errorPlatform])
    func `CVE-2019-14842: a server without TLS is never talked to in clear text`(type: UInt32) {
        expectDisbelief(greeting() + reply(Opt.startTLS, type, bytes("no")), "no TLS", usesTLS: true)
    }

    @Test func `a server that wants TLS says how to get in`() {
        expectDisbelief(greeting() + reply(Opt.extendedHeaders, Rep.errorTLSRequired), "nbds")
    }

    // MARK: - Lies

    @Test func `what is no NBD server is told so`() {
        expectDisbelief(bytes("HTTP/1.1 400 Bad Request\r\n"), "no NBD server")
        expectDisbelief(bytes(NBD.initMagic, UInt64(0x0000_4202_8186_1253), UInt64(1)), "oldstyle")
        expectDisbelief(greeting(0), "newstyle")
        expectDisbelief(bytes(NBD.initMagic, UInt64(1)), "no NBD server")
    }

    @Test func `replies must belong to what was asked`() {
        let unsupported = greeting()
        expectDisbelief(unsupported + bytes(UInt64(1), UInt64(1), UInt32(0)), "magic")
        expectDisbelief(unsupported + reply(Opt.go, Rep.ack), "answered option")
        expectDisbelief(unsupported + reply(Opt.extendedHeaders, Rep.info, [0, 0]), "makes no sense")
        expectDisbelief(unsupported + reply(Opt.extendedHeaders, Rep.ack, [0]), "bytes behind")
        expectDisbelief(wholeStory + [0], "nobody asked")
    }

    @Test(arguments: [ClientHandshake.replyLengthMax + 1, 1 << 31, .max])
    func `CVE-2017-15119: long replies are not waited for`(length: UInt32) {
        expectDisbelief(
            greeting() + bytes(NBD.optionReplyMagic, Opt.extendedHeaders, Rep.errorUnsupported, length), "too long")
    }

    @Test func `endless replies end`() {
        let start = greeting() + reply(Opt.extendedHeaders, Rep.ack)
        let endless = (0...1024).flatMap { context(Opt.listMetaContext, 0, "base:\($0)") }
        expectDisbelief(start + endless, "more than")
        var talk = Talk(.list)
        let entry = reply(Opt.list, Rep.server, bytes(UInt32(0)))
        let error = #expect(throws: BlockError.self) {
            try talk.hear(greeting())
            for _ in 0...11_000 { try talk.hear(entry) }
        }
        #expect(error?.message.contains("more than") == true)
    }

    @Test func `CVE-2023-5215: a size that no disk has is refused`() {
        let start = greeting() + reply(Opt.extendedHeaders, Rep.ack) + reply(Opt.listMetaContext, Rep.ack)
        for size: UInt64 in [1 << 63, .max] { expectDisbelief(start + exportInfo(size), "no disk has") }
        expectDisbelief(start + exportInfo() + exportInfo(), "twice")
        expectDisbelief(start + reply(Opt.go, Rep.ack), "without telling its size")
        expectDisbelief(start + reply(Opt.go, Rep.info, [0]), "empty")
        expectDisbelief(start + reply(Opt.go, Rep.info, bytes(NBD.Info.export, UInt64(1))), "malformed")
    }

    @Test(arguments: [
        (0, 4096, 1 << 20), (3, 4096, 1 << 20), (1 << 17, 1 << 17, 1 << 20), (512, 256, 1 << 20), (1, 100, 1 << 20),
        (4096, 512, 1 << 20), (512, 4096, 1000), (512, 4096, 4097), (512, 4096, 0), (1, 0, 0),
    ])
    func `impossible block sizes are refused`(minimum: Int, preferred: Int, maximum: Int) {
        expectDisbelief(
            greeting() + reply(Opt.extendedHeaders, Rep.ack) + reply(Opt.listMetaContext, Rep.ack)
                + sizes(UInt32(minimum), UInt32(preferred), UInt32(maximum)), "impossible block sizes")
    }

    @Test func `a preferred block size is bounded like every request`() throws {
        var talk = Talk()
        try talk.hear(
            greeting() + reply(Opt.extendedHeaders, Rep.ack) + reply(Opt.listMetaContext, Rep.ack)
                + sizes(1, 1 << 31, .max) + exportInfo() + reply(Opt.go, Rep.ack))
        guard case .ready(let agreement) = talk.outcome else { throw Violation("\(talk.outcome)") }
        #expect(agreement.blockSizes.preferred == 32 << 20 && agreement.blockSizes.maximum == 32 << 20)
    }

    @Test func `contexts are those that were asked for, each once, with a number of its own`() {
        let start =
            greeting() + reply(Opt.extendedHeaders, Rep.ack) + context(Opt.listMetaContext, 0, "base:allocation")
            + context(Opt.listMetaContext, 0, "qemu:allocation-depth") + reply(Opt.listMetaContext, Rep.ack)
        expectDisbelief(start + context(Opt.setMetaContext, 1, "x:y"), "nobody asked")
        let one = context(Opt.setMetaContext, 1, "base:allocation")
        expectDisbelief(start + one + one, "twice")
        expectDisbelief(start + one + context(Opt.setMetaContext, 1, "qemu:allocation-depth"), "same number")
        expectDisbelief(start + reply(Opt.setMetaContext, Rep.metaContext, bytes(UInt32(1))), "no name")
    }

    @Test func `no more contexts are asked for than servers give`() throws {
        var talk = Talk()
        let names = ["base:allocation"] + (0..<100).map { "qemu:dirty-bitmap:\($0)" }
        try talk.hear(
            greeting() + reply(Opt.extendedHeaders, Rep.ack)
                + names.flatMap { context(Opt.listMetaContext, 0, $0) } + reply(Opt.listMetaContext, Rep.ack))
        func isLast(_ payload: [UInt8]) -> Bool { Array(talk.output.suffix(payload.count)) == payload }
        #expect(isLast(Payload.contexts("disk", Array(names.prefix(16)))))
        // A server that gives fewer is asked for the one that matters most.
        try talk.hear(reply(Opt.setMetaContext, Rep.errorTooBig))
        #expect(isLast(Payload.contexts("disk", ["base:allocation"])))
    }

    @Test func `a server's text is cleaned and cut before anybody reads it`() {
        let text = "\u{1b}]0;x\u{7}\r\n" + String(repeating: "y", count: 4000)
        var talk = Talk()
        let error = #expect(throws: BlockError.self) {
            try talk.hear(
                greeting() + reply(Opt.extendedHeaders, Rep.ack) + reply(Opt.listMetaContext, Rep.errorUnknown)
                    + reply(Opt.go, Rep.errorUnknown, bytes(text)))
        }
        #expect(error?.kind == .notFound)
        let isClean = error?.message.unicodeScalars.allSatisfy { $0.value >= 32 && $0.value != 127 }
        #expect(isClean == true && (error?.message.count ?? .max) < 500)
    }
}
