// What single filters do beyond the contract: where they cut, what they refuse, which faults they inject.
import Block
import LinuxIO
import Support
import Testing

private func memory(_ content: [UInt8]) throws -> RawFileDevice {
    let device = try NamelessFile.memory(size: UInt64(content.count))
    try write(content, to: device, at: 0)
    return device
}

private func write(_ bytes: [UInt8], to device: any BlockDevice, at offset: UInt64) throws {
    try bytes.withUnsafeBytes { try device.write($0, at: offset, durable: false) }
}

@Suite struct SliceAndResizeTests {
    @Test func sliceRefusesWhatLiesOutside() throws {
        let lower = try PatternDevice(size: 1000)
        for range in [0..<1001, 1000..<1001, 5..<5, 999..<UInt64.max] as [Range<UInt64>] {
            try requireError(.outOfRange, "slice \(range)") { _ = try SliceDevice(lower, range: range, label: "x") }
        }
        #expect(try SliceDevice(lower, range: 999..<1000, label: "last").info.name == "pattern:1000 last")
    }

    @Test(arguments: [(0, 8192, 4096), (512, 8192, 512), (0, 8193, 1), (4096, 8192, 4096), (2048, 4096, 2048)])
    func sliceBlocksShrinkToWhatDivides(start: UInt64, end: UInt64, block: UInt32) throws {
        let slice = try SliceDevice(try PatternDevice(size: 1 << 20), range: start..<end, label: "x")
        #expect(slice.info.preferredBlock == block)
        #expect(slice.info.minimumBlock == 1)
    }

    @Test func sliceWritesWhereItLies() throws {
        let content = patternBytes(10_000, seed: 1)
        let lower = try memory(content)
        let slice = try SliceDevice(lower, range: 1000..<2000, label: "x")
        try write([1, 2, 3], to: slice, at: 0)
        try slice.zero(998..<1000, [])
        var expected = content
        expected.replaceSubrange(1000..<1003, with: [1, 2, 3])
        expected.replaceSubrange(1998..<2000, with: [0, 0])
        try requireEqual(try readBytes(lower, at: 0, count: 10_000), expected, "the whole disk")
    }

    @Test func nothingButZerosFitsPastTheEnd() throws {
        let content = patternBytes(5000, seed: 2)
        let lower = try memory(content)
        let longer = try ResizedDevice(lower, size: 8192)
        try requireError(.noSpace, "data past the end") { try write([1], to: longer, at: 5000) }
        try requireError(.noSpace, "data across the end") { try write([7, 7, 7], to: longer, at: 4998) }
        try requireEqual(try readBytes(lower, at: 0, count: 5000), content, "after refused writes")
        try write([7, 7, 0, 0], to: longer, at: 4998)
        try longer.zero(4999..<8192, [])
        try longer.discard(5000..<8192, durable: true)
        #expect(try readBytes(longer, at: 4997, count: 5) == [content[4997], 7, 0, 0, 0])
    }

    @Test func bytesPastTheEndAreAHoleInNoLayer() throws {
        let longer = try ResizedDevice(try PatternDevice(size: 5000), size: 8000)
        let allocation = try status(longer, .allocation, of: 0..<8000).extents
        #expect(allocation.map(\.length) == [5000, 3000])
        #expect(allocation.map(\.value) == [AllocationFlags.data, AllocationFlags.hole | AllocationFlags.zero])
        #expect(try status(longer, .depth, of: 4000..<8000).extents.map(\.value) == [1, 0])
    }

    @Test func resizeRefusesNoSize() throws {
        let lower = try PatternDevice(size: 5000)
        try requireError(.invalid, "size 0") { _ = try ResizedDevice(lower, size: 0) }
        for block: UInt64 in [0, 3, 4097] {
            try requireError(.invalid, "rounding to \(block)") { _ = try ResizedDevice(lower, roundedUpTo: block) }
        }
        #expect(try ResizedDevice(lower, roundedUpTo: 4096).info.size == 8192)
        #expect(try ResizedDevice(lower, roundedUpTo: 1).info.size == 5000)
    }
}

@Suite struct OverlayTests {
    private let size: UInt64 = 300_000

    @Test func leavesTheSourceAlone() throws {
        let content = patternBytes(Int(size), seed: 3)
        let lower = try memory(content)
        let overlay = try OverlayDevice(lower, scratch: try NamelessFile.memory(size: size))
        try write(patternBytes(100_000, seed: 4), to: overlay, at: 50_000)
        try overlay.zero(200_000..<size, .mayPunch)
        try overlay.discard(0..<size, durable: true)
        try requireEqual(try readBytes(lower, at: 0, count: Int(size)), content, "the source")
    }

    @Test func depthTellsWhereAChunkLives() throws {
        let overlay = try OverlayDevice(try PatternDevice(size: size), scratch: try NamelessFile.memory(size: size))
        #expect(overlay.info.hasLayers && !overlay.info.isReadOnly)
        #expect(try status(overlay, .depth, of: 0..<size).extents.map(\.value) == [2])
        try write([1], to: overlay, at: 70_000)
        let depth = try status(overlay, .depth, of: 0..<size).extents
        #expect(depth.map(\.value) == [2, 1, 2])
        #expect(depth.map(\.length) == [65536, 65536, size - 131_072])
    }

    @Test func refusesScratchThatIsTooSmall() throws {
        try requireError(.invalid, "a small scratch") {
            _ = try OverlayDevice(try PatternDevice(size: size), scratch: try NamelessFile.memory(size: size - 1))
        }
    }

