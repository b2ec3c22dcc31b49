// Several connections to one export: what a flush covers and tells, and connections that come, go, or lead elsewhere.
import Block
import LinuxIO
import NBD
import Support
import Testing

/// A server that several connections may use, on the first of which the read at 0 waits until it is released: so other
/// requests go to another connection as long as there is one.
private final class Twins: Sendable {
    static let closing: UInt64 = 65536

    let server: HostileServer
    let commands = Locked<[(connection: Int, command: UInt16)]>([])
    private let withheld = Locked<[@Sendable () -> Void]>([])

    /// - Parameter closesAdditional: every connection but the first is closed when something is asked on it.
    init(
        in directory: TemporaryDirectory, closesAdditional: Bool = false,
        facts: @escaping @Sendable (Int) -> HostileServer.Facts = { _ in .init(flags: Twins.flags) }
    ) throws {
        let (commands, withheld) = (commands, withheld)
        server = try HostileServer(in: directory, mode: .simple, isConcurrent: true, facts: facts) {
            connection, number in
            while let (request, _) = connection.request(), request.command != NBD.Command.disconnect {
                commands.withLock { $0.append((number, request.command)) }
                let isRead = request.command == NBD.Command.read
                if number > 1 && (closesAdditional || request.offset == Self.closing) { return }
                let answer: @Sendable () -> Void = {
                    connection.simple(
                        request, payload: isRead ? [UInt8](repeating: 0, count: Int(request.length)) : [])
                }
                if number == 1 && isRead && request.offset == 0 {
                    withheld.withLock { $0.append(answer) }
                } else {
                    answer()
                }
            }
        }
    }

    static let flags: NBD.TransmissionFlags = [.hasFlags, .sendFlush, .canMultiConn]

    func count(_ command: UInt16, on connection: Int) -> Int {
        commands.withLock { $0.count { $0 == (connection, command) } }
    }

    var isBusy: Bool { withheld.withLock { !$0.isEmpty } }

    func release() { for answer in withheld.withLock({ $0 }) { answer() } }

    /// Runs a body while the read at 0 is under way on the first connection.
    func whileBusy(_ device: NBDDevice, _ body: @escaping @Sendable () throws -> Void) throws {
        try concurrently([
            { _ = try readBytes(device, at: 0, count: 512) },
            {
                defer { self.release() }
                try require(eventually { self.isBusy }, "the read arrives")
                try body()
            },
        ])
    }

    /// Reads until something is asked on the second connection.
    func useSecond(_ device: NBDDevice) throws {
        try require(
            eventually {
                _ = try? readBytes(device, at: 512, count: 512)
                return self.count(NBD.Command.read, on: 2) > 0
            }, "a second connection is used")
    }
}

private func write(_ device: NBDDevice, at offset: UInt64, durable: Bool = false) throws {
    try [UInt8](repeating: 1, count: 512).withUnsafeBytes { try device.write($0, at: offset, durable: durable) }
}

/// Whether flushing tells of a loss.
private func tellsLoss(_ device: NBDDevice) throws -> Bool {
    do throws(BlockError) {
        try device.flush()
        return false
    } catch  where error.message.contains("not yet flushed") { return true }
}

