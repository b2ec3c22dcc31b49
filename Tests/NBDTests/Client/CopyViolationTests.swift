// A copy whose server breaks the protocol in the middle: it ends with what the server did, and is not tried again.
import Backup
import Block
import LinuxIO
import NBD
import Support
import Testing

@Suite struct CopyViolationTests {
    /// Answers some reads, each of its kind, and then as no server does.
    private func copy(_ violate: @escaping @Sendable (HostileConnection, Request) -> Void) throws -> BlockError {
        try withTemporaryDirectory { directory in
            let size: UInt64 = 4 << 20
            let connections = Locked(0)
            let server = try HostileServer(in: directory, mode: .structured, size: size) { connection, number in
                connections.withLock { $0 = max($0, number) }
                var reads = 0
                while let (request, _) = connection.request() {
                    switch request.command {
                    case NBD.Command.disconnect: return
                    case NBD.Command.read:
                        reads += 1
                        if reads == 4 { return violate(connection, request) }
                        connection.data(request, request.offset, Int(request.length))
                    case NBD.Command.blockStatus:
                        let extent = UInt32(truncatingIfNeeded: request.length).wire + UInt32(0).wire
                        connection.chunk(
                            request, NBD.Chunk.blockStatus, HostileServer.contextID.wire + extent)
                    default: connection.chunk(request, NBD.Chunk.none, [])
                    }
                }
            }
            let target = try NamelessFile.memory(size: size)
            let copier = try Copier(source: try CopySource.open(server.uri), target: DeviceTarget(target))
            do throws(BlockError) { _ = try copier.run() } catch {
                // Another connection would be no better.
                try require(connections.withLock { $0 } == 1, "it was tried again: \(error)")
                return error
            }
            throw CheckFailure("the copy went well")
        }
    }

    @Test func anAnswerToWhatNobodyAskedEndsTheCopy() throws {
        let error = try copy { connection, request in
            connection.chunk(request, NBD.Chunk.none, [], cookie: request.cookie &+ 4096)
            while connection.request() != nil {}
        }
        #expect(error.kind != .shutdown, "\(error)")
    }

    @Test func dataThatLiesElsewhereEndsTheCopy() throws {
        let error = try copy { connection, request in
            connection.data(request, request.offset + request.length, 512)
            while connection.request() != nil {}
        }
        #expect(error.kind != .shutdown, "\(error)")
    }

    @Test func dataThatComesTwiceEndsTheCopy() throws {
        let error = try copy { connection, request in
            connection.data(request, request.offset, 4096, done: false)
            connection.data(request, request.offset, Int(request.length))
            while connection.request() != nil {}
        }
        #expect(error.kind != .shutdown, "\(error)")
    }
}
