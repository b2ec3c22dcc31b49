// READ in every mode: sizes on both sides of each limit, holes, errors in the middle, and disks that change meanwhile.
import Block
import Glibc
import LinuxIO
import NBD
import Testing

private let allModes = [HeaderMode.simple, .structured, .extended]
private let megabyte: UInt64 = 1 << 20

/// The bytes of a range of a device, read around the server.
func content(_ device: any BlockDevice, _ offset: UInt64, _ length: UInt64) throws -> [UInt8] {
    var bytes = [UInt8](repeating: 0xCD, count: Int(length))
    var failure: BlockError?
    bytes.withUnsafeMutableBytes { buffer in
        do throws(BlockError) { try device.read(into: buffer, at: offset) } catch { failure = error }
    }
    if let failure { throw failure }
    return bytes
}

/// A sparse file without a name: data of varying length every 300 000 bytes, nothing between.
func sparseFile(_ size: UInt64) throws -> RawFileDevice {
    let device = try NamelessFile.scratch(size: size, directory: "/var/tmp")
    let pattern = try content(try PatternDevice(size: 200_000, seed: 5), 0, 200_000)
    var offset: UInt64 = 1000
    while offset < size {
        let count = min(Int(size - offset), 1 + Int(offset % 199_999))
        try pattern.withUnsafeBytes { try device.write(.init(rebasing: $0[..<count]), at: offset, durable: false) }
        offset += 300_000
    }
    return device
}

/// The same file read-only, as the server sends it by reference.
func stableFile(_ size: UInt64) throws -> (device: RawFileDevice, descriptor: Int32) {
    let file = try Descriptor.open("/var/tmp", O_TMPFILE | O_RDWR)
    let bytes = try content(try PatternDevice(size: size, seed: 6), 0, size)
    guard pwrite(file.number, bytes, bytes.count, 0) == bytes.count else { throw BlockError(errno: errno, "preparing") }
    return (try RawFileDevice(file, name: "stable"), file.number)
}

@Suite struct ReadTests {
    /// Offset and length on both sides of a sector, 32 KiB, 64 KiB, 256 KiB and 1 MiB.
    static let ranges: [(UInt64, UInt64)] = [
        (0, 1), (0, 512), (511, 2), (0, 32767), (0, 32768), (1, 32768), (65535, 32769), (0, 65536), (65536, 65537),
        (3, 262_143), (0, 262_144), (0, 262_145), (262_143, 262_146), (1, 1 << 20), (4 * megabyte - 1, 1),
        (0, 4 * megabyte),
    ]

    @Test(arguments: allModes, ["pattern", "writable file", "stable file", "faulty", "scripted"])
    func `reads of every size are complete and right`(_ mode: HeaderMode, _ kind: String) throws {
        let size = 4 * megabyte
        let pattern = try PatternDevice(size: size, seed: 3, allocatedShare: 0.5)
        let device: any BlockDevice =
            switch kind {
            case "pattern": pattern
            case "writable file": try sparseFile(size)
            case "stable file": try stableFile(size).device
            case "faulty":
                FaultDevice(pattern, plan: FaultPlan([.init(.readError(.inputOutput), range: 0..<1, probability: 0)]))
            default: ScriptedDevice(try content(pattern, 0, size))
            }
        let expected = try content(device, 0, size)
        let client = try TestServer(device).enter(mode)
        for (offset, length) in Self.ranges {
            let answer = try client.read(offset, length)
            #expect(answer.error == nil)
            #expect(isSame(answer.data, expected[Int(offset)..<Int(offset + length)]), "\(length) at \(offset)")
        }
        // All at once: replies come in any order, each for its own request.
        for (index, range) in Self.ranges.enumerated() {
            try client.submit(Request(NBD.Command.read, cookie: UInt64(100 + index), offset: range.0, length: range.1))
        }
        for (cookie, answer) in try client.receiveAll(Self.ranges.count) {
            let (offset, length) = Self.ranges[Int(cookie) - 100]
            #expect(isSame(answer.data, expected[Int(offset)..<Int(offset + length)]), "\(length) at \(offset)")
        }
        try client.leave()
    }

    @Test(arguments: allModes) func `64 MiB are read, a byte more is too large`(_ mode: HeaderMode) throws {
        let device = try sparseFile(65 * megabyte)
        let client = try TestServer(device).enter(mode)
        let answer = try client.read(7, 64 * megabyte)
        #expect(answer.error == nil)
        let expected = try content(device, 7, 64 * megabyte)
        #expect(isSame(answer.data, expected[...]))
        #expect(try client.read(7, 64 * megabyte + 1).error == NBD.ErrorValue.overflow)
        #expect(try client.read(0, 1).error == nil)
    }

    @Test(arguments: [HeaderMode.structured, .extended]) func `holes travel as hole chunks`(_ mode: HeaderMode) throws {
        let device = try PatternDevice(size: 8 * megabyte, seed: 2, allocatedShare: 0.3)
        let client = try TestServer(device).enter(mode)
        let answer = try client.read(1000, 7 * megabyte)
        let expected = try content(device, 1000, 7 * megabyte)
        #expect(isSame(answer.data, expected[...]))
        var list = StatusList(capacity: 10000)
        _ = try device.status(.allocation, of: 1000..<(1000 + 7 * megabyte), into: &list)
        let holes = list.extents.filter { $0.value != 0 }.reduce(0) { $0 + $1.length }
        let sent = answer.chunks.filter { $0.type == NBD.Chunk.offsetHole }.reduce(0) { $0 + $1.length }
        #expect(holes > megabyte)
        #expect(sent == holes)
    }

