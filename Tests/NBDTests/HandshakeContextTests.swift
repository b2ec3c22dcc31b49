// Meta contexts in the handshake: listing, choosing, for which export and until when.
import Block
import NBD
import Testing

private typealias Rep = NBD.OptionReply
private typealias Opt = NBD.Option

@Suite struct HandshakeContextTests {
    private func dialogue(_ mode: HeaderMode = .structured) throws -> Dialogue {
        var dialogue = Dialogue([try patternExport("disk", bitmaps: ["one", "two"]), try patternExport("other")])
        if mode == .structured { _ = dialogue.ask(Opt.structuredReply) }
        if mode == .extended { _ = dialogue.ask(Opt.extendedHeaders) }
        return dialogue
    }

    private static let all = [
        "base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:one", "qemu:dirty-bitmap:two",
    ]

    private func names(_ answers: [OptionAnswer]) -> [String] {
        answers.filter { $0.type == Rep.metaContext }.map { String(decoding: $0.payload.dropFirst(4), as: UTF8.self) }
    }

    @Test(
        arguments: [
            ([], all), (["base:"], [all[0]]), (["qemu:"], Array(all[1...])), (["qemu:dirty-bitmap:"], Array(all[2...])),
            (["base:allocation", "base:"], [all[0]]), (["unknown:"], []),
            (["base:other", "qemu:dirty-bitmap:three"], []),
            ([all[3], all[0]], [all[0], all[3]]), ([""], []),
        ] as [([String], [String])])
    func `LIST_META_CONTEXT knows all, namespaces and exact names`(_ queries: [String], _ expected: [String]) throws {
        for mode in [HeaderMode.structured, .extended] {
            var dialogue = try dialogue(mode)
            let answers = dialogue.ask(Opt.listMetaContext, Payload.contexts("disk", queries))
            #expect(names(answers) == expected)
            #expect(answers.last?.type == Rep.ack)
            #expect(answers.dropLast().allSatisfy { $0.payload.number(0, as: UInt32.self) == 0 })
        }
    }

    @Test(
        arguments: [
            ([all[0]], [UInt32(0)]), ([all[3], all[0]], [0, 3]), ([all[1], all[1]], [1]), (["base:"], []),
            (["qemu:"], []),
            ([], []), (["x-unknown:y", all[2]], [2]),
        ] as [([String], [UInt32])])
    func `SET_META_CONTEXT takes exact names only, and GO keeps them`(_ queries: [String], _ ids: [UInt32]) throws {
        var dialogue = try dialogue()
        let answers = dialogue.ask(Opt.setMetaContext, Payload.contexts("disk", queries))
        #expect(answers.dropLast().map { $0.payload.number(0, as: UInt32.self) } == ids)
        #expect(Set(names(answers)).isSubset(of: queries))
        #expect(answers.last?.type == Rep.ack)
        _ = dialogue.ask(Opt.go, Payload.go("disk"))
        #expect(dialogue.end == .transmission(export: "disk", mode: .structured, contexts: ids))
    }

    @Test func `contexts of one export do not hold for another`() throws {
        var dialogue = try dialogue()
        _ = dialogue.ask(Opt.setMetaContext, Payload.contexts("disk", ["base:allocation"]))
        _ = dialogue.ask(Opt.go, Payload.go("other"))
        #expect(dialogue.end == .transmission(export: "other", mode: .structured, contexts: []))
    }

    static let clearing: [(String, [UInt8])] = [
        ("nothing chosen", Payload.contexts("disk", [])),
        ("an unknown export", Payload.contexts("none", ["base:allocation"])),
        ("a malformed request", [0, 0]), ("another export", Payload.contexts("other", ["base:allocation"])),
    ]

    @Test(arguments: clearing) func `a later SET_META_CONTEXT replaces the first`(_ name: String, _ payload: [UInt8])
        throws
    {
        var dialogue = try dialogue()
        _ = dialogue.ask(Opt.setMetaContext, Payload.contexts("disk", ["base:allocation"]))
        _ = dialogue.ask(Opt.setMetaContext, payload)
        _ = dialogue.ask(Opt.go, Payload.go("disk"))
        #expect(dialogue.end == .transmission(export: "disk", mode: .structured, contexts: []), "\(name)")
    }

    @Test func `LIST_META_CONTEXT leaves what was set`() throws {
        var dialogue = try dialogue()
        _ = dialogue.ask(Opt.setMetaContext, Payload.contexts("disk", ["base:allocation"]))
        _ = dialogue.ask(Opt.listMetaContext, Payload.contexts("disk", ["qemu:"]))
        #expect(dialogue.types(Opt.info, Payload.go("other")).last == Rep.ack)
        _ = dialogue.ask(Opt.go, Payload.go("disk"))
        #expect(dialogue.end == .transmission(export: "disk", mode: .structured, contexts: [0]))
    }

    @Test(arguments: [Opt.listMetaContext, Opt.setMetaContext])
    func `contexts need structured replies and a known export`(_ option: UInt32) throws {
        var simple = try dialogue(.simple)
        #expect(simple.types(option, Payload.contexts("disk", ["base:allocation"])) == [Rep.errorInvalid])
        var structured = try dialogue()
        #expect(structured.types(option, Payload.contexts("none", ["base:allocation"])) == [Rep.errorUnknown])
    }

    static let malformed: [[UInt8]] = [
        [], [0, 0, 0, 0], bytes(counted("disk")), bytes(counted("disk"), [0, 0, 0]), bytes(counted("disk"), UInt32(1)),
        bytes(counted("disk"), UInt32(0), UInt8(1)), bytes(counted("disk"), UInt32(2), counted("base:")),
        bytes(counted("disk"), UInt32.max), bytes(counted("disk"), UInt32.max, counted("base:")),
        bytes(counted("disk"), UInt32(1), UInt32.max, "base:"), bytes(counted("disk"), UInt32(1), UInt32(6), "base:"),
        bytes(counted("disk"), UInt32(1), UInt32(4), "base:"), bytes(counted("disk"), UInt32(1), UInt32(1), [0xFF]),
        bytes(UInt32.max, "disk", UInt32(0)), bytes(UInt32(0x8000_0000), "disk", UInt32(0)),
    ]

    @Test(arguments: [Opt.listMetaContext, Opt.setMetaContext], malformed)
    func `malformed queries are invalid and harm nothing`(_ option: UInt32, _ payload: [UInt8]) throws {
        var dialogue = try dialogue()
        #expect(dialogue.types(option, payload) == [Rep.errorInvalid])
        #expect(dialogue.types(Opt.listMetaContext, Payload.contexts("disk", ["base:"])) == [Rep.metaContext, Rep.ack])
    }

    @Test func `as many queries as the limit are taken, one more is not`() throws {
        var dialogue = try dialogue()
        let queries = [String](repeating: "x:", count: Int(ServerHandshake.queryCountMax) - 1) + ["base:allocation"]
        #expect(dialogue.types(Opt.listMetaContext, Payload.contexts("disk", queries)) == [Rep.metaContext, Rep.ack])
        let tooMany = queries + ["x:"]
        #expect(dialogue.types(Opt.listMetaContext, Payload.contexts("disk", tooMany)) == [Rep.errorInvalid])
    }
}
