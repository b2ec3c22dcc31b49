// The life of a connection: pipelining, disconnecting, unknown commands, limits, rules, timeouts and the server's stop.
import Block
import Glibc
import LinuxIO
import NBD
import Synchronization
import Testing

private let allModes = [HeaderMode.simple, .structured, .extended]

@Suite struct ConnectionTests {
    private func request(
        _ command: UInt16, _ cookie: UInt64, _ offset: UInt64 = 0, _ length: UInt64 = 0, mode: HeaderMode
    )
        -> [UInt8]
    {
        var bytes: [UInt8] = []
        Request(command, cookie: cookie, offset: offset, length: length).encode(mode, into: &bytes)
        return bytes
    }

    @Test func `requests glued behind GO are answered`() throws {
        let device = try PatternDevice(size: 1 << 20, seed: 8)
        let client = try TestServer(device).connect()
        client.mode = .structured
        var bytes = UInt32(3).wire + TestClient.option(NBD.Option.structuredReply)
        bytes += TestClient.option(NBD.Option.go, Payload.go(""))
        for cookie in UInt64(1)...20 {
            let length = 30_000 + cookie
            client.pending[cookie] = Partial(Request(NBD.Command.read, cookie: cookie, offset: cookie, length: length))
            bytes += request(NBD.Command.read, cookie, cookie, length, mode: .structured)
        }
        bytes += request(NBD.Command.disconnect, 0, mode: .structured)
        try client.send(bytes)
        #expect(try client.receive(18).count == 18)
        #expect(try client.receiveAnswers(NBD.Option.structuredReply).last?.type == NBD.OptionReply.ack)
        #expect(try client.receiveAnswers(NBD.Option.go).last?.type == NBD.OptionReply.ack)
        for (cookie, answer) in try client.receiveAll(20) {
            let expected = try content(device, cookie, 30_000 + cookie)
            #expect(isSame(answer.data, expected[...]))
        }
        #expect(client.isClosed())
    }

    @Test func `a conversation cut into single bytes is answered the same`() throws {
        let device = try NamelessFile.memory(size: 1 << 20)
        let server = try TestServer(device)
        for mode in allModes {
            let client = try server.enter(mode)
            let write = Request(
                NBD.Command.write, flags: mode == .extended ? .payloadLength : [], cookie: 1, offset: 100, length: 50)
            var bytes: [UInt8] = []
            write.encode(mode, into: &bytes)
            bytes += [UInt8](repeating: 3, count: 50) + request(NBD.Command.read, 2, 90, 70, mode: mode)
            client.pending[1] = Partial(write)
            client.pending[2] = Partial(Request(NBD.Command.read, cookie: 2, offset: 90, length: 70))
            for byte in bytes { try client.send([byte]) }
            let answers = try client.receiveAll(2)
            #expect(answers[1]?.error == nil)
            #expect(answers[2]?.data == (90..<160).map { (100..<150).contains($0) ? 3 : 0 })
            #expect(try client.write(100, [UInt8](repeating: 0, count: 50)).error == nil)
        }
    }

