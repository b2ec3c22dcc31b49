// Limits on what a client can make the server hold or do: replies, contexts, flags, connections, lost writes.
import Block
import LinuxIO
import NBD
import Testing

private typealias Rep = NBD.OptionReply
private typealias Opt = NBD.Option

@Suite struct HoardingTests {
    @Test func `replies to a storm of options are handed over in portions`() throws {
        let exports = try (0..<40).map { try patternExport("e\($0)", description: String(repeating: "d", count: 4000)) }
        var handshake = ServerHandshake(directory: TestDirectory(exports), client: Credentials(peer: .inherited))
        var input = UInt32(3).wire + (0..<100).flatMap { _ in TestClient.option(Opt.list) }
        var lists = 0
        var largest = 0
        while !input.isEmpty {
            var output: [UInt8] = []
            let (consumed, _) = input.withUnsafeBytes { handshake.receive($0, into: &output) }
            try #require(consumed > 0)
            input.removeFirst(consumed)
            largest = max(largest, output.count)
            lists += Dialogue.answers(output, to: Opt.list).count { $0.type == Rep.ack }
        }
        #expect(lists == 100)
        // One answer over the limit at most: what is complete is sent before more is answered.
        #expect(largest <= ServerHandshake.outputMax + 40 * 4100)
    }

    @Test func `options behind a full portion are answered without waiting for more input`() throws {
        let exports = try (0..<40).map { try patternExport("e\($0)", description: String(repeating: "d", count: 4000)) }
        let client = try TestServer(exports).connect()
        try client.greet()
        try client.send((0..<5).flatMap { _ in TestClient.option(Opt.list) })
        for _ in 0..<5 { #expect(try client.receiveAnswers(Opt.list).count == 41) }
    }

    @Test func `a session takes sixteen contexts, and an image offers 256 bitmaps`() throws {
        let names = (0..<300).map { "b\($0)" }
        let export = try patternExport("", bitmaps: names)
        #expect(export.contexts.count == 2 + MetaContext.dirtyBitmapsMax)
        var dialogue = Dialogue([export])
        _ = dialogue.ask(Opt.structuredReply)
        let queries = names.map { "qemu:dirty-bitmap:\($0)" }
        #expect(dialogue.types(Opt.setMetaContext, Payload.contexts("", Array(queries[..<17]))) == [Rep.errorTooBig])
        let taken = dialogue.types(Opt.setMetaContext, Payload.contexts("", Array(queries[..<16])))
        #expect(taken.count == 17 && taken.last == Rep.ack)
    }

    @Test func `preferred block sizes are at least 512 bytes`() throws {
        let device = try SliceDevice(PatternDevice(size: 1 << 20), range: 1..<1000, label: "odd")
        var dialogue = Dialogue([try Export(name: "", device: device)])
        let info = try #require(
            dialogue.ask(Opt.go, Payload.go("")).first { $0.payload.number(0) == NBD.Info.blockSize })
        #expect(info.payload.number(2, as: UInt32.self) == 1)
        #expect(info.payload.number(6, as: UInt32.self) == 512)
    }

    @Test func `flags that a command does not know are refused, and its payload is dropped`() throws {
        let device = try NamelessFile.memory(size: 1 << 20)
        for mode in [HeaderMode.simple, .structured, .extended] {
            let client = try TestServer(device).enter(mode)
            let odd = NBD.CommandFlags(rawValue: 1 << 15)
            #expect(try client.read(0, 512, odd).error == NBD.ErrorValue.invalid)
            #expect(try client.read(0, 512, .noHole).error == NBD.ErrorValue.invalid)
            let data = [UInt8](repeating: 7, count: 4096)
            #expect(try client.write(0, data, .requestOne).error == NBD.ErrorValue.invalid)
            #expect(try client.read(0, 512, .fua).data == [UInt8](repeating: 0, count: 512))
        }
    }

    @Test func `one peer's connections are limited`() throws {
        let server = try TestServer([try patternExport("")]) { $0.connectionsPerPeerMax = 2 }
        let first = try server.enter(.structured)
        let second = try server.enter(.structured)
        #expect(try server.connect().isClosed())
        try first.leave()
        #expect(try second.read(0, 512).error == nil)
    }
}
