// BLOCK_STATUS: 32- and 64-bit forms, several contexts, the payload filter, and the edges of arithmetic.
import Block
import LinuxIO
import NBD
import Testing

private let gigabyte: UInt64 = 1 << 30

@Suite struct BlockStatusTests {
    private static let both = ["base:allocation", "qemu:allocation-depth"]

    private func status(
        _ client: TestClient, _ offset: UInt64, _ length: UInt64, _ flags: NBD.CommandFlags = []
    ) throws -> Answer {
        try client.ask(Request(NBD.Command.blockStatus, flags: flags, cookie: 5, offset: offset, length: length))
    }

    /// What the device itself says, cut to the server's limit of extents.
    private func expected(_ device: any BlockDevice, _ range: Range<UInt64>, capacity: Int = 8192) throws -> [[UInt64]]
    {
        var list = StatusList(capacity: capacity)
        _ = try device.status(.allocation, of: range, into: &list)
        return list.extents.map { [$0.length, UInt64($0.value)] }
    }

    private func plain(_ extents: [StatusExtent]?) -> [[UInt64]] {
        (extents ?? []).map { [$0.length, UInt64($0.value)] }
    }

    @Test(arguments: [HeaderMode.structured, .extended])
    func `status tells what the device knows, unaligned ends included`(_ mode: HeaderMode) throws {
        let device = try PatternDevice(size: 16 << 20, seed: 4, allocatedShare: 0.4)
        let client = try TestServer(device).enter(mode, contexts: ["base:allocation"])
        for (offset, length) in [(0, 16 << 20), (1, 65536), (65535, 2), ((16 << 20) - 1, 1), (12345, 1 << 20)]
            as [(UInt64, UInt64)]
        {
            let answer = try status(client, offset, length)
            let wanted = try expected(device, offset..<(offset + length))
            #expect(plain(answer.status[0]) == wanted)
            #expect(answer.chunks.count == 1)
            let first = try status(client, offset, length, .requestOne)
            #expect(plain(first.status[0]) == Array(wanted.prefix(1)))
        }
    }

    @Test(arguments: [HeaderMode.structured, .extended])
    func `every chosen context is answered, and no other`(_ mode: HeaderMode) throws {
        let lower = try PatternDevice(size: 1 << 20, seed: 4)
        let device = try OverlayDevice(lower, scratch: try NamelessFile.scratch(size: 1 << 20, directory: "/var/tmp"))
        let server = try TestServer(device)
        let writer = try server.enter(mode)
        #expect(try writer.write(65536, [UInt8](repeating: 1, count: 65536)).error == nil)
        let client = try server.enter(mode, contexts: Self.both)
        #expect(client.contexts == ["base:allocation": 0, "qemu:allocation-depth": 1])
        let answer = try status(client, 0, 1 << 20)
        #expect(plain(answer.status[1]) == [[65536, 2], [65536, 1], [(1 << 20) - 131_072, 2]])
        #expect(answer.status[0]?.reduce(0) { $0 + $1.length } == 1 << 20)
        let depth = try server.enter(mode, contexts: ["qemu:allocation-depth"])
        #expect(Set(try status(depth, 0, 1 << 20).status.keys) == [1])
    }

    @Test(arguments: [HeaderMode.simple, .structured, .extended])
    func `status without a context is invalid`(_ mode: HeaderMode) throws {
        let client = try TestServer(try PatternDevice(size: gigabyte)).enter(mode)
        #expect(try status(client, 0, 4096).error == NBD.ErrorValue.invalid)
        #expect(try client.read(0, 1).error == nil)
    }

    @Test func `a full list ends the answer early, and the next request goes on from there`() throws {
        let device = try PatternDevice(size: 2 * gigabyte, seed: 4, allocatedShare: 0.5)
        let client = try TestServer(device).enter(.structured, contexts: ["base:allocation"])
        let extents = try #require(try status(client, 0, UInt64(UInt32.max) / 2).status[0])
        #expect(extents.count == 8192)
        let end = extents.reduce(0) { $0 + $1.length }
        let next = try status(client, end, 1 << 20)
        let wanted = try expected(device, end..<(end + 1 << 20))
        #expect(plain(next.status[0]) == wanted)
        #expect(next.status[0]?.first?.value != extents.last?.value)
    }

    @Test(arguments: [HeaderMode.structured, .extended], ["data", "holes", "mixed"])
    func `CVE-2025-47711, CVE-2025-47712: status of 2^32-1, unaligned, on an 8 GiB disk`(
        _ mode: HeaderMode, _ kind: String
    ) throws {
        let share: Double = kind == "data" ? 1 : kind == "holes" ? 0 : 0.999
        let device = try PatternDevice(size: 8 * gigabyte, seed: 1, allocatedShare: share)
        let client = try TestServer(device).enter(mode, contexts: Self.both)
        for offset in [0, 1, 511, 4095, 65535, 4 * gigabyte - 1, 4 * gigabyte, 4 * gigabyte + 1] as [UInt64] {
            for length in [1 << 31, (1 << 31) + 1, 0xFFFF_FFFF, 0xFFFF_FFFE, 0xFFFF_F001] as [UInt64]
            where offset + length <= 8 * gigabyte {
                let answer = try status(client, offset, length)
                #expect(answer.error == nil)
                let wanted = try expected(device, offset..<(offset + length))
                #expect(plain(answer.status[0]) == wanted)
                #expect(plain(answer.status[1]) == [[length, 1]])
            }
        }
        #expect(try status(client, 4 * gigabyte + 2, 0xFFFF_FFFF).error == NBD.ErrorValue.invalid)
    }

