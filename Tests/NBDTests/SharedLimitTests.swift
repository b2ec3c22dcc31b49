// Limits that connections share: bytes per second of one client, memory of all, and what is said of refusals.
import Block
import Glibc
import LinuxIO
import Testing

@testable import NBD

@Suite struct SharedLimitTests {
    // MARK: - Bytes per second

    @Test func `all connections of one party have one bucket, others have their own`() throws {
        let buckets = PartyBuckets(bytesPerSecond: 1 << 30)
        let address = try #require(IPAddress("192.0.2.1"))
        let party = Party(.ip(address), nil)
        let other = Party(.unix(pid: 1, uid: 1000, gid: 1), nil)
        let bucket = buckets.enter(party)
        #expect(buckets.enter(Party(.ip(address), nil)) === bucket)
        #expect(buckets.enter(other) !== bucket)
        // The same user over another process is the same party; a key or certificate is one wherever it comes from.
        #expect(Party(.unix(pid: 2, uid: 1000, gid: 9), nil) == other)
        let identity = TLSIdentity(pskIdentity: "backup", version: "TLSv1.3", cipher: "x")
        #expect(Party(.ip(address), identity) == Party(.inherited, identity))
        #expect(Party(.ip(address), identity) != party)
        #expect(Party(.inherited, nil) == nil)
        #expect(buckets.enter(nil) !== buckets.enter(nil))
        for party in [party, party, other] { buckets.leave(party) }
        #expect(
            eventually {
                buckets.leave(nil)
                _ = buckets.enter(other)
                buckets.leave(other)
                return buckets.count <= 1
            })
    }

    @Test func `a party that goes and comes back finds its debt`() {
        let buckets = PartyBuckets(bytesPerSecond: 1000)
        let party = Party.user(7)
        let bucket = buckets.enter(party)
        #expect(bucket.take(1_000_000) > 0)
        buckets.leave(party)
        #expect(buckets.count == 1)
        #expect(buckets.enter(party) === bucket)
        #expect(bucket.take(1) > 900)
    }

    @Test func `more connections of one client read no faster`() throws {
        let server = try TestServer(try NamelessFile.memory(size: 8 << 20)) { $0.bytesPerSecondPerPeerMax = 4 << 20 }
        let clients = try (0..<4).map { _ in try server.enter(.simple) }
        let start = monotonicSeconds()
        for client in clients {
            try client.submit(Request(NBD.Command.read, cookie: 1, offset: 0, length: 1 << 20))
        }
        for client in clients { #expect(try client.receiveAll(1)[1]?.error == nil) }
        // 4 MiB, a quarter of a second's worth of them at once.
        #expect(monotonicSeconds() - start > 0.7)
    }

    // MARK: - Memory

    @Test func `slots of all connections stay within the budget, and everybody gets one`() throws {
        let gate = Gate()
        let device = ScriptedDevice(
            [UInt8](repeating: 4, count: 4 << 20), beforeRead: { (_) throws(BlockError) in gate.pass() })
        let server = try TestServer(device) { $0.slotBytesMax = 1 << 20 }
        let clients = try (0..<8).map { _ in try server.enter(.structured) }
        for client in clients {
            for cookie in UInt64(1)...4 {
                try client.submit(Request(NBD.Command.read, cookie: cookie, offset: 0, length: 1 << 20))
            }
        }
        // Each of the eight has one piece of 256 KiB at least, and together they have the budget and those.
        #expect(gate.waitForArrivals(8))
        usleep(100_000)
        #expect(server.server.slotBytes.held <= (1 << 20) + 8 * (256 << 10))
        #expect(server.server.slotBytes.held >= 1 << 20)
        gate.open()
        for client in clients {
            for (_, answer) in try client.receiveAll(4) { #expect(isAll(answer.data, 4)) }
            try client.leave()
        }
        #expect(server.isDeserted())
        #expect(eventually { server.server.slotBytes.held == 0 })
    }

    @Test func `status replies count, and writes go on when all memory is in use`() throws {
        let gate = Gate()
        let device = ScriptedDevice(
            [UInt8](repeating: 4, count: 4 << 20),
            beforeRead: { (range) throws(BlockError) in if range.lowerBound >= 1 << 20 { gate.pass() } })
        let server = try TestServer(device) { $0.slotBytesMax = 1 << 20 }
        let hoarder = try server.enter(.structured, contexts: ["base:allocation"])
        for cookie in UInt64(1)...8 {
            try hoarder.submit(Request(NBD.Command.read, cookie: cookie, offset: 2 << 20, length: 1 << 20))
        }
        #expect(gate.waitForArrivals(4))
        let other = try server.enter(.structured, contexts: ["base:allocation"])
        for cookie in UInt64(1)...16 {
            #expect(try other.write(0, [UInt8](repeating: 9, count: 200_000), cookie: cookie).error == nil)
            let status = Request(NBD.Command.blockStatus, cookie: cookie, offset: 0, length: 4 << 20)
            #expect(try other.ask(status).error == nil)
            #expect(try other.read(0, 65536).error == nil)
        }
        gate.open()
        #expect(try hoarder.receiveAll(8).values.allSatisfy { $0.error == nil })
    }

    @Test func `a client that asks for nothing gives its memory back and can go on`() throws {
        let device = ScriptedDevice([UInt8](repeating: 4, count: 4 << 20))
        let server = try TestServer(device)
        let client = try server.enter(.structured)
        #expect(try client.read(0, 4 << 20).error == nil)
        #expect(server.server.slotBytes.held > 0)
        #expect(eventually { server.server.slotBytes.held == 0 })
        #expect(isAll(try client.read(0, 4 << 20).data, 4))
    }

    // MARK: - Refusals

    @Test func `a flood of connections is counted, and only its first ones are logged`() throws {
        let log = RecordedLog()
        let server = try TestServer(try NamelessFile.memory(size: 4096), log: log) { $0.connectionsMax = 2 }
        let clients = try (0..<2).map { _ in try server.enter(.simple) }
        for _ in 0..<50 { #expect(try server.connect().isClosed()) }
        #expect(server.server.refusals.count(.limit) == 50)
        #expect(log.lines.filter { $0.contains("the most at once (--max-connections)") }.count == Refusals.loggedMax)
        for client in clients { #expect(try client.read(0, 1).error == nil) }
    }

    @Test func `refusals are counted by their reason`() throws {
        var options = ExportOptions()
        options.connectionsMax = 1
        let log = RecordedLog()
        let server = try TestServer(try NamelessFile.memory(size: 4096), options: options, log: log)
        let refusals = server.server.refusals
        let present = try server.enter(.simple)
        _ = try? server.enter(.simple).read(0, 1)
        #expect(eventually { refusals.count(.limit) == 1 })
        #expect(log.says("export \"\" has 1 connections, the most at once (--max-per-export)"))

        _ = try? server.enter(.simple, export: "other")
        #expect(eventually { refusals.count(.export) == 1 })

        let garbage = try server.connect()
        try garbage.send([UInt8](repeating: 0x55, count: 64))
        #expect(try garbage.receiveAll().count == 18)
        #expect(eventually { refusals.count(.handshake) == 1 })

        let polite = try server.connect()
        try polite.greet()
        _ = try polite.ask(option: NBD.Option.list)
        _ = try polite.ask(option: NBD.Option.abort)
        #expect(polite.isClosed())
        #expect(try present.read(0, 1).error == nil)
        #expect(refusals.count(.handshake) == 1 && refusals.count(.export) == 1 && refusals.count(.tls) == 0)
    }
}
