// Known defects of NBD servers in the field, each as a test here. Those of the option phase are with the handshake's.
import Block
import Glibc
import LinuxIO
import NBD
import Testing

@Suite struct DefectClassTests {
    private func encoded(_ request: Request, _ mode: HeaderMode) -> [UInt8] {
        var bytes: [UInt8] = []
        request.encode(mode, into: &bytes)
        return bytes
    }

    @Test(arguments: [HeaderMode.simple, .structured, .extended])
    func `nbdkit 9d82aa4f: clients that queue reads, get an error and vanish harm nobody`(_ mode: HeaderMode) throws {
        let pattern = try PatternDevice(size: 8 << 20, seed: 1)
        let slow = ScriptedDevice(
            [UInt8](repeating: 1, count: 4 << 20), beforeRead: { (_) throws(BlockError) in usleep(2000) })
        let (stable, _) = try stableFile(4 << 20)
        for device in [pattern, slow, stable] as [any BlockDevice] {
            let server = try TestServer(device)
            let witness = try server.enter(mode)
            for round in 0..<15 {
                let client = try server.enter(mode)
                var queue = encoded(Request(NBD.Command.read, cookie: 0, offset: .max, length: 512), mode)
                for cookie in UInt64(1)...64 {
                    queue += encoded(Request(NBD.Command.read, cookie: cookie, offset: cookie, length: 262_144), mode)
                }
                try client.send(queue)
                if round % 3 == 1 { _ = try client.receive(16) }
                if round % 3 == 2 {
                    // A reset instead of an orderly end: unread replies are thrown away.
                    var linger = linger(l_onoff: 1, l_linger: 0)
                    setsockopt(
                        client.socket.number, SOL_SOCKET, SO_LINGER, &linger, socklen_t(MemoryLayout<linger>.size))
                }
                shutdown(client.socket.number, Int32(SHUT_RDWR))
            }
            #expect(try witness.read(0, 4096).error == nil)
            try witness.leave()
            #expect(server.isDeserted())
            try server.expectsService()
        }
    }

    @Test(arguments: [HeaderMode.simple, .structured, .extended])
    func `CVE-2013-7441, qemu 083: a disconnect after every byte of a session harms nobody`(_ mode: HeaderMode) throws {
        let device = try NamelessFile.memory(size: 1 << 20)
        let server = try TestServer(device)
        var session = UInt32(3).wire + TestClient.option(NBD.Option.list)
        if mode != .simple {
            session += TestClient.option(mode == .extended ? NBD.Option.extendedHeaders : NBD.Option.structuredReply)
            session += TestClient.option(NBD.Option.setMetaContext, Payload.contexts("", ["base:allocation"]))
        }
        session += TestClient.option(NBD.Option.go, Payload.go("", [1, 2]))
        session += encoded(Request(NBD.Command.read, cookie: 1, offset: 0, length: 70_000), mode)
        let flags: NBD.CommandFlags = mode == .extended ? .payloadLength : []
        session += encoded(Request(NBD.Command.write, flags: flags, cookie: 2, offset: 0, length: 40), mode)
        session += [UInt8](repeating: 9, count: 40)
        session += encoded(Request(NBD.Command.write, flags: flags.union(.fua), cookie: 3, offset: 0, length: 20), mode)
        session += [UInt8](repeating: 9, count: 20)
        session += encoded(Request(NBD.Command.blockStatus, cookie: 4, offset: 0, length: 4096), mode)
        session += encoded(Request(NBD.Command.flush, cookie: 5), mode)
        for count in 0...session.count {
            let client = try server.connect()
            try? client.send(Array(session[..<count]))
            // Half of them close while the server still sends, half after they have said that nothing follows.
            if count % 2 == 0 { shutdown(client.socket.number, Int32(SHUT_WR)) }
            if count % 4 == 0 { _ = try client.receiveAll() }
        }
        #expect(server.isDeserted())
        try server.expectsService()
    }

    @Test func `CVE-2019-14850: nothing is read from a disk before a client has chosen it`() throws {
        let device = ScriptedDevice(
            [UInt8](repeating: 1, count: 4096),
            beforeRead: { (_) throws(BlockError) in Issue.record("the disk was read") })
        let server = try TestServer(device)
        for _ in 0..<50 {
            let client = try server.connect()
            try client.greet()
            _ = try client.ask(option: NBD.Option.list)
            _ = try client.ask(option: NBD.Option.info, Payload.go(""))
        }
        #expect(server.isDeserted())
        #expect(device.prefetched.withLock { $0.isEmpty })
    }

