// The handshake's limits: lengths, names and numbers of options, and that it does not matter how bytes are cut.
import Block
import NBD
import Testing

private typealias Rep = NBD.OptionReply
private typealias Opt = NBD.Option

@Suite struct HandshakeLimitTests {
    @Test(arguments: [0, 1, 32767, 32768]) func `options up to the limit are looked at`(_ length: Int) throws {
        var dialogue = Dialogue([try patternExport("")])
        #expect(dialogue.types(77, [UInt8](repeating: 1, count: length)) == [Rep.errorUnsupported])
        #expect(dialogue.types(Opt.list) == [Rep.server, Rep.ack])
    }

    @Test(arguments: [32769, 65536, 1 << 20]) func `longer options are skipped with an answer`(_ length: Int) throws {
        for option in [UInt32(77), Opt.list, Opt.go, Opt.setMetaContext] {
            var dialogue = Dialogue([try patternExport("")])
            #expect(dialogue.types(option, [UInt8](repeating: 0x49, count: length)) == [Rep.errorTooBig])
            #expect(dialogue.types(Opt.go, Payload.go("")).last == Rep.ack)
        }
    }

    @Test(arguments: [(1 << 20) + 1, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF] as [UInt32])
    func `CVE-2017-15119: an option of up to 4 GiB ends it at its header`(_ length: UInt32) throws {
        for option in [UInt32(77), Opt.exportName, Opt.list, Opt.go, Opt.setMetaContext, Opt.abort] {
            var dialogue = Dialogue([try patternExport("")])
            dialogue.feed(bytes(NBD.optionMagic, option, length))
            #expect(dialogue.end == .closed)
            #expect(dialogue.output.isEmpty)
        }
    }

    @Test func `names of 4096 bytes are taken`() throws {
        let name = String(repeating: "ä", count: 2048)
        let export = try patternExport(name, description: String(repeating: "d", count: 4096))
        var dialogue = Dialogue([export])
        #expect(dialogue.ask(Opt.list).first?.payload == bytes(counted(name), export.description))
        #expect(dialogue.types(Opt.go, Payload.go(name, [1, 2])) == [Rep.info, Rep.info, Rep.info, Rep.info, Rep.ack])
        var old = Dialogue([export])
        old.feed(TestClient.option(Opt.exportName, bytes(name)))
        #expect(old.end == .transmission(export: name, mode: .simple, contexts: []))
    }

    @Test(arguments: [4097, 32762])
    func `CVE-2017-15118, CVE-2022-26496: longer names are refused`(_ length: Int) throws {
        let name = String(repeating: "n", count: length)
        var dialogue = Dialogue([try patternExport("")])
        _ = dialogue.ask(Opt.structuredReply)
        #expect(dialogue.types(Opt.info, Payload.go(name)) == [Rep.errorInvalid])
        #expect(dialogue.types(Opt.go, Payload.go(name)) == [Rep.errorInvalid])
        if length < 30000 {
            #expect(dialogue.types(Opt.setMetaContext, Payload.contexts(name, [])) == [Rep.errorInvalid])
            #expect(dialogue.types(Opt.listMetaContext, Payload.contexts("", [name])) == [Rep.errorInvalid])
        }
        dialogue.feed(TestClient.option(Opt.exportName, bytes(name)))
        #expect(dialogue.end == .closed)
    }

    @Test func `CVE-2022-26495: a name that announces 2^32-1 bytes is malformed`() throws {
        for announced: UInt32 in [.max, .max - 1, .max - 3, 0x8000_0000, 0x7FFF_FFFC, 32768, 5] {
            var dialogue = Dialogue([try patternExport("")])
            #expect(dialogue.types(Opt.go, bytes(announced, "name")) == [Rep.errorInvalid])
            #expect(dialogue.types(Opt.info, bytes(announced, "name", UInt16(0))) == [Rep.errorInvalid])
        }
    }

    @Test func `exports cannot have names or descriptions that no client could be told`() {
        #expect(throws: BlockError.self) { try patternExport(String(repeating: "n", count: 4097)) }
        #expect(throws: BlockError.self) { try patternExport("", description: String(repeating: "d", count: 4097)) }
    }

    @Test(
        arguments: [[0xFF], [0xC0, 0x80], [0xED, 0xA0, 0x80], [0xF5, 0x80, 0x80, 0x80], [0x61, 0xC3]] as [[UInt8]])
    func `CVE-2017-7539: odd bytes for a name are refused`(_ name: [UInt8]) throws {
        var dialogue = Dialogue([try patternExport("")])
        _ = dialogue.ask(Opt.structuredReply)
        #expect(dialogue.types(Opt.go, bytes(UInt32(name.count), name, UInt16(0))) == [Rep.errorInvalid])
        #expect(dialogue.types(Opt.setMetaContext, bytes(UInt32(name.count), name, UInt32(0))) == [Rep.errorInvalid])
        dialogue.feed(TestClient.option(Opt.exportName, name))
        #expect(dialogue.end == .closed)
    }

