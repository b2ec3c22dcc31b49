// A channel with many requests in flight: by one thread with tokens, by many threads, and when its server goes.
import Block
import Glibc
import LinuxIO
import NBD
import Support
import Testing

private func channel(to server: HostileServer) throws -> ClientChannel { try ClientConnector(server.uri).connect() }

@Suite struct ClientChannelTests {
    @Test func `one thread keeps many reads and writes in flight`() throws {
        try withTemporaryDirectory { directory in
            let content = patternBytes(8 << 20, seed: 3)
            let target = ScriptedDevice([UInt8](repeating: 0x5A, count: content.count))
            let source = try TestServer(ScriptedDevice(content))
            let sink = try TestServer(target)
            let reader = try ClientConnector(source.listen(in: directory)).connect()
            let writer = try ClientConnector(sink.listen(in: directory)).connect()
            let piece = 65536
            let memory = UnsafeMutableRawBufferPointer.allocate(byteCount: 32 * piece, alignment: 4096)
            defer { memory.deallocate() }
            func buffer(_ token: UInt64) -> UnsafeMutableRawBufferPointer {
                UnsafeMutableRawBufferPointer(rebasing: memory[Int(token) % 32 * piece..<(Int(token) % 32 + 1) * piece])
            }
            let count = UInt64(content.count / piece)
            var next: UInt64 = 0
            while next < min(32, count) {
                try reader.submitRead(into: buffer(next), at: next * UInt64(piece), token: next)
                next += 1
            }
            var copied = 0
            while let completion = reader.nextCompletion() {
                if let error = completion.error { throw error.error }
                let token = completion.token
                let bytes = UnsafeRawBufferPointer(buffer(token))
                try writer.submitWrite(bytes, at: token * UInt64(piece), durable: false, token: token)
                let written = try #require(writer.nextCompletion())
                #expect(written.error == nil && written.token == token)
                copied += 1
                // The buffer is free for the piece that comes to lie in it.
                let following = token + 32
                if following < count {
                    try reader.submitRead(into: buffer(following), at: following * UInt64(piece), token: following)
                }
            }
            #expect(copied == Int(count))
            #expect(isSame(target.bytes, content[...]))
            reader.close()
            writer.close()
            source.server.stop(graceSeconds: 1)
            sink.server.stop(graceSeconds: 1)
        }
    }

    /// A server that answers one request after the other takes nothing while its answer has no way out.
    @Test func `long writes and long answers do not wait for each other`() throws {
        try withTemporaryDirectory { directory in
            let server = try HostileServer(in: directory, mode: .structured, size: 64 << 20) { connection, _ in
                connection.serveHonestly()
            }
            let channel = try channel(to: server)
            let memory = UnsafeMutableRawBufferPointer.allocate(byteCount: 16 << 20, alignment: 4096)
            defer { memory.deallocate() }
            memory.initializeMemory(as: UInt8.self, repeating: 7)
            for token in 0..<UInt64(8) {
                let part = UnsafeMutableRawBufferPointer(rebasing: memory[Int(token) << 20..<(Int(token) + 1) << 20])
                try channel.submitRead(into: part, at: token << 20, token: token)
            }
            let payload = UnsafeRawBufferPointer(rebasing: memory[(8 << 20)...])
            try channel.submitWrite(payload, at: 0, durable: false, token: 100)
            var tokens: Set<UInt64> = []
            while let completion = channel.nextCompletion() {
                #expect(completion.error == nil)
                tokens.insert(completion.token)
            }
            #expect(tokens == Set<UInt64>(0..<8).union([100]))
            let isRight = (0..<(8 << 20)).allSatisfy { memory[$0] == UInt8(truncatingIfNeeded: $0) }
            #expect(isRight)
            channel.close()
        }
    }

    @Test func `more requests than can be in flight wait for their turn`() throws {
        try withTemporaryDirectory { directory in
            let server = try TestServer(ScriptedDevice(patternBytes(1 << 20, seed: 4)))
            let channel = try ClientConnector(server.listen(in: directory)).connect()
            let memory = UnsafeMutableRawBufferPointer.allocate(byteCount: 1 << 20, alignment: 4096)
            defer { memory.deallocate() }
            var ended = 0
            for token in 0..<UInt64(1024) {
                let part = UnsafeMutableRawBufferPointer(
                    rebasing: memory[Int(token) * 1024..<(Int(token) + 1) * 1024])
                try channel.submitRead(into: part, at: token * 1024, token: token)
            }
            while let completion = channel.nextCompletion() {
                #expect(completion.error == nil)
                ended += 1
            }
            #expect(ended == 1024)
            #expect(isSame(Array(memory), patternBytes(1 << 20, seed: 4)[...]))
            channel.close()
            server.server.stop(graceSeconds: 1)
        }
    }