    @Test(arguments: [HeaderMode.simple, .structured, .extended])
    func `CVE-2019-14851: commands in an odd order are answered`(_ mode: HeaderMode) throws {
        let client = try TestServer(try NamelessFile.memory(size: 1 << 20)).enter(mode, contexts: ["base:allocation"])
        var dice = Dice(seed: 14851)
        for cookie in UInt64(1)...2000 {
            let command = UInt16.random(in: 3...9, using: &dice)
            let edges: [UInt64] = [
                0, 1, 511, 4096, 1 << 20, (1 << 20) - 1, 1 << 31, 1 << 32, .max, .max - 511, 1 << 63,
            ]
            var length = edges.randomElement(using: &dice) ?? 0
            if mode != .extended { length &= 0xFFFF_FFFF }
            let flags = NBD.CommandFlags(rawValue: UInt16.random(in: 0...31, using: &dice))
            let offset = edges.randomElement(using: &dice) ?? 0
            try client.submit(Request(command, flags: flags, cookie: cookie, offset: offset, length: length))
            if cookie % 20 == 0 { #expect(try client.receiveAll(20).count == 20) }
        }
        try client.leave()
    }

    @Test(arguments: [HeaderMode.structured, .extended])
    func `CVE-2020-10761: over-long error texts are cut, at a character`(_ mode: HeaderMode) throws {
        for text in [String(repeating: "e", count: 5000), "xyz" + String(repeating: "ü€😀", count: 1000), ""] {
            let device = ScriptedDevice(
                [UInt8](repeating: 1, count: 65536),
                beforeRead: { (_) throws(BlockError) in throw BlockError(.inputOutput, text) },
                beforeWrite: { (_) throws(BlockError) in throw BlockError(.noSpace, text) })
            let client = try TestServer(device).enter(mode)
            for answer in [try client.read(0, 4096), try client.read(0, 4096, .dontFragment), try client.write(0, [1])]
            {
                #expect(answer.error != nil)
                let told = answer.texts.first ?? "none"
                #expect(text.hasPrefix(told) && told.utf8.count <= 4096)
                #expect(text.utf8.count <= 4096 ? told == text : told.utf8.count > 4096 - 4)
            }
        }
    }

    @Test func `CVE-2024-7409: idle and half-open sockets at a stop are closed`() throws {
        let server = try TestServer(try PatternDevice(size: 1 << 20))
        var clients = try (0..<10).map { _ in try server.connect() }
        for _ in 0..<10 {
            let client = try server.connect()
            try client.greet()
            try client.send([0x49, 0x48])
            clients.append(client)
        }
        for mode in [HeaderMode.simple, .structured, .extended] {
            let client = try server.enter(mode)
            try client.send([0x25, 0x60])
            clients.append(client)
        }
        let half = try server.enter(.simple)
        shutdown(half.socket.number, Int32(SHUT_RD))
        clients.append(half)
        server.server.stop(graceSeconds: 20)
        #expect(server.server.clients.isEmpty)
        for client in clients { #expect((try? client.receiveAll()) != nil) }
    }

    @Test func `a client that never reads its replies is ended by a stop`() throws {
        let server = try TestServer(try PatternDevice(size: 8 << 20)) { $0.stallSeconds = 1 }
        let client = try server.enter(.simple)
        var queue: [UInt8] = []
        for cookie in UInt64(1)...32 {
            queue += encoded(Request(NBD.Command.read, cookie: cookie, offset: 0, length: 1 << 20), .simple)
        }
        try client.send(queue)
        #expect(server.isDeserted())
        try server.expectsService()
    }

    // MARK: - An image that shrinks while it is served

    @Test(arguments: [HeaderMode.structured, .extended], [65536, 262_144, 300_000, 1 << 20] as [UInt64])
    func `a shrunken image is an error with its offset, never other bytes`(_ mode: HeaderMode, _ length: UInt64) throws
    {
        let (device, file) = try stableFile(1 << 20)
        let expected = try content(device, 0, 1 << 20)
        let server = try TestServer(device)
        let client = try server.enter(mode)
        #expect(isSame(try client.read(0, 1 << 20).data, expected[...]))
        let end = (1 << 20) - length / 2
        #expect(ftruncate(file, off_t(end)) == 0)
        let answer = try client.read((1 << 20) - length, length)
        #expect(answer.error == NBD.ErrorValue.inputOutput)
        let at = try #require(answer.errorOffsets.first)
        #expect(at <= end)
        let known = Int(at - ((1 << 20) - length))
        #expect(isSame(Array(answer.data[..<known]), expected[Int((1 << 20) - length)..<Int(at)]))
        // The connection goes on: what is still there can be read.
        #expect(isSame(try client.read(0, 65536).data, expected[..<65536]))
        #expect(try client.read(end, 512).error == NBD.ErrorValue.inputOutput)
        try client.leave()
    }

    @Test(arguments: [512, 65536, 262_144, 1 << 20] as [UInt64])
    func `a shrunken image is an error in simple mode`(_ length: UInt64) throws {
        let (device, file) = try stableFile(1 << 20)
        let client = try TestServer(device).enter(.simple)
        #expect(ftruncate(file, off_t((1 << 20) - length / 2)) == 0)
        #expect(try client.read((1 << 20) - length, length).error == NBD.ErrorValue.inputOutput)
        #expect(try client.read(0, 512).error == nil)
    }

    @Test(arguments: [HeaderMode.simple, .structured, .extended])
    func `a shrunken image that is written, too, is an error`(_ mode: HeaderMode) throws {
        let file = try Descriptor.open("/var/tmp", O_TMPFILE | O_RDWR)
        #expect(ftruncate(file.number, 1 << 20) == 0)
        var options = RawOptions()
        options.isWritable = true
        let client = try TestServer(try RawFileDevice(file, name: "shrinking", options)).enter(mode)
        #expect(ftruncate(file.number, 500_000) == 0)
        for (offset, length) in [(499_999, 2), (400_000, 200_000), (0, 1 << 20), (900_000, 4096)] as [(UInt64, UInt64)]
        {
            #expect(try client.read(offset, length).error == NBD.ErrorValue.inputOutput)
        }
        #expect(try client.read(0, 500_000).error == nil)
    }
}
