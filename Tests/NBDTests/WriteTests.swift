// Commands that change the disk: written bytes are the disk's bytes, refused ones leave it and the stream as they were.
import Block
import LinuxIO
import NBD
import Synchronization
import Testing

private let allModes = [HeaderMode.simple, .structured, .extended]

@Suite struct WriteTests {
    private func pattern(_ count: Int, seed: UInt64) throws -> [UInt8] {
        try content(try PatternDevice(size: UInt64(count), seed: seed), 0, UInt64(count))
    }

    /// Lengths that travel inline with the header, in one piece, and in several.
    static let writes: [(UInt64, Int)] = [
        (0, 1), (3, 512), (5000, 4096), (100_000, 65536 - 28), (200_000, 65537), (300_001, 262_144), (700_000, 262_145),
        (1 << 20, 1 << 20),
    ]

    @Test(arguments: allModes, ["memory", "scripted", "overlay"])
    func `writes of every size end up where they belong`(_ mode: HeaderMode, _ kind: String) throws {
        let size = UInt64(3 << 20)
        var expected = try pattern(Int(size), seed: 1)
        let device: any BlockDevice
        switch kind {
        case "scripted": device = ScriptedDevice(expected)
        case "overlay":
            device = try OverlayDevice(
                try PatternDevice(size: size, seed: 1),
                scratch: try NamelessFile.scratch(size: size, directory: "/var/tmp"))
        default:
            device = try NamelessFile.memory(size: size)
            try expected.withUnsafeBytes { try device.write($0, at: 0, durable: false) }
        }
        let client = try TestServer(device).enter(mode)
        for flags in [NBD.CommandFlags([]), .fua] {
            for (index, (offset, count)) in Self.writes.enumerated() {
                let data = try pattern(count, seed: UInt64(10 + index) + UInt64(flags.rawValue) * 100)
                #expect(try client.write(offset, data, flags).error == nil)
                expected.replaceSubrange(Int(offset)..<(Int(offset) + count), with: data)
            }
        }
        let result = try content(device, 0, size)
        #expect(isSame(result, expected[...]))
        #expect(isSame(try client.read(0, size).data, expected[...]))
    }

