// What a client does when its server lies: an error that names the server, and never a trap, a hang or wrong data.
import Block
import CLinux
import Glibc
import LinuxIO
import NBD
import Support
import Testing

private typealias Chunk = NBD.Chunk

/// A lie told in answer to the first request.
struct Lie: Sendable, CustomTestStringConvertible {
    enum Question: Sendable { case read, flush, status }

    let testDescription: String
    let mode: HeaderMode
    let question: Question
    let tell: @Sendable (HostileConnection, Request) -> Void

    init(
        _ name: String, _ mode: HeaderMode = .structured, _ question: Question = .read,
        _ tell: @escaping @Sendable (HostileConnection, Request) -> Void
    ) {
        testDescription = name
        self.mode = mode
        self.question = question
        self.tell = tell
    }
}

/// Reads in these tests ask for so many bytes from so far.
private let offset: UInt64 = 4096
private let count = 4096

private func extents(_ pairs: (UInt32, UInt32)..., id: UInt32 = HostileServer.contextID) -> [UInt8] {
    id.wire + pairs.flatMap { $0.0.wire + $0.1.wire }
}

private let readLies: [Lie] = [
    Lie("data before what was asked") { $0.data($1, $1.offset - 1, 4096) },
    Lie("data behind what was asked") { $0.data($1, $1.offset + 1, 4096) },
    Lie("data of another place") { $0.data($1, 0, 4096) },
    Lie("data past the end of numbers") { $0.data($1, .max - 10, 4096) },
    Lie("more data than was asked for") { $0.data($1, $1.offset, 4097) },
    Lie("less data than was asked for") { $0.data($1, $1.offset, 4095) },
    Lie("data twice") {
        $0.data($1, $1.offset, 2048, done: false)
        $0.data($1, $1.offset, 2048, done: false)
    },
    Lie("data that overlaps") {
        $0.data($1, $1.offset + 1024, 1024, done: false)
        $0.data($1, $1.offset + 100, 1024, done: false)
    },
    Lie("data that overlaps what follows") {
        $0.data($1, $1.offset + 1024, 1024, done: false)
        $0.data($1, $1.offset + 2000, 1024, done: false)
    },
    Lie("a hole over data") {
        $0.data($1, $1.offset, 2048, done: false)
        $0.chunk($1, Chunk.offsetHole, $1.offset.wire + UInt32(4096).wire)
    },
    Lie("a hole of no length") { $0.chunk($1, Chunk.offsetHole, $1.offset.wire + UInt32(0).wire) },
    Lie("a hole that is too long") { $0.chunk($1, Chunk.offsetHole, $1.offset.wire + UInt32.max.wire) },
    Lie("a hole with a long payload") { $0.chunk($1, Chunk.offsetHole, [UInt8](repeating: 0, count: 13)) },
    Lie("data without data") { $0.chunk($1, Chunk.offsetData, $1.offset.wire) },
    Lie("data without an offset") { $0.chunk($1, Chunk.offsetData, [1, 2, 3]) },
    Lie("no data at all") { $0.chunk($1, Chunk.none, []) },
    Lie("nothing with a payload") { $0.chunk($1, Chunk.none, [0]) },
    Lie("nothing, and not the end") { $0.chunk($1, Chunk.none, [], done: false) },
    Lie("a chunk of 4 GiB") { $0.chunk($1, Chunk.offsetData, $1.offset.wire, length: 0xFFFF_FFFF) },
    Lie("an endless chunk", .extended) { $0.chunk($1, Chunk.offsetData, $1.offset.wire, length: .max) },
    Lie("another offset in the header", .extended) {
        $0.chunk($1, Chunk.offsetData, $1.offset.wire + [1], offset: $1.offset + 1)
    },
    Lie("a structured reply with extended headers", .extended) {
        $0.send(bytes(NBD.structuredReplyMagic, UInt16(1), UInt16(0), $1.cookie, UInt32(0)) + [0, 0, 0, 0])
    },
    Lie("a simple reply with extended headers", .extended) { $0.simple($1) },
    Lie("a simple reply to a read") { $0.simple($1, payload: [UInt8](repeating: 1, count: 4096)) },
    Lie("a structured reply without having agreed", .simple) {
        $0.send(
            bytes(NBD.structuredReplyMagic, UInt16(1), UInt16(0), $1.cookie, UInt32(0)))
    },
    Lie("the status of blocks") { $0.chunk($1, Chunk.blockStatus, extents((4096, 0))) },
    Lie("a type that does not exist") { $0.chunk($1, 77, [1, 2, 3]) },
    Lie("a request nobody sent") { $0.chunk($1, Chunk.none, [], cookie: $1.cookie &+ 64) },
    Lie("no request's cookie") { $0.chunk($1, Chunk.none, [], cookie: 0) },
    Lie("nothing that is a reply") {
        $0.send([UInt8](repeating: 0xFF, count: 64)); _ = $1
    },
    Lie("an error without a number") { $0.chunk($1, Chunk.error, UInt32(0).wire + UInt16(0).wire) },
    Lie("an error that is cut off") { $0.chunk($1, Chunk.error, [0, 0, 0, 5]) },
    Lie("an error whose text is longer than it") { $0.chunk($1, Chunk.error, UInt32(5).wire + UInt16(9).wire + [65]) },
    Lie("an error of a gigabyte") { $0.chunk($1, Chunk.error, UInt32(5).wire + UInt16(0).wire, length: 1 << 30) },
    Lie("an error outside of what was asked") {
        $0.chunk($1, Chunk.errorOffset, UInt32(5).wire + UInt16(0).wire + ($1.offset + 4096).wire)
    },
    Lie("errors without end") {
        for _ in 0..<5000 { $0.chunk($1, Chunk.error, UInt32(5).wire + UInt16(0).wire, done: false) }
    },
    Lie("too many pieces") {
        for index in 0..<UInt64(1100) { $0.data($1, $1.offset + 1 + 2 * index, 1, done: false) }
    },
]