    /// A chunk that could not be copied up stays what it was.
    @Test func failureLeavesTheOldBytes() throws {
        let lower = try PatternDevice(size: size)
        let before = try readBytes(lower, at: 0, count: Int(size))
        let plan = FaultPlan([.init(.writeError(.noSpace), range: 65536..<131_072)])
        let scratch = FaultDevice(try NamelessFile.memory(size: size), plan: plan)
        let overlay = try OverlayDevice(lower, scratch: scratch)
        try requireError(.noSpace, "part of a chunk") { try write([9], to: overlay, at: 70_000) }
        try requireError(.noSpace, "a whole chunk") { try overlay.zero(65536..<131_072, .mayPunch) }
        try requireEqual(try readBytes(overlay, at: 0, count: Int(size)), before, "the whole disk")
        #expect(try status(overlay, .depth, of: 0..<size).extents.map(\.value) == [2])
    }

    @Test func failureToReadTheSourceIsNotHidden() throws {
        let plan = FaultPlan([.init(.readError(.inputOutput), range: 0..<1)])
        let lower = FaultDevice(try PatternDevice(size: size), plan: plan)
        let overlay = try OverlayDevice(lower, scratch: try NamelessFile.memory(size: size))
        try requireError(.inputOutput, "copying up") { try write([9], to: overlay, at: 5) }
        // A chunk that is replaced whole needs nothing from below.
        try overlay.zero(0..<65536, [])
        #expect(try readBytes(overlay, at: 0, count: 3) == [0, 0, 0])
    }
}

@Suite struct FaultTests {
    private let size: UInt64 = 100_000

    private func device(_ faults: FaultPlan.Fault..., seed: UInt64 = 1) throws -> FaultDevice {
        FaultDevice(try memory(patternBytes(Int(size), seed: 5)), plan: FaultPlan(faults, seed: seed))
    }

    @Test func readErrorsHitTheirRangeOnly() throws {
        for kind in [BlockError.Kind.inputOutput, .corrupt, .shutdown] {
            let device = try device(.init(.readError(kind), range: 1000..<2000))
            try requireError(kind, "inside") { _ = try readBytes(device, at: 1500, count: 1) }
            try requireError(kind, "across the start") { _ = try readBytes(device, at: 999, count: 2) }
            try requireError(kind, "across the end") { _ = try readBytes(device, at: 1999, count: 2) }
            try requireError(kind, "everything") { _ = try readBytes(device, at: 0, count: Int(size)) }
            _ = try readBytes(device, at: 0, count: 1000)
            _ = try readBytes(device, at: 2000, count: 1000)
            try write([1], to: device, at: 1500)
            try device.flush()
        }
    }

    @Test func writeErrorsHitAllKindsOfChange() throws {
        let device = try device(.init(.writeError(.noSpace), range: 1000..<2000))
        let before = try readBytes(device, at: 0, count: Int(size))
        try requireError(.noSpace, "writing") { try write([1, 2], to: device, at: 999) }
        try requireError(.noSpace, "zeroing") { try device.zero(1999..<2001, []) }
        try requireError(.noSpace, "discarding") { try device.discard(0..<size, durable: false) }
        try requireEqual(try readBytes(device, at: 0, count: Int(size)), before, "after failed writes")
        try write([1, 2], to: device, at: 2000)
        try device.zero(998..<1000, [])
        try device.flush()
    }

    @Test func flushErrors() throws {
        let device = try device(.init(.flushError(.inputOutput), range: 5..<6))
        try requireError(.inputOutput, "flushing") { try device.flush() }
        try write([1], to: device, at: 5)
        #expect(try readBytes(device, at: 5, count: 1) == [1])
    }

    @Test func corruptionFlipsOneBitInEach512Bytes() throws {
        let device = try device(.init(.corruption, range: 1000..<3000))
        var expected = patternBytes(Int(size), seed: 5)
        for offset in stride(from: 1000, to: 3000, by: 512) { expected[offset] ^= 1 }
        try requireEqual(try readBytes(device, at: 0, count: Int(size)), expected, "the whole disk")
        #expect(try readBytes(device, at: 2999, count: 2) == [expected[2999] ^ 1, expected[3000]])
        #expect(try readBytes(device, at: 900, count: 100) == Array(expected[900..<1000]))
    }

    @Test(arguments: [0, 0.5, 1])
    func probabilityIsKept(probability: Double) throws {
        let fault = FaultPlan.Fault(.readError(.inputOutput), range: 0..<size, probability: probability)
        func failures(seed: UInt64) throws -> [Bool] {
            let device = try device(fault, seed: seed)
            return (0..<400).map { index in (try? readBytes(device, at: UInt64(index), count: 1)) == nil }
        }
        let first = try failures(seed: 42)
        #expect(first == (try failures(seed: 42)), "the same seed, the same faults")
        let count = first.count { $0 }
        switch probability {
        case 0: #expect(count == 0)
        case 1: #expect(count == 400)
        default:
            // Ten standard deviations.
            #expect(100 < count && count < 300)
            #expect(first != (try failures(seed: 43)))
        }
    }

    /// A fault that only writes can meet leaves reading to the map below.
    @Test func mapStaysOpenWhereReadsCannotFail() throws {
        let device = try device(
            .init(.writeError(.noSpace), range: 0..<size), .init(.readError(.inputOutput), range: 50_000..<60_000))
        if case .file = try mapped(device, 0..<50_000).extents[0].place {} else { Issue.record("not from the file") }
        if case .source = try mapped(device, 0..<50_001).extents[0].place {} else { Issue.record("not from a source") }
    }
}
