// Requests that are stuck are told of while they are, and clients that stop are ended.
import Block
import Glibc
import LinuxIO
import Testing

@testable import NBD

private let allModes = [HeaderMode.simple, .structured, .extended]

@Suite struct WatcherTests {
    private func count(_ log: RecordedLog, _ text: String) -> Int { log.lines.filter { $0.contains(text) }.count }

    // MARK: - Stuck

    @Test(arguments: allModes)
    func `a read that storage does not answer is told of, again, and when it ends`(_ mode: HeaderMode) throws {
        let gate = Gate()
        let device = ScriptedDevice(
            [UInt8](repeating: 4, count: 1 << 20), beforeRead: { (_) throws(BlockError) in gate.pass() })
        let log = RecordedLog()
        let server = try TestServer([Export(name: "web", device: device)], log: log) { $0.stuckSeconds = 0.1 }
        let client = try server.enter(mode, export: "web")
        try client.submit(Request(NBD.Command.read, cookie: 1, offset: 8192, length: 4096))
        let text = "a read of 4096 bytes at 8192 of scripted (export \"web\") has waited for storage for"
        #expect(eventually { count(log, text) >= 3 })
        #expect(log.lines.allSatisfy { !$0.contains("storage") || $0.contains("client 1 (") })
        gate.open()
        _ = try client.receiveAll(1)
        #expect(log.says("has waited for storage until now, for"))
        #expect(count(log, "replies") == 0)
    }

    @Test func `a write that keeps the connection's own thread is told of`() throws {
        let gate = Gate()
        let device = ScriptedDevice(
            [UInt8](repeating: 4, count: 1 << 20), configure: { $0.writesArePrompt = true },
            beforeWrite: { (_) throws(BlockError) in gate.pass() })
        let log = RecordedLog()
        let server = try TestServer(device, log: log) { $0.stuckSeconds = 0.1 }
        let client = try server.enter(.simple)
        try client.submit(
            Request(NBD.Command.write, cookie: 1, offset: 512, length: 1024), [UInt8](repeating: 1, count: 1024))
        #expect(log.says("a write of 1024 bytes at 512 of scripted (export \"\") has waited for storage for"))
        let record = try #require(server.server.clients.first)
        #expect(record.inFlight == 1 && record.oldestRequestSeconds != nil)
        gate.open()
        _ = try client.receiveAll(1)
        #expect(log.says("has waited for storage until now, for"))
    }

    @Test func `a client that goes while its request is stuck is told of`() throws {
        let gate = Gate()
        let device = ScriptedDevice(
            [UInt8](repeating: 4, count: 1 << 20), beforeWrite: { (_) throws(BlockError) in gate.pass() })
        let log = RecordedLog()
        let server = try TestServer(device, log: log) { $0.stuckSeconds = 0.1 }
        let writer = try server.enter(.simple)
        try writer.submit(
            Request(NBD.Command.write, flags: .fua, cookie: 1, offset: 0, length: 512),
            [UInt8](repeating: 1, count: 512))
        #expect(log.says("a write of 512 bytes at 0 of scripted (export \"\") has waited for storage for"))
        shutdown(writer.socket.number, Int32(SHUT_RDWR))
        gate.open()
        #expect(server.isDeserted())
        // Whether it was answered just before the client's end was seen does not matter.
        #expect(log.says("has waited for storage until"))
    }

    @Test(arguments: allModes)
    func `a client that takes nothing of its replies is told apart from slow storage`(_ mode: HeaderMode) throws {
        let log = RecordedLog()
        let server = try TestServer(try NamelessFile.memory(size: 8 << 20), log: log) { $0.stuckSeconds = 0.1 }
        let client = try server.enter(mode)
        for cookie in UInt64(1)...32 {
            try client.submit(Request(NBD.Command.read, cookie: cookie, offset: 0, length: 1 << 20))
        }
        #expect(log.says("takes nothing of its replies from export \"\" for"))
        _ = try client.receiveAll(32)
        #expect(log.says("takes nothing of its replies from export \"\" until now, for"))
        #expect(count(log, "storage") == 0)
    }