private let otherLies: [Lie] = [
    Lie("data where none was asked for", .structured, .flush) { $0.data($1, 0, 512) },
    Lie("a hole where none was asked for", .extended, .flush) {
        $0.chunk($1, Chunk.offsetHole, UInt64(0).wire + UInt32(1).wire)
    },
    Lie("an extent of no length", .structured, .status) { $0.chunk($1, Chunk.blockStatus, extents((0, 0))) },
    Lie("an extent of no length further on", .structured, .status) {
        $0.chunk($1, Chunk.blockStatus, extents((4096, 0), (0, 3)))
    },
    Lie("a context that was not agreed on", .structured, .status) {
        $0.chunk($1, Chunk.blockStatus, extents((4096, 0), id: 1))
    },
    Lie("a context twice", .structured, .status) {
        $0.chunk($1, Chunk.blockStatus, extents((4096, 0)), done: false)
        $0.chunk($1, Chunk.blockStatus, extents((4096, 0)))
    },
    Lie("extents behind the end of what was asked", .structured, .status) {
        $0.chunk($1, Chunk.blockStatus, extents((UInt32($1.length), 0), (4096, 3)))
    },
    Lie("an extent behind the end of the disk", .structured, .status) {
        $0.chunk($1, Chunk.blockStatus, extents((UInt32($1.length) + 1, 0)))
    },
    Lie("no extents", .structured, .status) { $0.chunk($1, Chunk.blockStatus, extents()) },
    Lie("half an extent", .structured, .status) { $0.chunk($1, Chunk.blockStatus, extents((4096, 0)) + [0, 0]) },
    Lie("no status at all", .structured, .status) { $0.chunk($1, Chunk.none, []) },
    Lie("a simple reply to a question", .structured, .status) { $0.simple($1) },
    Lie("a short status with extended headers", .extended, .status) {
        $0.chunk($1, Chunk.blockStatus, extents((4096, 0)))
    },
    Lie("a wrong number of extents", .extended, .status) {
        let payload = bytes(HostileServer.contextID, UInt32(2), UInt64(4096), UInt64(0))
        $0.chunk($1, Chunk.blockStatusExtended, payload)
    },
    Lie("a status of a gigabyte", .extended, .status) {
        let payload = bytes(HostileServer.contextID, UInt32(2), UInt64(4096), UInt64(0))
        $0.chunk($1, Chunk.blockStatusExtended, payload, length: 8 + 16 << 26)
    },
    Lie("an extent as long as numbers go", .extended, .status) {
        let payload = bytes(HostileServer.contextID, UInt32(1), UInt64.max, UInt64(0))
        $0.chunk($1, Chunk.blockStatusExtended, payload)
    },
]