    @Test(arguments: allModes) func `DISC answers what is in flight first`(_ mode: HeaderMode) throws {
        let gate = Gate()
        let device = ScriptedDevice(
            [UInt8](repeating: 4, count: 1 << 20), beforeRead: { (_) throws(BlockError) in gate.pass() })
        let server = try TestServer(device)
        let client = try server.enter(mode)
        for cookie in UInt64(1)...8 {
            try client.submit(Request(NBD.Command.read, cookie: cookie, offset: cookie * 4096, length: 4096))
        }
        try client.send(
            request(NBD.Command.disconnect, 0, mode: mode) + request(NBD.Command.read, 99, 0, 1, mode: mode))
        #expect(gate.waitForArrivals(8))
        gate.open()
        for (_, answer) in try client.receiveAll(8) { #expect(isAll(answer.data, 4)) }
        #expect(client.isClosed())
        #expect(server.isDeserted())
    }

    @Test(arguments: allModes) func `replies overtake a slow one`(_ mode: HeaderMode) throws {
        let gate = Gate()
        let device = ScriptedDevice(
            [UInt8](repeating: 4, count: 1 << 20),
            beforeRead: { (range) throws(BlockError) in if range.lowerBound == 0 { gate.pass() } })
        let client = try TestServer(device).enter(mode)
        try client.submit(Request(NBD.Command.read, cookie: 1, offset: 0, length: 4096))
        #expect(gate.waitForArrivals(1))
        #expect(isAll(try client.read(8192, 4096, cookie: 2).data, 4))
        gate.open()
        #expect(try client.receiveAnswer().cookie == 1)
    }

    @Test(arguments: allModes) func `unknown commands are invalid and harm nothing`(_ mode: HeaderMode) throws {
        let client = try TestServer(try PatternDevice(size: 1 << 20)).enter(mode)
        for command in [8, 9, 100, 0x7FFF, 0x8000, 0xFFFF] as [UInt16] {
            let answer = try client.ask(Request(command, cookie: 3, offset: .max, length: 4096))
            #expect(answer.error == NBD.ErrorValue.invalid)
        }
        #expect(try client.read(0, 10).error == nil)
    }

    @Test func `a payload where none belongs is taken off the stream`() throws {
        let client = try TestServer(try NamelessFile.memory(size: 1 << 20)).enter(.extended)
        for command in [NBD.Command.read, NBD.Command.flush, NBD.Command.trim, NBD.Command.cache, 77] {
            for count in [0, 1, 100, 100_000] {
                let request = Request(command, flags: .payloadLength, cookie: 3, offset: 0, length: UInt64(count))
                let answer = try client.ask(request, [UInt8](repeating: 0x21, count: count))
                #expect(count == 0 || answer.error == NBD.ErrorValue.invalid)
            }
        }
        #expect(try client.read(0, 10).error == nil)
    }

    @Test(arguments: allModes) func `a wrong magic disconnects this client only, after what it asked before`(
        _ mode: HeaderMode
    ) throws {
        let server = try TestServer(try PatternDevice(size: 1 << 20))
        let other = try server.enter(mode)
        let client = try server.enter(mode)
        client.pending[1] = Partial(Request(NBD.Command.read, cookie: 1, offset: 0, length: 100))
        try client.send(
            request(NBD.Command.read, 1, 0, 100, mode: mode) + [UInt8](repeating: 0x66, count: mode.requestSize))
        #expect(try client.receiveAnswer().answer.error == nil)
        #expect(client.isClosed())
        #expect(try other.read(0, 10).error == nil)
    }

    @Test func `the rate limit delays and loses nothing`() throws {
        let device = try PatternDevice(size: 1 << 20, seed: 8)
        var options = ExportOptions()
        options.bytesPerSecondMax = 8 << 20
        let client = try TestServer(device, options: options).enter(.structured)
        for cookie in UInt64(0)..<32 {
            try client.submit(Request(NBD.Command.read, cookie: cookie, offset: cookie * 32768, length: 32768))
        }
        for (cookie, answer) in try client.receiveAll(32) {
            let expected = try content(device, cookie * 32768, 32768)
            #expect(isSame(answer.data, expected[...]))
        }
    }

    // MARK: - Who may connect

    @Test func `rules admit by the peer's credentials`() throws {
        func allowed(_ rule: String) throws -> Bool {
            var options = ExportOptions()
            options.allow = [try AllowRule(rule)]
            let client = try TestServer(try PatternDevice(size: 4096), options: options).connect()
            return (try? client.enter(.structured)) != nil
        }
        #expect(try allowed("uid=\(getuid())"))
        #expect(try allowed("gid=\(getgid())"))
        #expect(try !allowed("uid=\(getuid() + 1)"))
        #expect(try !allowed("gid=\(getgid() + 1)"))
        #expect(try !allowed("cid=\(getuid())"))
        #expect(try !allowed("address=0.0.0.0/0"))
    }

    @Test func `the connection cap closes the next one, and a place is free again after a client left`() throws {
        let server = try TestServer(try PatternDevice(size: 4096)) { $0.connectionsMax = 2 }
        let first = try server.enter(.simple)
        let second = try server.connect()
        #expect(try server.connect().isClosed())
        try first.leave()
        #expect(eventually { server.server.clients.count == 1 })
        try second.enter(.simple)
        try server.expectsService()
    }

    @Test func `an export's own cap closes after the handshake`() throws {
        var options = ExportOptions()
        options.connectionsMax = 1
        let server = try TestServer(try PatternDevice(size: 4096), options: options)
        let first = try server.enter(.simple)
        // Once it is served, it counts.
        #expect(try first.read(0, 1).error == nil)
        #expect(try server.enter(.simple).isClosed())
        #expect(try first.read(0, 1).error == nil)
    }

    @Test func `the handshake's time limit ends the silent, the slow and those who stop in the middle`() throws {
        let server = try TestServer(try PatternDevice(size: 4096)) { $0.handshakeSeconds = 1 }
        let silent = try server.connect()
        let stopped = try server.connect()
        try stopped.greet()
        try stopped.send(Array(TestClient.option(NBD.Option.go, Payload.go("")).dropLast()))
        let slow = try server.connect()
        try slow.greet()
        // A byte now and then must not extend the limit: it is for the whole handshake.
        var isCutOff = false
        for byte in TestClient.option(77, [UInt8](repeating: 1, count: 300)) where !isCutOff {
            usleep(20_000)
            isCutOff = (try? slow.send([byte])) == nil
        }
        #expect(isCutOff)
        #expect(try silent.receiveAll().count == 18)
        #expect(try stopped.receiveAll().isEmpty)
        #expect(server.isDeserted())
        let done = try server.enter(.simple)
        usleep(1_300_000)
        #expect(try done.read(0, 1).error == nil)
    }

    // MARK: - Stop

    @Test(arguments: allModes) func `stop answers what was received, then closes`(_ mode: HeaderMode) throws {
        let gate = Gate()
        let device = ScriptedDevice(
            [UInt8](repeating: 4, count: 1 << 20), beforeRead: { (_) throws(BlockError) in gate.pass() })
        let server = try TestServer(device)
        let client = try server.enter(mode)
        for cookie in UInt64(1)...16 {
            try client.submit(Request(NBD.Command.read, cookie: cookie, offset: 0, length: 65536))
        }
        #expect(gate.waitForArrivals(16))
        let stopping = server.server
        let isStopped = Locked(false)
        try startThread(name: "stop") {
            stopping.stop(graceSeconds: 20)
            isStopped.withLock { $0 = true }
        }
        usleep(50_000)
        #expect(!isStopped.withLock { $0 })
        gate.open()
        for (_, answer) in try client.receiveAll(16) { #expect(isAll(answer.data, 4)) }
        #expect(client.isClosed())
        #expect(eventually { isStopped.withLock { $0 } })
        #expect(try server.connect().isClosed())
    }

    @Test func `disconnect ends one client after its answers`() throws {
        let server = try TestServer(try PatternDevice(size: 1 << 20))
        let first = try server.enter(.structured)
        let second = try server.enter(.structured)
        let id = try #require(server.server.clients.first?.id)
        #expect(server.server.disconnect(id))
        #expect(first.isClosed())
        #expect(try second.read(0, 10).error == nil)
        #expect(eventually { !server.server.disconnect(id) })
    }

    @Test func `clients and counters tell what was done`() throws {
        let export = try Export(name: "x", device: try NamelessFile.memory(size: 1 << 20))
        let server = try TestServer([export])
        let client = try server.enter(.structured, export: "x")
        _ = try client.read(0, 100_000)
        _ = try client.write(0, [UInt8](repeating: 1, count: 5000))
        _ = try client.read(1 << 20, 1)
        let record = try #require(server.server.clients.first)
        #expect(record.export == "x")
        #expect(eventually { record.sums.bytesRead == 100_000 && record.sums.bytesWritten == 5000 })
        #expect(eventually { export.sums.errors == 1 })
        #expect(export.connections == 1)
        try client.leave()
        #expect(eventually { export.connections == 0 })
    }
}