    @Test func `clients that are idle, throttled or fast are not told of`() throws {
        let log = RecordedLog()
        var options = ExportOptions()
        options.bytesPerSecondMax = 1 << 20
        let exports = [
            try Export(name: "fast", device: try NamelessFile.memory(size: 8 << 20)),
            try Export(name: "throttled", device: try NamelessFile.memory(size: 8 << 20), options: options),
        ]
        let server = try TestServer(exports, log: log) { $0.stuckSeconds = 0.1 }
        let (idle, fast) = (try server.enter(.simple, export: "fast"), try server.enter(.simple, export: "fast"))
        let throttled = try server.enter(.simple, export: "throttled")
        try throttled.submit(Request(NBD.Command.read, cookie: 1, offset: 0, length: 1 << 20))
        for _ in 0..<50 {
            _ = try fast.read(0, 65536)
            usleep(10_000)
        }
        _ = try throttled.receiveAll(1)
        #expect(try idle.read(0, 1).error == nil)
        #expect(count(log, "storage") + count(log, "replies") == 0, "\(log.lines)")
    }

    // MARK: - Stopped

    @Test func `clients that ask for nothing are ended if so told, those with a request in flight are not`() throws {
        let gate = Gate()
        let device = ScriptedDevice(
            [UInt8](repeating: 4, count: 1 << 20), beforeRead: { (_) throws(BlockError) in gate.pass() })
        let log = RecordedLog()
        let server = try TestServer(device, log: log) { $0.idleSeconds = 1 }
        let (idle, waiting) = (try server.enter(.simple), try server.enter(.structured))
        try waiting.submit(Request(NBD.Command.read, cookie: 1, offset: 0, length: 4096))
        #expect(idle.isClosed())
        #expect(log.says("client 1 (") && log.says("has asked for nothing for 1 s: closing its connection"))
        #expect(eventually { server.server.clients.map(\.id) == [2] })
        gate.open()
        #expect(try waiting.receiveAll(1)[1]?.error == nil)
    }

    @Test func `without being told so, no client is ended for asking nothing`() throws {
        let server = try TestServer(try NamelessFile.memory(size: 1 << 20)) { $0.stallSeconds = 1 }
        let client = try server.enter(.simple)
        usleep(1_600_000)
        #expect(try client.read(0, 1).error == nil)
    }

    @Test(arguments: allModes, ["header", "payload", "long payload", "unwanted payload", "filter"])
    func `a client that stops in the middle of a request is ended`(_ mode: HeaderMode, _ place: String) throws {
        var options = ExportOptions()
        options.isReadOnly = place == "unwanted payload"
        let log = RecordedLog()
        let device = try NamelessFile.memory(size: 8 << 20)
        let server = try TestServer(device, options: options, log: log) { $0.stallSeconds = 1 }
        let client = try server.enter(mode)
        var message: [UInt8] = []
        let flags: NBD.CommandFlags = mode == .extended && place != "header" ? .payloadLength : []
        let command = place == "filter" ? NBD.Command.blockStatus : NBD.Command.write
        if place == "filter" && mode != .extended { return }
        let length: UInt64 = place == "long payload" ? 1 << 20 : place == "filter" ? 8 : 100_000
        Request(command, flags: flags, cookie: 1, offset: 0, length: length).encode(mode, into: &message)
        if place == "header" { message.removeLast(5) } else { message.append(0) }
        try client.send(message)
        _ = try client.receiveAll()
        #expect(server.isDeserted())
        #expect(log.says("stopped in the middle of a request 1 s ago: closing its connection"))
    }

    @Test func `a client that sends slowly, but sends, is not ended`() throws {
        let server = try TestServer(try NamelessFile.memory(size: 1 << 20)) { $0.stallSeconds = 1 }
        let client = try server.enter(.simple)
        try client.submit(Request(NBD.Command.write, cookie: 1, offset: 0, length: 1000))
        for _ in 0..<10 {
            usleep(200_000)
            try client.send([UInt8](repeating: 7, count: 100))
        }
        #expect(try client.receiveAll(1)[1]?.error == nil)
    }
}
