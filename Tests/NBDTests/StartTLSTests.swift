// NBD_OPT_STARTTLS in the handshake: what is answered before it, what survives it, and who gets in.
import Block
import LinuxIO
import NBD
import Testing

private typealias Rep = NBD.OptionReply
private typealias Opt = NBD.Option

private let someone = TLSIdentity(pskIdentity: "backup", version: "TLSv1.3", cipher: "TLS_AES_128_GCM_SHA256")

private let go = bytes(UInt32(0), UInt16(0))

@Suite struct StartTLSTests {
    @Test func `without TLS it is refused, and the handshake goes on`() throws {
        var dialogue = Dialogue([try patternExport("")])
        let answers = dialogue.ask(Opt.startTLS)
        #expect(answers.map(\.type) == [Rep.errorPolicy])
        #expect(String(decoding: answers[0].payload, as: UTF8.self).contains("--tls"))
        #expect(dialogue.types(Opt.go, go).last == Rep.ack)
    }

    @Test(arguments: [
        Opt.list, Opt.info, Opt.go, Opt.structuredReply, Opt.extendedHeaders, Opt.listMetaContext, Opt.setMetaContext,
        99,
    ])
    func `where TLS is required, nothing is answered before it`(_ option: UInt32) throws {
        var dialogue = Dialogue([try patternExport("secret")], tls: .require)
        let answers = dialogue.ask(option, bytes(UInt32(6), "secret", UInt16(0)))
        #expect(answers.map(\.type) == [Rep.errorTLSRequired])
        #expect(String(decoding: answers[0].payload, as: UTF8.self).contains("nbds://"))
        #expect(dialogue.end == nil)
    }

    @Test func `where TLS is required, EXPORT_NAME before it ends the connection, and ABORT is acknowledged`() throws {
        var named = Dialogue([try patternExport("disk")], tls: .require)
        named.feed(TestClient.option(Opt.exportName, bytes("disk")))
        #expect(named.end == .closed)
        #expect(named.output.isEmpty)
        var aborted = Dialogue([try patternExport("disk")], tls: .require)
        #expect(aborted.types(Opt.abort) == [Rep.ack])
        #expect(aborted.end == .closed)
    }

    @Test(arguments: [TLSPolicy.allow, .require]) func `it is acknowledged, and everything works afterwards`(
        _ policy: TLSPolicy
    ) throws {
        var dialogue = Dialogue([try patternExport("")], tls: policy)
        #expect(dialogue.types(Opt.startTLS) == [Rep.ack])
        #expect(dialogue.end == .startTLS)
        dialogue.secure(someone)
        #expect(dialogue.types(Opt.list) == [Rep.server, Rep.ack])
        #expect(dialogue.types(Opt.startTLS) == [Rep.errorInvalid])
        #expect(dialogue.types(Opt.go, go).last == Rep.ack)
    }

    @Test func `with data it is invalid`() throws {
        var dialogue = Dialogue([try patternExport("")], tls: .require)
        #expect(dialogue.types(Opt.startTLS, [0]) == [Rep.errorInvalid])
        #expect(dialogue.types(Opt.startTLS) == [Rep.ack])
    }

    @Test(arguments: [HeaderMode.structured, .extended])
    func `CVE-2021-3716: nothing that was negotiated before it holds afterwards`(_ mode: HeaderMode) throws {
        let export = try patternExport("")
        var dialogue = Dialogue([export], tls: .allow)
        let option = mode == .extended ? Opt.extendedHeaders : Opt.structuredReply
        #expect(dialogue.types(option) == [Rep.ack])
        let query = bytes(UInt32(0), UInt32(1), UInt32(15), "base:allocation")
        #expect(dialogue.types(Opt.setMetaContext, query).last == Rep.ack)
        #expect(dialogue.types(Opt.startTLS) == [Rep.ack])
        dialogue.secure(someone)
        // Contexts need structured replies, which are forgotten.
        #expect(dialogue.types(Opt.setMetaContext, query) == [Rep.errorInvalid])
        #expect(dialogue.types(Opt.go, go).last == Rep.ack)
        #expect(dialogue.end == .transmission(export: "", mode: .simple, contexts: []))
    }

    @Test func `CVE-2021-3716: bytes glued behind it end the connection unanswered`() throws {
        for glued in [[UInt8(0)], TestClient.option(Opt.list, []), TestClient.option(Opt.go, go)] {
            var dialogue = Dialogue([try patternExport("")], tls: .require)
            dialogue.feed(TestClient.option(Opt.startTLS, []) + glued)
            #expect(dialogue.end == .closed)
        }
    }

    @Test func `an export that TLS clients alone may use does not exist before TLS`() throws {
        let exports = [
            try patternExport("open"), try patternExport("hidden", allow: [AllowRule("psk=backup")]),
        ]
        let named = bytes(UInt32(6), "hidden", UInt16(0))
        var dialogue = Dialogue(exports, tls: .allow)
        #expect(dialogue.ask(Opt.list).filter { $0.type == Rep.server }.count == 1)
        #expect(dialogue.types(Opt.go, named) == [Rep.errorUnknown])
        _ = dialogue.ask(Opt.startTLS)
        dialogue.secure(someone)
        #expect(dialogue.ask(Opt.list).filter { $0.type == Rep.server }.count == 2)
        #expect(dialogue.types(Opt.go, named).last == Rep.ack)
    }

    @Test func `a client that may only read is told so`() throws {
        let disk = MemoryExport(rules: ["psk=backup and read-only", "psk=restore"])
        for (identity, isReadOnly) in [("backup", true), ("restore", false)] {
            var dialogue = Dialogue([try disk.export()], tls: .require)
            _ = dialogue.ask(Opt.startTLS)
            dialogue.secure(TLSIdentity(pskIdentity: identity, version: "TLSv1.3", cipher: "any"))
            let info = try #require(dialogue.ask(Opt.go, go).first)
            let flags = NBD.TransmissionFlags(rawValue: info.payload.number(10))
            #expect(flags.contains(.readOnly) == isReadOnly)
            #expect(flags.contains(.sendTrim) == !isReadOnly)
        }
    }
}

private struct MemoryExport {
    let rules: [String]

    func export() throws -> Export {
        var options = ExportOptions()
        options.allow = try rules.map { try AllowRule($0) }
        return try Export(name: "", device: NamelessFile.memory(size: 65536), options: options)
    }
}