    @Test(arguments: allModes) func `many writes and reads in flight keep their bytes apart`(_ mode: HeaderMode) throws
    {
        let device = try NamelessFile.memory(size: 4 << 20)
        let client = try TestServer(device).enter(mode)
        let flags: NBD.CommandFlags = mode == .extended ? .payloadLength : []
        for index in 0..<200 {
            let data = [UInt8](repeating: UInt8(index), count: 16384)
            let offset = UInt64(index) * 16384
            try client.submit(
                Request(NBD.Command.write, flags: flags, cookie: UInt64(index), offset: offset, length: 16384), data)
        }
        for (_, answer) in try client.receiveAll(200) { #expect(answer.error == nil) }
        for index in 0..<200 {
            #expect(isAll(try client.read(UInt64(index) * 16384, 16384).data, UInt8(index)))
        }
    }

    @Test(arguments: allModes) func `writes past the end have no space and are taken off the stream`(_ mode: HeaderMode)
        throws
    {
        let device = ScriptedDevice([UInt8](repeating: 5, count: 100_000))
        let client = try TestServer(device).enter(mode)
        let cases: [(UInt64, Int)] = [
            (100_000, 1), (99_999, 2), (.max, 512), (.max - 511, 512), (1 << 63, 200_000), (0, 100_001),
        ]
        for (offset, count) in cases {
            let data = [UInt8](repeating: 9, count: count)
            #expect(try client.write(offset, data).error == NBD.ErrorValue.noSpace)
        }
        #expect(try client.write(0, []).error == NBD.ErrorValue.invalid)
        #expect(isAll(device.bytes, 5))
    }

    @Test(arguments: allModes) func `a write above 64 MiB is too large and taken off the stream`(_ mode: HeaderMode)
        throws
    {
        let device = try NamelessFile.memory(size: 100 << 20)
        let client = try TestServer(device).enter(mode)
        let data = [UInt8](repeating: 9, count: 64 << 20 + 1)
        #expect(try client.write(0, data).error == NBD.ErrorValue.invalid)
        #expect(try client.write(1, Array(data.dropLast())).error == nil)
        #expect(try client.read(0, 4).data == [0, 9, 9, 9])
    }

    @Test(arguments: allModes) func `a read-only export refuses every change and stays in step`(_ mode: HeaderMode)
        throws
    {
        let device = ScriptedDevice([UInt8](repeating: 5, count: 1 << 20))
        var options = ExportOptions()
        options.isReadOnly = true
        let client = try TestServer(device, options: options).enter(mode)
        for count in [1, 4096, 65536, 300_000] {
            let data = [UInt8](repeating: 9, count: count)
            #expect(try client.write(0, data, .fua).error == NBD.ErrorValue.notPermitted)
        }
        for command in [NBD.Command.trim, NBD.Command.writeZeroes] {
            let answer = try client.ask(Request(command, cookie: 1, offset: 0, length: 4096))
            #expect(answer.error == NBD.ErrorValue.notPermitted)
        }
        #expect(try client.ask(Request(NBD.Command.flush, cookie: 2)).error == nil)
        #expect(isAll(device.bytes, 5))
    }

    @Test(arguments: allModes) func `FUA and FLUSH reach the device`(_ mode: HeaderMode) throws {
        let device = ScriptedDevice([UInt8](repeating: 0, count: 1 << 20))
        let client = try TestServer(device).enter(mode)
        func flushes() -> Int { device.flushes.load(ordering: .relaxed) }
        #expect(try client.write(0, [1, 2, 3]).error == nil)
        #expect(flushes() == 0)
        #expect(try client.write(0, [1, 2, 3], .fua).error == nil)
        #expect(flushes() == 1)
        #expect(try client.write(0, [UInt8](repeating: 1, count: 400_000), .fua).error == nil)
        #expect(flushes() == 2)
        let zeroes = Request(NBD.Command.writeZeroes, flags: .fua, cookie: 1, offset: 0, length: 10)
        #expect(try client.ask(zeroes).error == nil)
        #expect(flushes() == 3)
        #expect(try client.ask(Request(NBD.Command.flush, cookie: 1)).error == nil)
        #expect(flushes() == 4)
    }

    @Test(arguments: allModes) func `WRITE_ZEROES zeroes its range and nothing else`(_ mode: HeaderMode) throws {
        for flags in [NBD.CommandFlags([]), .noHole, .fastZero, [.noHole, .fua]] {
            let device = try NamelessFile.scratch(size: 1 << 20, directory: "/var/tmp")
            try [UInt8](repeating: 5, count: 1 << 20).withUnsafeBytes { try device.write($0, at: 0, durable: false) }
            let client = try TestServer(device).enter(mode)
            let request = Request(NBD.Command.writeZeroes, flags: flags, cookie: 1, offset: 4097, length: 300_000)
            #expect(try client.ask(request).error == nil)
            let expected = (0..<(1 << 20)).map { (4097..<304_097).contains($0) ? UInt8(0) : 5 }
            let result = try content(device, 0, 1 << 20)
            #expect(isSame(result, expected[...]))
        }
    }

    @Test(arguments: allModes) func `FAST_ZERO is refused where writing would be no slower`(_ mode: HeaderMode) throws {
        let device = ScriptedDevice([UInt8](repeating: 5, count: 8192))
        let client = try TestServer(device).enter(mode)
        let fast = Request(NBD.Command.writeZeroes, flags: .fastZero, cookie: 1, offset: 0, length: 4096)
        #expect(try client.ask(fast).error == NBD.ErrorValue.notSupported)
        #expect(isAll(device.bytes, 5))
        let slow = Request(NBD.Command.writeZeroes, cookie: 1, offset: 0, length: 4096)
        #expect(try client.ask(slow).error == nil)
        #expect(device.bytes[..<4096].allSatisfy { $0 == 0 })
    }

    @Test(arguments: allModes) func `TRIM discards its range, and only inside the disk`(_ mode: HeaderMode) throws {
        let device = ScriptedDevice([UInt8](repeating: 5, count: 8192))
        let client = try TestServer(device).enter(mode)
        #expect(try client.ask(Request(NBD.Command.trim, cookie: 1, offset: 512, length: 1024)).error == nil)
        #expect(device.discarded.withLock { $0 } == [512..<1536])
        for (offset, length) in [(8192, 1), (0, 8193), (.max, 512), (1 << 63, 4096)] as [(UInt64, UInt64)] {
            let trim = try client.ask(Request(NBD.Command.trim, cookie: 1, offset: offset, length: length))
            #expect(trim.error == NBD.ErrorValue.invalid)
            let zeroes = try client.ask(Request(NBD.Command.writeZeroes, cookie: 1, offset: offset, length: length))
            #expect(zeroes.error == NBD.ErrorValue.noSpace)
        }
        #expect(device.discarded.withLock { $0.count } == 1)
    }

    @Test(arguments: allModes) func `EIO and ENOSPC from below are told, and the next write is taken`(
        _ mode: HeaderMode
    ) throws {
        let lower = ScriptedDevice([UInt8](repeating: 5, count: 1 << 20))
        let device = FaultDevice(
            lower,
            plan: FaultPlan([
                .init(.writeError(.noSpace), range: 0..<4096), .init(.writeError(.inputOutput), range: 8192..<8193),
                .init(.flushError(.inputOutput), range: 0..<1),
            ]))
        let client = try TestServer(device).enter(mode)
        #expect(try client.write(0, [1]).error == NBD.ErrorValue.noSpace)
        #expect(try client.write(8000, [UInt8](repeating: 1, count: 600_000)).error == NBD.ErrorValue.inputOutput)
        #expect(try client.ask(Request(NBD.Command.flush, cookie: 1)).error == NBD.ErrorValue.inputOutput)
        let zeroes = Request(NBD.Command.writeZeroes, cookie: 1, offset: 4095, length: 1)
        #expect(try client.ask(zeroes).error == NBD.ErrorValue.noSpace)
        #expect(try client.write(4096, [1, 2]).error == nil)
    }
}