    @Test(arguments: [HeaderMode.structured, .extended]) func `DF answers in one chunk or not at all`(
        _ mode: HeaderMode
    ) throws {
        let device = try PatternDevice(size: 4 * megabyte, seed: 2, allocatedShare: 0.3)
        let scripted = ScriptedDevice(try content(device, 0, 4 * megabyte))
        for device in [device, scripted] as [any BlockDevice] {
            let client = try TestServer(device).enter(mode)
            for (offset, length) in [(0, 1), (0, 65536), (65535, 131_074), (1, 262_144)] as [(UInt64, UInt64)] {
                let answer = try client.read(offset, length, .dontFragment)
                #expect(answer.chunks == [.init(type: NBD.Chunk.offsetData, offset: offset, length: length)])
                let expected = try content(device, offset, length)
                #expect(isSame(answer.data, expected[...]))
            }
            #expect(try client.read(0, 262_145, .dontFragment).error == NBD.ErrorValue.overflow)
        }
    }

    @Test(arguments: allModes) func `reads outside the disk are invalid`(_ mode: HeaderMode) throws {
        let client = try TestServer(try PatternDevice(size: megabyte + 1)).enter(mode)
        var cases: [(UInt64, UInt64)] = [
            (megabyte + 1, 1), (megabyte, 2), (0, megabyte + 2), (.max, 1), (.max - 3, 4), (.max, 0xFFFF_FFFF),
            (1 << 63, 512),
            (0, 0), (.max, 0),
        ]
        if mode == .extended { cases += [(1, .max), (.max, .max), (1 << 63, 1 << 63), (0, 1 << 63), (512, 1 << 40)] }
        for (offset, length) in cases {
            #expect(try client.read(offset, length).error == NBD.ErrorValue.invalid, "\(length) at \(offset)")
        }
        #expect(try client.read(megabyte, 1).error == nil)
    }

    @Test(arguments: [HeaderMode.structured, .extended])
    func `an error costs its piece: offset and text are told, the rest is right`(_ mode: HeaderMode) throws {
        let bad = 600_000..<UInt64(600_001)
        let pattern = try PatternDevice(size: 2 * megabyte, seed: 9)
        let expected = try content(pattern, 0, 2 * megabyte)
        let device = ScriptedDevice(
            expected,
            beforeRead: { (range) throws(BlockError) in
                if range.overlaps(bad) { throw BlockError(.inputOutput, "bad sector at 600000") }
            })
        let client = try TestServer(device).enter(mode)
        let answer = try client.read(100, 2 * megabyte - 100)
        #expect(answer.error == NBD.ErrorValue.inputOutput)
        #expect(answer.texts == ["bad sector at 600000"])
        let at = try #require(answer.errorOffsets.first)
        #expect(at <= 600_000)
        for chunk in answer.chunks where chunk.type == NBD.Chunk.offsetData {
            let (from, to) = (Int(chunk.offset), Int(chunk.offset + chunk.length))
            #expect(isSame(Array(answer.data[(from - 100)..<(to - 100)]), expected[from..<to]))
        }
        #expect(try client.read(0, 4096).error == nil)
    }

    @Test func `an error is an error in simple mode, small or long`() throws {
        let pattern = try PatternDevice(size: 2 * megabyte, seed: 9)
        let device = FaultDevice(pattern, plan: FaultPlan([.init(.readError(.inputOutput), range: 600_000..<600_001)]))
        let client = try TestServer(device).enter(.simple)
        for (offset, length) in [(600_000, 1), (599_000, 4096), (0, 2 * megabyte)] as [(UInt64, UInt64)] {
            #expect(try client.read(offset, length).error == NBD.ErrorValue.inputOutput)
        }
        let answer = try client.read(700_000, 300_000)
        let expected = try content(pattern, 700_000, 300_000)
        #expect(isSame(answer.data, expected[...]))
    }

    @Test(
        arguments: allModes,
        [FileTraits([]), .tryable])
    func `what moved while it was read is read again`(_ mode: HeaderMode, _ traits: FileTraits) throws {
        for moves in [1, 3, .max] {
            for length in [UInt64(4096), 40_000, 262_144, megabyte] {
                let device = try MovingDevice(size: Int(megabyte), moves: moves, traits: traits)
                let client = try TestServer(device).enter(mode)
                let answer = try client.read(0, length)
                #expect(answer.error == nil)
                #expect(isAll(answer.data, 0x11), "\(length) bytes after \(moves) moves")
            }
        }
    }

    @Test(arguments: allModes) func `CACHE is advice within the disk`(_ mode: HeaderMode) throws {
        let device = ScriptedDevice([UInt8](repeating: 1, count: 8192))
        let client = try TestServer(device).enter(mode)
        #expect(try client.ask(Request(NBD.Command.cache, cookie: 1, offset: 4096, length: 4096)).error == nil)
        #expect(device.prefetched.withLock { $0 } == [4096..<8192])
        for (offset, length) in [(4096, 4097), (8192, 1), (.max, 1), (0, 0)] as [(UInt64, UInt64)] {
            let answer = try client.ask(Request(NBD.Command.cache, cookie: 1, offset: offset, length: length))
            #expect(answer.error == NBD.ErrorValue.invalid)
        }
    }
}