    @Test func `64-bit lengths are answered in one extent`() throws {
        let size = UInt64(Int64.max)
        let device = ScriptedDevice([], configure: { $0.size = size })
        let client = try TestServer(device).enter(.extended, contexts: Self.both)
        for (offset, length) in [(0, size), (1, size - 1), (size - 1, 1), (12345, 1 << 62)] as [(UInt64, UInt64)] {
            let answer = try status(client, offset, length)
            #expect(plain(answer.status[0]) == [[length, 0]])
            #expect(plain(answer.status[1]) == [[length, 1]])
        }
        for (offset, length) in [(0, 1 << 63), (1, size), (size, 1), (.max, .max), (1 << 63, 1 << 63), (0, 0)]
            as [(UInt64, UInt64)]
        {
            #expect(try status(client, offset, length).error == NBD.ErrorValue.invalid)
        }
    }

    // MARK: - The payload filter

    private func filtered(_ client: TestClient, _ payload: [UInt8], length: UInt64? = nil) throws -> Answer {
        let request = Request(
            NBD.Command.blockStatus, flags: .payloadLength, cookie: 6, offset: 0,
            length: length ?? UInt64(payload.count))
        return try client.ask(request, payload)
    }

    @Test func `the payload filter chooses contexts for one request`() throws {
        let client = try TestServer(try PatternDevice(size: gigabyte)).enter(.extended, contexts: Self.both)
        let depth = try filtered(client, bytes(gigabyte, UInt32(1)))
        #expect(depth.status.mapValues { plain($0) } == [1: [[gigabyte, 1]]])
        let both = try filtered(client, bytes(UInt64(512), UInt32(1), UInt32(0)))
        #expect(both.status.mapValues { plain($0) } == [0: [[512, 0]], 1: [[512, 1]]])
        #expect(Set(try status(client, 0, 512).status.keys) == [0, 1])
    }

    static let badFilters: [[UInt8]] = [
        [], [0], [UInt8](repeating: 0, count: 7), bytes(UInt64(512)), bytes(UInt64(512), [UInt8(0)]),
        bytes(UInt64(512), [UInt8(0), 0, 0]), bytes(UInt64(512), UInt32(2)), bytes(UInt64(512), UInt32.max),
        bytes(UInt64(512), UInt32(0), UInt32(0)), bytes(UInt64(512), UInt32(0), UInt32(1), UInt32(1)),
        bytes(UInt64(512), UInt32(0), UInt32(1), UInt32(2)), bytes(gigabyte + 1, UInt32(0)),
        bytes(UInt64.max, UInt32(0)),
        bytes(UInt64(0), UInt32(0)), [UInt8](repeating: 0, count: 200_000),
    ]

    @Test(arguments: badFilters) func `a bad filter is invalid and the stream stays in step`(_ payload: [UInt8]) throws
    {
        let client = try TestServer(try PatternDevice(size: gigabyte)).enter(.extended, contexts: Self.both)
        #expect(try filtered(client, payload).error == NBD.ErrorValue.invalid)
        #expect(plain(try filtered(client, bytes(UInt64(512), UInt32(1))).status[1]) == [[512, 1]])
    }

    @Test func `a filter where only one context was negotiated`() throws {
        let client = try TestServer(try PatternDevice(size: gigabyte)).enter(
            .extended, contexts: ["qemu:allocation-depth"])
        #expect(try filtered(client, bytes(UInt64(512), UInt32(0))).error == NBD.ErrorValue.invalid)
        #expect(plain(try filtered(client, bytes(UInt64(512), UInt32(1))).status[1]) == [[512, 1]])
    }

    @Test func `the payload flag means nothing in 32-bit framing`() throws {
        let client = try TestServer(try PatternDevice(size: gigabyte)).enter(.structured, contexts: Self.both)
        #expect(try status(client, 0, 512, .payloadLength).error == nil)
    }

    @Test func `an error of the device is the answer`() throws {
        let device = ScriptedDevice([UInt8](repeating: 0, count: 4096), configure: { $0.dirtyBitmaps = ["gone"] })
        let client = try TestServer(device).enter(.structured, contexts: ["base:allocation", "qemu:dirty-bitmap:gone"])
        let answer = try status(client, 0, 4096)
        #expect(answer.error == NBD.ErrorValue.invalid)
        #expect(answer.status.isEmpty)
    }
}