    @Test func `when the server goes, every request ends once, with the reason`() throws {
        try withTemporaryDirectory { directory in
            let server = try HostileServer(in: directory, mode: .structured) { connection, _ in
                for _ in 0..<3 {
                    if let (request, _) = connection.request() {
                        connection.data(request, request.offset, Int(request.length))
                    }
                }
                _ = connection.request()
            }
            let channel = try channel(to: server)
            let memory = UnsafeMutableRawBufferPointer.allocate(byteCount: 20 * 512, alignment: 512)
            defer { memory.deallocate() }
            for token in 0..<UInt64(20) {
                let part = UnsafeMutableRawBufferPointer(rebasing: memory[Int(token) * 512..<(Int(token) + 1) * 512])
                try channel.submitRead(into: part, at: token * 512, token: token)
            }
            var good = 0
            var tokens: [UInt64] = []
            while let completion = channel.nextCompletion() {
                tokens.append(completion.token)
                switch completion.error {
                case nil: good += 1
                case .broken?: continue
                case .some(let other): Issue.record("\(other)")
                }
            }
            #expect(good == 3 && tokens.sorted() == Array(0..<20))
            #expect(channel.isBroken)
            #expect(throws: ChannelError.self) {
                try channel.submitRead(into: memory, at: 0, token: 1)
            }
        }
    }

    @Test func `an answer that is late ends the connection`() throws {
        try withTemporaryDirectory { directory in
            let server = try HostileServer(in: directory, mode: .simple) { connection, _ in
                while connection.request() != nil {}
            }
            var uri = server.uri
            uri.timeoutSeconds = 1
            let channel = try ClientConnector(uri).connect()
            let memory = UnsafeMutableRawBufferPointer.allocate(byteCount: 512, alignment: 512)
            defer { memory.deallocate() }
            try channel.submitRead(into: memory, at: 0, token: 9)
            let completion = try #require(channel.nextCompletion())
            guard case .late(let error)? = completion.error else { throw Violation("\(completion)") }
            #expect(error.message.contains("no answer to reading 512 bytes at 0"), "\(error)")
        }
    }

    @Test(.timeLimit(.minutes(1)))
    func `an answer that is forgotten is late, however much else is answered`() throws {
        try withTemporaryDirectory { directory in
            let server = try HostileServer(in: directory, mode: .structured) { connection, _ in
                _ = connection.request()
                connection.serveHonestly()
            }
            var uri = server.uri
            uri.timeoutSeconds = 1
            let channel = try ClientConnector(uri).connect()
            let memory = UnsafeMutableRawBufferPointer.allocate(byteCount: 66048, alignment: 512)
            defer { memory.deallocate() }
            let forgotten = UnsafeMutableRawBufferPointer(rebasing: memory[65536...])
            let other = UnsafeMutableRawBufferPointer(rebasing: memory[..<65536])
            try channel.submitRead(into: forgotten, at: 0, token: 0)
            var token: UInt64 = 1
            try channel.submitRead(into: other, at: 0, token: token)
            var ends: [Completion] = []
            while let completion = channel.nextCompletion() {
                if completion.error != nil { ends.append(completion) }
                if completion.error != nil || completion.token != token { continue }
                token += 1
                try channel.submitRead(into: other, at: 0, token: token)
            }
            guard case .late? = ends.first(where: { $0.token == 0 })?.error else { throw Violation("\(ends)") }
        }
    }

    @Test func `closing ends what is in flight`() throws {
        try withTemporaryDirectory { directory in
            let server = try HostileServer(in: directory, mode: .simple) { connection, _ in
                while connection.request() != nil {}
            }
            let channel = try channel(to: server)
            let memory = UnsafeMutableRawBufferPointer.allocate(byteCount: 512, alignment: 512)
            defer { memory.deallocate() }
            try channel.submitRead(into: memory, at: 0, token: 9)
            channel.close()
            let first = channel.nextCompletion()
            #expect(first?.token == 9)
            let last = channel.nextCompletion()
            #expect(last == nil)
        }
    }

    @Test func `what lies outside of the export is not asked for`() throws {
        try withTemporaryDirectory { directory in
            let server = try HostileServer(in: directory, mode: .simple, size: 4096) {
                $0.serveHonestly(); _ = $1
            }
            let channel = try channel(to: server)
            let memory = UnsafeMutableRawBufferPointer.allocate(byteCount: 512, alignment: 512)
            defer { memory.deallocate() }
            for offset in [UInt64(3585), 4096, 4097, .max] {
                #expect(throws: ChannelError.self) { try channel.submitRead(into: memory, at: offset, token: 1) }
            }
            let last = channel.nextCompletion()
            #expect(last == nil)
            channel.close()
        }
    }
}
