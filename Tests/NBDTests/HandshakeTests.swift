// The handshake without I/O: every option, in order and out of order, and what each may find.
import Block
import LinuxIO
import NBD
import Testing

private typealias Rep = NBD.OptionReply
private typealias Opt = NBD.Option

@Suite struct HandshakeTests {
    @Test func `the greeting is fixed newstyle without zeroes`() {
        #expect(
            ServerHandshake.greeting == [
                0x4E, 0x42, 0x44, 0x4D, 0x41, 0x47, 0x49, 0x43, 0x49, 0x48, 0x41, 0x56, 0x45, 0x4F, 0x50, 0x54, 0, 3,
            ])
    }

    @Test(arguments: [UInt32(0), 1, 2, 3]) func `known client flags are taken`(_ flags: UInt32) throws {
        var dialogue = Dialogue([try patternExport("")], flags: flags)
        #expect(dialogue.end == nil)
        #expect(dialogue.types(Opt.list) == [Rep.server, Rep.ack])
    }

    @Test(arguments: [UInt32(4), 0x8000_0000, 0x0001_0003, .max]) func `unknown client flags end it`(_ flags: UInt32)
        throws
    {
        #expect(Dialogue([try patternExport("")], flags: flags).end == .closed)
    }

    @Test func `an option without its magic ends it`() throws {
        var dialogue = Dialogue([try patternExport("")])
        dialogue.feed(bytes(NBD.optionMagic ^ 1, Opt.list, UInt32(0)))
        #expect(dialogue.end == .closed)
        #expect(dialogue.output.isEmpty)
    }

    // MARK: - NBD_OPT_EXPORT_NAME

    @Test(arguments: [(UInt32(3), 10), (1, 134)])
    func `EXPORT_NAME answers with size, flags and zeroes unless told not to`(_ flags: UInt32, _ count: Int) throws {
        let export = try patternExport("disk", size: 0x0102_0304_0506)
        var dialogue = Dialogue([export], flags: flags)
        dialogue.feed(TestClient.option(Opt.exportName, bytes("disk")))
        let facts = bytes(UInt64(0x0102_0304_0506), export.transmissionFlags(.simple).rawValue)
        #expect(dialogue.output == facts + [UInt8](repeating: 0, count: count - 10))
        #expect(dialogue.end == .transmission(export: "disk", mode: .simple, contexts: []))
    }

    @Test(arguments: ["other", "DISK", "disk ", ""]) func `EXPORT_NAME of an unknown name ends it`(_ name: String)
        throws
    {
        var dialogue = Dialogue([try patternExport("disk")])
        dialogue.feed(TestClient.option(Opt.exportName, bytes(name)))
        #expect(dialogue.end == .closed)
        #expect(dialogue.output.isEmpty)
    }

    @Test func `EXPORT_NAME after structured replies keeps them, after extended headers ends it`() throws {
        var structured = Dialogue([try patternExport("disk")])
        _ = structured.ask(Opt.structuredReply)
        structured.feed(TestClient.option(Opt.exportName, bytes("disk")))
        #expect(structured.end == .transmission(export: "disk", mode: .structured, contexts: []))
        var extended = Dialogue([try patternExport("disk")])
        _ = extended.ask(Opt.extendedHeaders)
        extended.feed(TestClient.option(Opt.exportName, bytes("disk")))
        #expect(extended.end == .closed)
    }

    // MARK: - NBD_OPT_INFO and NBD_OPT_GO

    @Test(arguments: [Opt.info, Opt.go]) func `INFO and GO always tell size, flags and block sizes`(_ option: UInt32)
        throws
    {
        let export = try patternExport("disk", size: 12345, description: "a text")
        var dialogue = Dialogue([export])
        let answers = dialogue.ask(option, Payload.go("disk"))
        #expect(answers.map(\.type) == [Rep.info, Rep.info, Rep.ack])
        #expect(answers[0].payload == bytes(UInt16(0), UInt64(12345), export.transmissionFlags(.simple).rawValue))
        #expect(answers[1].payload == bytes(UInt16(3), UInt32(512), UInt32(4096), UInt32(32 << 20)))
        #expect((dialogue.end != nil) == (option == Opt.go))
    }

    @Test(arguments: [
        (NBD.Info.name, bytes(UInt16(1), "disk")), (NBD.Info.description, bytes(UInt16(2), "a text")),
    ]) func `INFO tells name and description where asked`(_ kind: UInt16, _ expected: [UInt8]) throws {
        var dialogue = Dialogue([try patternExport("disk", description: "a text")])
        let answers = dialogue.ask(Opt.info, Payload.go("disk", [kind]))
        #expect(answers.contains { $0.payload == expected })
        #expect(answers.count == 4)
        let twice = dialogue.ask(Opt.info, Payload.go("disk", [kind, 0, kind, 3, 0xFFFF]))
        #expect(twice.filter { $0.payload == expected }.count == 1)
    }

    @Test func `a description that is not there is not told`() throws {
        var dialogue = Dialogue([try patternExport("disk")])
        let answers = dialogue.ask(Opt.info, Payload.go("disk", [NBD.Info.description]))
        #expect(!answers.contains { $0.payload.number(0) == NBD.Info.description })
    }

    @Test func `flags depend on the mode`() throws {
        var dialogue = Dialogue([try patternExport("")])
        func flags(_ answers: [OptionAnswer]) -> NBD.TransmissionFlags {
            .init(rawValue: answers[0].payload.number(10))
        }
        #expect(flags(dialogue.ask(Opt.info, Payload.go(""))).isDisjoint(with: [.sendDF, .blockStatusPayload]))
        _ = dialogue.ask(Opt.structuredReply)
        let structured = flags(dialogue.ask(Opt.info, Payload.go("")))
        #expect(structured.contains(.sendDF) && !structured.contains(.blockStatusPayload))
        _ = dialogue.ask(Opt.extendedHeaders)
        #expect(
            flags(dialogue.ask(Opt.info, Payload.go(""))).isSuperset(of: [.sendDF, .blockStatusPayload, .readOnly]))
    }

    @Test(arguments: [Opt.info, Opt.go]) func `INFO and GO of an unknown export are refused and may be repeated`(
        _ option: UInt32
    ) throws {
        var dialogue = Dialogue([try patternExport("disk")])
        #expect(dialogue.types(option, Payload.go("other")) == [Rep.errorUnknown])
        #expect(dialogue.end == nil)
        #expect(dialogue.types(option, Payload.go("disk")).last == Rep.ack)
    }

    static let malformed: [[UInt8]] = [
        [], [0], [0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0, 0], bytes(UInt32(5), "disk", UInt16(0)),
        bytes(UInt32(3), "disk", UInt16(0)), bytes(UInt32.max, "disk", UInt16(0)), bytes(counted("disk"), UInt16(1)),
        bytes(counted("disk"), UInt16(0), UInt8(0)), bytes(counted("disk"), UInt16(2), UInt16(0)),
        bytes(counted("disk"), UInt16(0xFFFF)), bytes(UInt32(0x7FFF_FFFF), "disk", UInt16(0)),
        bytes(UInt32(2), [0xFF, 0xFE], UInt16(0)), bytes(UInt32(2), [0xC3, 0x28], UInt16(0)),
    ]

    @Test(arguments: [Opt.info, Opt.go], malformed)
    func `a malformed INFO or GO is invalid and harms nothing`(_ option: UInt32, _ payload: [UInt8]) throws {
        var dialogue = Dialogue([try patternExport("disk")])
        #expect(dialogue.types(option, payload) == [Rep.errorInvalid])
        #expect(dialogue.types(option, Payload.go("disk")).last == Rep.ack)
    }

    // MARK: - Other options

    @Test func `LIST names exports in order with their descriptions`() throws {
        var dialogue = Dialogue([try patternExport("one", description: "text"), try patternExport("zwei")])
        let answers = dialogue.ask(Opt.list)
        #expect(answers.map(\.type) == [Rep.server, Rep.server, Rep.ack])
        #expect(answers[0].payload == bytes(counted("one"), "text"))
        #expect(answers[1].payload == bytes(counted("zwei")))
        #expect(dialogue.types(Opt.list, [0]) == [Rep.errorInvalid])
    }

    @Test func `ABORT is acknowledged, then it ends`() throws {
        for payload in [[], [UInt8](repeating: 7, count: 100)] {
            var dialogue = Dialogue([try patternExport("")])
            #expect(dialogue.types(Opt.abort, payload) == [Rep.ack])
            #expect(dialogue.end == .closed)
        }
    }

    @Test func `STARTTLS is refused and changes nothing`() throws {
        var dialogue = Dialogue([try patternExport("")])
        #expect(dialogue.types(Opt.startTLS) == [Rep.errorPolicy])
        #expect(dialogue.types(Opt.go, Payload.go("")).last == Rep.ack)
    }

    @Test(arguments: [UInt32(0), 4, 12, 13, 0x7FFF_FFFF, 0x8000_0000, .max]) func `unknown options are unsupported`(
        _ option: UInt32
    ) throws {
        var dialogue = Dialogue([try patternExport("")])
        #expect(dialogue.types(option) == [Rep.errorUnsupported])
        #expect(dialogue.types(option, [UInt8](repeating: 1, count: 32768)) == [Rep.errorUnsupported])
        #expect(dialogue.end == nil)
    }

    @Test func `structured replies are negotiated once`() throws {
        var dialogue = Dialogue([try patternExport("")])
        #expect(dialogue.types(Opt.structuredReply, [1]) == [Rep.errorInvalid])
        #expect(dialogue.types(Opt.structuredReply) == [Rep.ack])
        #expect(dialogue.types(Opt.structuredReply) == [Rep.errorInvalid])
        _ = dialogue.ask(Opt.go, Payload.go(""))
        #expect(dialogue.end == .transmission(export: "", mode: .structured, contexts: []))
    }

    @Test(arguments: [true, false]) func `extended headers take precedence`(_ structuredFirst: Bool) throws {
        var dialogue = Dialogue([try patternExport("")])
        #expect(dialogue.types(Opt.extendedHeaders, [1]) == [Rep.errorInvalid])
        if structuredFirst { #expect(dialogue.types(Opt.structuredReply) == [Rep.ack]) }
        #expect(dialogue.types(Opt.extendedHeaders) == [Rep.ack])
        #expect(dialogue.types(Opt.extendedHeaders) == [Rep.errorInvalid])
        #expect(dialogue.types(Opt.structuredReply) == [Rep.errorExtendedHeadersRequired])
        _ = dialogue.ask(Opt.go, Payload.go(""))
        #expect(dialogue.end == .transmission(export: "", mode: .extended, contexts: []))
    }

    @Test func `rules hide exports from whom they do not admit`() throws {
        let secret = try patternExport("secret", allow: [AllowRule("uid=4711")])
        let exports = [secret, try patternExport("open")]
        var stranger = Dialogue(exports, peer: .unix(pid: 1, uid: 1000, gid: 1000))
        #expect(stranger.ask(Opt.list).first?.payload == counted("open"))
        for option in [Opt.info, Opt.go] {
            let hidden = stranger.ask(option, Payload.go("secret"))
            let missing = stranger.ask(option, Payload.go("nothing"))
            #expect(hidden == missing && hidden.map(\.type) == [Rep.errorUnknown])
        }
        _ = stranger.ask(Opt.structuredReply)
        #expect(
            stranger.types(Opt.setMetaContext, Payload.contexts("secret", ["base:allocation"])) == [Rep.errorUnknown])
        var friend = Dialogue(exports, peer: .unix(pid: 1, uid: 4711, gid: 1000))
        #expect(friend.types(Opt.list) == [Rep.server, Rep.server, Rep.ack])
        #expect(friend.types(Opt.go, Payload.go("secret")).last == Rep.ack)
    }
}