@Suite struct HostileServerTests {
    @Test(arguments: readLies + otherLies)
    func `a lie is an error, and the connection is used no more`(lie: Lie) throws {
        try withTemporaryDirectory { directory in
            let server = try HostileServer(in: directory, mode: lie.mode) { connection, number in
                if number > 1 { return connection.serveHonestly() }
                if let (request, _) = connection.request() { lie.tell(connection, request) }
                // The client leaves, not this server.
                while connection.request() != nil {}
            }
            let device = try NBDDevice.open(server.uri, isWritable: true)
            let error = #expect(throws: BlockError.self) {
                switch lie.question {
                case .read: _ = try readBytes(device, at: offset, count: count)
                case .flush: try device.flush()
                case .status:
                    var list = StatusList(capacity: 16)
                    _ = try device.status(.allocation, of: 0..<device.info.size, into: &list)
                }
            }
            #expect(
                error?.kind == .corrupt && error?.message.contains(server.uri.description) == true,
                "\(String(describing: error))")
            // On a new connection, everything is as it should be.
            let expected = (0..<count).map { UInt8(truncatingIfNeeded: Int(offset) + $0) }
            #expect(try readBytes(device, at: offset, count: count) == expected)
        }
    }

    @Test(arguments: [HeaderMode.structured, .extended])
    func `an answer may come in any order and any pieces`(mode: HeaderMode) throws {
        try withTemporaryDirectory { directory in
            let server = try HostileServer(in: directory, mode: mode) { connection, _ in
                var dice = Dice(seed: 5)
                while let (request, _) = connection.request(), request.command == NBD.Command.read {
                    var edges = Set((0..<60).map { _ in UInt64.random(in: 1..<request.length, using: &dice) })
                    edges.insert(0)
                    let sorted = edges.sorted() + [request.length]
                    for (start, end) in zip(sorted, sorted.dropFirst()).shuffled(using: &dice) {
                        connection.data(request, request.offset + start, Int(end - start), done: false)
                    }
                    connection.chunk(request, Chunk.none, [])
                }
            }
            let device = try NBDDevice.open(server.uri)
            for (from, count) in [(4096, 4096), (1, 300_000), (17, 70_001)] {
                let expected = (0..<count).map { UInt8(truncatingIfNeeded: from + $0) }
                #expect(try readBytes(device, at: UInt64(from), count: count) == expected)
            }
        }
    }

    @Test func `answers to several requests may be mixed and turned around`() throws {
        try withTemporaryDirectory { directory in
            let server = try HostileServer(in: directory, mode: .structured) { connection, _ in
                while let (first, _) = connection.request(), let (second, _) = connection.request() {
                    connection.data(second, second.offset + 512, 512, done: false)
                    connection.data(first, first.offset, 100, done: false)
                    connection.data(second, second.offset, 512)
                    connection.data(first, first.offset + 100, 924)
                }
            }
            let device = try NBDDevice.open(server.uri)
            try concurrently(
                (0..<2).map { thread in
                    {
                        for step in 0..<50 {
                            let from = UInt64(thread * 100_000 + step * 1024)
                            let expected = (0..<1024).map { UInt8(truncatingIfNeeded: Int(from) + $0) }
                            try requireEqual(try readBytes(device, at: from, count: 1024), expected, "at \(from)")
                        }
                    }
                })
        }
    }

    @Test func `an error has its kind and the server's words, and ends nothing`() throws {
        try withTemporaryDirectory { directory in
            let server = try HostileServer(in: directory, mode: .structured) { connection, number in
                guard number == 1, let (request, _) = connection.request() else { return }
                connection.data(request, request.offset, 1024, done: false)
                let text = "the disk is \u{1b}tired"
                connection.chunk(
                    request, Chunk.errorOffset,
                    bytes(NBD.ErrorValue.noMemory, UInt16(text.utf8.count), text, request.offset + 1024), done: false)
                connection.chunk(request, Chunk.none, [])
                connection.serveHonestly()
            }
            let device = try NBDDevice.open(server.uri)
            let error = #expect(throws: BlockError.self) { _ = try readBytes(device, at: 0, count: 4096) }
            #expect(error?.kind == .noMemory)
            #expect(error?.message.contains("at 1024: the disk is ?tired") == true, "\(String(describing: error))")
            #expect(try readBytes(device, at: 7, count: 1) == [7])
        }
    }

    @Test(arguments: [0, 1, 19, 20, 27, 28, 100, 1000])
    func `an answer that is cut off is asked for again`(count: Int) throws {
        try withTemporaryDirectory { directory in
            let server = try HostileServer(in: directory, mode: .structured) { connection, number in
                if number > 1 { return connection.serveHonestly() }
                guard let (request, _) = connection.request() else { return }
                let whole = bytes(
                    NBD.structuredReplyMagic, UInt16(1), Chunk.offsetData, request.cookie, UInt32(4104),
                    request.offset, [UInt8](repeating: 0xEE, count: 4096))
                connection.send(Array(whole[..<count]))
            }
            let device = try NBDDevice.open(server.uri)
            #expect(try readBytes(device, at: 0, count: 4096) == (0..<4096).map { UInt8(truncatingIfNeeded: $0) })
        }
    }

    @Test func `a server that is shutting down is left for the next one`() throws {
        try withTemporaryDirectory { directory in
            let server = try HostileServer(in: directory, mode: .simple) { connection, number in
                if number > 2 { return connection.serveHonestly() }
                guard let (request, _) = connection.request() else { return }
                connection.simple(request, error: NBD.ErrorValue.shutdown)
            }
            let device = try NBDDevice.open(server.uri)
            #expect(try readBytes(device, at: 300, count: 2) == [44, 45])
        }
    }

    @Test func `a request that ends every connection is given up`() throws {
        try withTemporaryDirectory { directory in
            let server = try HostileServer(in: directory, mode: .simple) { connection, _ in _ = connection.request() }
            let device = try NBDDevice.open(server.uri)
            let error = #expect(throws: BlockError.self) { _ = try readBytes(device, at: 0, count: 512) }
            #expect(error?.message.contains("5 attempts") == true, "\(String(describing: error))")
        }
    }

    @Test(.timeLimit(.minutes(1)))
    func `a handshake that comes byte by byte is given up`() throws {
        try withTemporaryDirectory { directory in
            let path = directory.file("trickle")
            let listener = try ListeningSocket.listen(on: .unix(path: path))
            let descriptor = listener[0].descriptor
            try startThread(name: "trickle") {
                let number = dg_accept(descriptor.number)
                guard number >= 0 else { return }
                let client = TestClient(Descriptor(owning: number))
                // A greeting, and the start of a long answer.
                let said = bytes(
                    NBD.initMagic, NBD.optionMagic, UInt16(3), NBD.optionReplyMagic, NBD.Option.extendedHeaders,
                    NBD.OptionReply.ack, UInt32(8192))
                for byte in said + [UInt8](repeating: 0, count: 8192) {
                    guard (try? client.send([byte])) != nil else { return }
                    usleep(5000)
                }
            }
            var uri = NBDURI(.unix(path: path))
            uri.timeoutSeconds = 1
            let error = #expect(throws: BlockError.self) { try ClientConnector(uri).connect() }
            #expect(error?.message.contains("waiting for the server") == true, "\(String(describing: error))")
        }
    }

    @Test func `without FUA a durable write is followed by a flush`() throws {
        try withTemporaryDirectory { directory in
            let seen = Locked<[UInt16]>([])
            let server = try HostileServer(in: directory, mode: .structured) { connection, _ in
                while let (request, _) = connection.request() {
                    seen.withLock { $0.append(request.command) }
                    connection.simple(request)
                }
            }
            let device = try NBDDevice.open(server.uri, isWritable: true)
            try [UInt8](repeating: 1, count: 512).withUnsafeBytes { try device.write($0, at: 0, durable: true) }
            #expect(seen.withLock { $0 } == [NBD.Command.write, NBD.Command.flush])
            // Neither zeroing nor trimming was offered: zeros are written, discarding is no more than advice.
            try device.zero(512..<1024, .mayPunch)
            try device.discard(0..<512, durable: false)
            #expect(seen.withLock { $0 } == [NBD.Command.write, NBD.Command.flush, NBD.Command.write])
        }
    }
}