    @Test func `an option storm ends at the limit`() throws {
        var dialogue = Dialogue([try patternExport("")])
        for _ in 0..<ServerHandshake.optionCountMax { #expect(dialogue.types(77) == [Rep.errorUnsupported]) }
        #expect(dialogue.end == nil)
        #expect(dialogue.types(77).isEmpty)
        #expect(dialogue.end == .closed)
    }

    @Test func `an option storm of skipped options ends at the limit, too`() throws {
        var dialogue = Dialogue([try patternExport("")])
        let long = [UInt8](repeating: 0, count: 32769)
        for _ in 0..<ServerHandshake.optionCountMax { dialogue.feed(TestClient.option(77, long)) }
        #expect(dialogue.end == nil)
        dialogue.feed(TestClient.option(77, long))
        #expect(dialogue.end == .closed)
    }

    // MARK: - How bytes are cut

    /// A conversation with everything in it, up to GO and a request behind it.
    static let conversation: [UInt8] =
        UInt32(3).wire + TestClient.option(77, [1, 2, 3]) + TestClient.option(Opt.list)
        + TestClient.option(Opt.go, Payload.go("none", [1, 2, 3])) + TestClient.option(Opt.structuredReply)
        + TestClient.option(5, [UInt8](repeating: 9, count: 33000))
        + TestClient.option(Opt.setMetaContext, Payload.contexts("disk", ["base:allocation", "qemu:"]))
        + TestClient.option(Opt.listMetaContext, Payload.contexts("disk", []))
        + TestClient.option(Opt.info, Payload.go("disk", [0, 1, 2, 3])) + TestClient.option(Opt.go, Payload.go("disk"))
        + [0x25, 0x60, 0x95, 0x13, 1, 2, 3]

    private func run(_ pieces: [[UInt8]]) throws -> Dialogue {
        var dialogue = Dialogue([try patternExport("disk", description: "x")], flags: nil)
        for piece in pieces { dialogue.feed(piece) }
        return dialogue
    }

    @Test func `a byte at a time gives what all at once gives, and takes nothing behind GO`() throws {
        let whole = try run([Self.conversation])
        let bytewise = try run(Self.conversation.map { [$0] })
        #expect(whole.end == .transmission(export: "disk", mode: .structured, contexts: [0]))
        #expect(whole.untaken == [0x25, 0x60, 0x95, 0x13, 1, 2, 3])
        #expect(bytewise.end == whole.end)
        #expect(bytewise.output == whole.output)
        #expect(bytewise.untaken == whole.untaken)
    }

    @Test(arguments: UInt64(1)...20) func `bytes cut anywhere give what all at once gives`(_ seed: UInt64) throws {
        var dice = Dice(seed: seed)
        var pieces: [[UInt8]] = []
        var rest = Self.conversation[...]
        while !rest.isEmpty {
            let piece = rest.prefix(Int.random(in: 1...(Bool.random(using: &dice) ? 30 : 5000), using: &dice))
            pieces.append(Array(piece))
            rest = rest.dropFirst(piece.count)
        }
        let whole = try run([Self.conversation])
        let cut = try run(pieces)
        #expect(cut.output == whole.output && cut.end == whole.end && cut.untaken == whole.untaken, "seed \(seed)")
    }

    @Test(arguments: UInt64(1)...40) func `odd bytes anywhere never trap`(_ seed: UInt64) throws {
        var dice = Dice(seed: seed)
        for _ in 0..<200 {
            var bytes = Self.conversation
            // The long option is left out, so that most changes hit something that is looked at.
            if let start = bytes.indices.first(where: { bytes[$0...].starts(with: [UInt8](repeating: 9, count: 64)) }) {
                bytes.removeSubrange((start - 16)..<(start + 33000))
            }
            for _ in 0..<Int.random(in: 1...4, using: &dice) {
                let at = Int.random(in: 4..<bytes.count, using: &dice)
                bytes[at] =
                    [0, 1, 0x7F, 0x80, 0xFF, UInt8.random(in: 0...255, using: &dice)].randomElement(using: &dice) ?? 0
            }
            let dialogue = try run([bytes])
            #expect(dialogue.output.count < 1 << 20)
        }
    }
}
