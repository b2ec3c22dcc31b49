// What exports and clients count: operations, bytes, errors, latency, what is in flight.
import Block
import Glibc
import LinuxIO
import Testing

@testable import NBD

private let allModes = [HeaderMode.simple, .structured, .extended]

@Suite struct FiguresTests {
    // MARK: - Latency

    @Test func `each bucket ends at twice the time of the one before`() {
        #expect(LatencyBuckets.limit(0) == 1e-6)
        #expect(LatencyBuckets.limit(26) == 67.108864)
        #expect(LatencyBuckets.limit(27) == nil)
        for (nanoseconds, bucket) in [
            (0, 0), (1000, 0), (1001, 1), (2000, 1), (2001, 2), (4000, 2), (4001, 3), (1_000_000, 10),
            (67_108_864_000, 26), (67_108_864_001, 27), (UInt64.max, 27),
        ] as [(UInt64, Int)] {
            #expect(LatencyBuckets.bucket(nanoseconds: nanoseconds) == bucket, "\(nanoseconds)")
        }
    }

    @Test func `shares of requests are found in the buckets`() {
        var figures = OperationFigures()
        #expect(figures.quantile(0.5) == nil)
        figures.buckets[3] = 98
        figures.buckets[10] = 1
        figures.buckets[27] = 1
        #expect(figures.count == 100)
        #expect(figures.quantile(0.5) == 8e-6)
        #expect(figures.quantile(0.98) == 8e-6)
        #expect(figures.quantile(0.99) == 1024e-6)
        #expect(figures.quantile(1) == nil)
    }

    @Test func `the time of a request goes on while storage is slow`() throws {
        let gate = Gate()
        let device = ScriptedDevice(
            [UInt8](repeating: 4, count: 1 << 20), beforeRead: { (_) throws(BlockError) in gate.pass() })
        let export = try Export(name: "", device: device)
        let client = try TestServer([export]).enter(.structured)
        try client.submit(Request(NBD.Command.read, cookie: 1, offset: 0, length: 4096))
        #expect(gate.waitForArrivals(1))
        usleep(40_000)
        gate.open()
        _ = try client.receiveAll(1)
        #expect(eventually { export.sums[.read].count == 1 })
        #expect(export.sums[.read].nanoseconds >= 40_000_000)
        #expect(export.sums[.read].buckets[..<15].allSatisfy { $0 == 0 })
    }

    // MARK: - What is counted

    @Test(arguments: allModes) func `every operation is counted with its bytes and errors`(_ mode: HeaderMode) throws {
        let export = try Export(name: "", device: try NamelessFile.memory(size: 1 << 20))
        let server = try TestServer([export])
        let contexts = mode == .simple ? [] : ["base:allocation"]
        let client = try server.enter(mode, contexts: contexts)
        for _ in 0..<3 { #expect(try client.read(0, 100_000).error == nil) }
        #expect(try client.read(1 << 20, 1).error != nil)
        #expect(try client.write(0, [UInt8](repeating: 1, count: 5000)).error == nil)
        #expect(try client.write(0, [UInt8](repeating: 1, count: 600_000)).error == nil)
        for command in [NBD.Command.trim, NBD.Command.writeZeroes, NBD.Command.cache] {
            #expect(try client.ask(Request(command, cookie: 1, offset: 4096, length: 8192)).error == nil)
        }
        for _ in 0..<2 { #expect(try client.ask(Request(NBD.Command.flush, cookie: 1)).error == nil) }
        #expect(try client.ask(Request(99, cookie: 1, offset: 0, length: 1)).error != nil)
        if mode != .simple {
            #expect(
                try client.ask(Request(NBD.Command.blockStatus, cookie: 1, offset: 0, length: 8192)).error == nil)
        }
        let expected: [(Operation, count: UInt64, errors: UInt64, bytes: UInt64)] = [
            (.read, 4, 1, 300_000), (.write, 2, 0, 605_000), (.trim, 1, 0, 8192), (.zero, 1, 0, 8192),
            (.cache, 1, 0, 8192), (.flush, 2, 0, 0), (.other, 1, 1, 0), (.status, mode == .simple ? 0 : 1, 0, 0),
        ]
        let record = try #require(server.server.clients.first)
        #expect(eventually { record.sums.count == expected.reduce(0) { $0 + $1.count } })
        for sums in [record.sums, export.sums] {
            for (operation, count, errors, bytes) in expected {
                let figures = sums[operation]
                #expect(
                    figures.count == count && figures.errors == errors && figures.bytes == bytes,
                    "\(operation.name): \(figures)")
                #expect((figures.nanoseconds > 0) == (count > 0))
            }
        }
    }

    @Test func `a read of which several parts fail is one error`() throws {
        let device = ScriptedDevice(
            [UInt8](repeating: 4, count: 1 << 20),
            beforeRead: { (_) throws(BlockError) in throw BlockError(.inputOutput, "no") })
        let export = try Export(name: "", device: device)
        let server = try TestServer([export])
        let client = try server.enter(.structured)
        #expect(try client.read(0, 1 << 20).errorOffsets.count == 4)
        #expect(eventually { export.sums[.read].count == 1 })
        #expect(export.sums[.read].errors == 1 && export.sums[.read].bytes == 0)
    }

    @Test func `an export adds up its clients and those who have gone`() throws {
        let export = try Export(name: "", device: try NamelessFile.memory(size: 1 << 20))
        let server = try TestServer([export])
        for round in 1...3 {
            let client = try server.enter(.simple)
            _ = try client.read(0, 1000)
            if round < 3 { try client.leave() }
            #expect(server.server.clients.count <= 2)
            if round == 3 {
                #expect(eventually { export.sums.count == 3 && export.connections == 1 })
                #expect(export.sums.bytesRead == 3000 && export.connectionsEver == 3)
                #expect(server.server.clients.last?.sums.bytesRead == 1000)
            }
        }
        #expect(server.isDeserted())
        #expect(export.sums.bytesRead == 3000 && export.connections == 0)
    }

    @Test func `what is in flight is seen while it is, with the age of the oldest`() throws {
        let gate = Gate()
        let device = ScriptedDevice(
            [UInt8](repeating: 4, count: 2 << 20), beforeRead: { (_) throws(BlockError) in gate.pass() })
        let export = try Export(name: "", device: device)
        let server = try TestServer([export])
        let client = try server.enter(.structured)
        let record = try #require(server.server.clients.first)
        #expect(record.inFlight == 0 || eventually { record.inFlight == 0 })
        // The last of them is in four slots, and still one request.
        for cookie in UInt64(1)...5 {
            try client.submit(
                Request(NBD.Command.read, cookie: cookie, offset: 0, length: cookie == 5 ? 1 << 20 : 4096))
        }
        #expect(eventually { record.inFlight == 5 && export.inFlight == 5 })
        #expect(eventually { (record.oldestRequestSeconds ?? 0) > 0 })
        gate.open()
        _ = try client.receiveAll(5)
        #expect(eventually { record.inFlight == 0 && record.oldestRequestSeconds == nil })
    }
}