@Suite(.timeLimit(.minutes(1))) struct ChannelPoolTests {
    @Test func `a flush reaches every connection on which something was written`() throws {
        try withTemporaryDirectory { directory in
            let twins = try Twins(in: directory)
            let device = try NBDDevice.open(twins.server.uri, isWritable: true)
            try write(device, at: 4096)
            try twins.whileBusy(device) {
                try twins.useSecond(device)
                try write(device, at: 8192)
                try require(twins.count(NBD.Command.write, on: 2) == 1, "a write on the second connection")
                try device.flush()
            }
            #expect(twins.count(NBD.Command.flush, on: 1) == 1 && twins.count(NBD.Command.flush, on: 2) == 1)
            // Nothing is left to be flushed: one is enough.
            try device.flush()
            #expect(twins.commands.withLock { $0.count { $0.command == NBD.Command.flush } } == 3)
        }
    }

    @Test(arguments: [false, true])
    func `only a connection with writes that were not flushed loses something`(isDirty: Bool) throws {
        try withTemporaryDirectory { directory in
            let twins = try Twins(in: directory)
            let device = try NBDDevice.open(twins.server.uri, isWritable: true)
            try write(device, at: 4096)
            try twins.whileBusy(device) {
                try twins.useSecond(device)
                if isDirty { try write(device, at: 8192) }
                // The second connection breaks, and the first one answers.
                _ = try readBytes(device, at: Twins.closing, count: 512)
                try require(try tellsLoss(device) == isDirty, "a loss is told if there is one")
                try require(try !tellsLoss(device), "a loss is told once")
            }
        }
    }

    @Test func `one more connection that is closed at once costs no request anything`() throws {
        try withTemporaryDirectory { directory in
            let twins = try Twins(in: directory, closesAdditional: true)
            var uri = twins.server.uri
            uri.reconnectSeconds = 0
            let device = try NBDDevice.open(uri, isWritable: true)
            try write(device, at: 4096)
            try twins.whileBusy(device) {
                try twins.useSecond(device)
                try write(device, at: 8192)
                try require(try !tellsLoss(device), "no loss is told")
            }
            #expect(try readBytes(device, at: 512, count: 1) == [0])
        }
    }

    @Test func `one more connection that leads elsewhere is not used, and the first one goes on`() throws {
        try withTemporaryDirectory { directory in
            let connections = Locked(0)
            let twins = try Twins(in: directory) { number in
                connections.withLock { $0 = max($0, number) }
                return .init(size: number == 1 ? 1 << 20 : 2 << 20, flags: Twins.flags)
            }
            let device = try NBDDevice.open(twins.server.uri, isWritable: true)
            try twins.whileBusy(device) {
                try require(
                    eventually {
                        _ = try? readBytes(device, at: 512, count: 512)
                        return connections.withLock { $0 } == 2
                    }, "a second connection is tried")
                for _ in 0..<100 { _ = try readBytes(device, at: 512, count: 512) }
            }
            _ = try readBytes(device, at: 512, count: 512)
            #expect(twins.count(NBD.Command.read, on: 2) == 0)
        }
    }

    @Test func `a disk under another name is not taken for the same`() throws {
        try withTemporaryDirectory { directory in
            let facts: @Sendable (Int) -> HostileServer.Facts = { .init(name: $0 == 1 ? "one" : "other") }
            let server = try HostileServer(in: directory, mode: .simple, facts: facts) { connection, number in
                if number == 1 { _ = connection.request() } else { connection.serveHonestly() }
            }
            let device = try NBDDevice.open(server.uri)
            for _ in 0..<2 {
                let error = #expect(throws: BlockError.self) { try readBytes(device, at: 0, count: 1) }
                #expect(error?.message.contains("now called \"other\"") == true, "\(String(describing: error))")
            }
        }
    }

    /// What a slow server does with it later would overwrite what was written meanwhile.
    @Test func `a write that is late is not sent again, and a read is`() throws {
        try withTemporaryDirectory { directory in
            let seen = Locked<[UInt16]>([])
            let server = try HostileServer(in: directory, mode: .simple, isConcurrent: true, facts: { _ in .init() }) {
                connection, number in
                while let (request, _) = connection.request() {
                    seen.withLock { $0.append(request.command) }
                    if number <= 2 { continue }
                    connection.simple(request, payload: request.command == NBD.Command.read ? [7] : [])
                }
            }
            var uri = server.uri
            uri.timeoutSeconds = 1
            let device = try NBDDevice.open(uri, isWritable: true)
            let error = #expect(throws: BlockError.self) { try write(device, at: 0) }
            #expect(
                error?.kind == .inputOutput && error?.message.contains("no answer to writing") == true,
                "\(String(describing: error))")
            #expect(seen.withLock { $0 } == [NBD.Command.write])
            #expect(try readBytes(device, at: 0, count: 1) == [7])
            #expect(try tellsLoss(device))
            #expect(try !tellsLoss(device))
            let reads = [UInt16](repeating: NBD.Command.read, count: 2)
            #expect(seen.withLock { $0.filter { $0 != NBD.Command.flush } } == [NBD.Command.write] + reads)
        }
    }

    @Test func `a loss is told to every flush that was under way`() throws {
        try withTemporaryDirectory { directory in
            let server = try HostileServer(in: directory, mode: .simple) { connection, number in
                if number > 1 { return connection.serveHonestly() }
                if let (request, _) = connection.request() { connection.simple(request) }
                _ = connection.request()
                _ = connection.request()
            }
            let device = try NBDDevice.open(server.uri, isWritable: true)
            try write(device, at: 0)
            let told = Locked(0)
            try concurrently(
                (0..<2).map { _ in { if try tellsLoss(device) { told.withLock { $0 += 1 } } } })
            #expect(told.withLock { $0 } == 2)
            #expect(try !tellsLoss(device))
        }
    }

    @Test func `a durable write without FUA fails when it may be lost, and tells nobody else's loss`() throws {
        try withTemporaryDirectory { directory in
            let server = try HostileServer(in: directory, mode: .simple) { connection, number in
                if number > 2 { return connection.serveHonestly() }
                // The answer to a write, none to what follows.
                if let (request, _) = connection.request() { connection.simple(request) }
                _ = connection.request()
            }
            let device = try NBDDevice.open(server.uri, isWritable: true)
            #expect(throws: BlockError.self) { try write(device, at: 0, durable: true) }
            try write(device, at: 0)
            _ = try readBytes(device, at: 0, count: 1)
            // What was lost before it is not its own.
            try write(device, at: 0, durable: true)
            #expect(try tellsLoss(device))
            #expect(try !tellsLoss(device))
        }
    }

    @Test func `a loss is told where the server has no flush, too`() throws {
        try withTemporaryDirectory { directory in
            let server = try HostileServer(in: directory, mode: .simple, flags: .hasFlags) { connection, number in
                if number > 1 { return connection.serveHonestly() }
                for _ in 0..<2 { if let (request, _) = connection.request() { connection.simple(request) } }
                _ = connection.request()
            }
            let device = try NBDDevice.open(server.uri, isWritable: true)
            try write(device, at: 0)
            #expect(try !tellsLoss(device))
            try write(device, at: 0)
            _ = try readBytes(device, at: 0, count: 1)
            #expect(try tellsLoss(device))
            #expect(try !tellsLoss(device))
        }
    }

    /// The server takes its next connection when the first one has ended.
    @Test func `a server that stops sees its connection end before the next one`() throws {
        try withTemporaryDirectory { directory in
            let isFirst = Locked(false)
            let server = try HostileServer(in: directory, mode: .simple) { connection, number in
                if number > 1 { return connection.serveHonestly() }
                _ = connection.request()
                isFirst.withLock { $0 = true }
                if let (second, _) = connection.request() {
                    connection.simple(second, error: NBD.ErrorValue.shutdown)
                }
                while connection.request() != nil {}
            }
            let device = try NBDDevice.open(server.uri)
            try concurrently([
                { try requireEqual(try readBytes(device, at: 1, count: 1), [1], "the first") },
                {
                    try require(eventually { isFirst.withLock { $0 } }, "the first request arrives")
                    try requireEqual(try readBytes(device, at: 2, count: 1), [2], "the second")
                },
            ])
        }
    }

    @Test(arguments: [(HeaderMode.structured, UInt64(256 << 20)), (.extended, 1 << 30)])
    func `zeroing and trimming ask for no more than can be answered in time`(mode: HeaderMode, most: UInt64) throws {
        try withTemporaryDirectory { directory in
            let lengths = Locked<[UInt64]>([])
            let flags: NBD.TransmissionFlags = [.hasFlags, .sendTrim, .sendWriteZeroes]
            let server = try HostileServer(in: directory, mode: mode, size: 8 << 30, flags: flags) {
                connection, _ in
                while let (request, _) = connection.request(), request.command != NBD.Command.disconnect {
                    lengths.withLock { $0.append(request.length) }
                    connection.chunk(request, NBD.Chunk.none, [])
                }
            }
            let device = try NBDDevice.open(server.uri, isWritable: true)
            try device.zero(0..<(2 << 30), .mayPunch)
            try device.discard(0..<(2 << 30), durable: false)
            let expected = [UInt64](repeating: most, count: Int(2 * (2 << 30) / most))
            #expect(lengths.withLock { $0 } == expected)
        }
    }
}
