// Disks of 2^63-1 bytes: arithmetic at the end of everything neither traps nor wraps, and takes no time.
import Block
import LinuxIO
import Support
import Testing

private let most = UInt64(Int64.max)

@Suite struct HugeSizeTests {
    @Test(arguments: [0, 0.5, 1])
    func patternOfTheLargestSize(share: Double) throws {
        let device = try PatternDevice(size: most, seed: 3, allocatedShare: share)
        for patience: Patience in [.blocking, .resident] {
            let found = try mapped(device, (most - 100_000)..<most, patience)
            #expect(found.end == most)
            #expect(found.extents.reduce(0) { $0 + $1.length } == 100_000)
        }
        #expect(try readBytes(device, at: most - 5, count: 5).count == 5)
        #expect(throws: BlockError.self) { _ = try readBytes(device, at: most - 4, count: 5) }
    }

    /// One answer for the whole disk does not take a step for each of its chunks.
    @Test(arguments: [0, 1])
    func wholePatternIsOneExtent(share: Double) throws {
        let device = try PatternDevice(size: most, allocatedShare: share)
        let found = try mapped(device, 0..<most, capacity: 2)
        #expect(found.end == most)
        #expect(found.extents.map(\.length) == [most])
        #expect(try status(device, .allocation, of: 0..<most, capacity: 2).extents.map(\.length) == [most])
    }

    @Test func statusOfTheLargestPatternStopsWhenFull() throws {
        let device = try PatternDevice(size: most, allocatedShare: 0.5)
        let found = try status(device, .allocation, of: 0..<most, capacity: 5)
        #expect(found.end < most && found.extents.count == 5)
        #expect(found.extents.reduce(0) { $0 + $1.length } == found.end)
    }

    @Test func filtersAtTheLargestSize() throws {
        let lower = try PatternDevice(size: most, seed: 9, allocatedShare: 0.5)
        let slice = try SliceDevice(lower, range: (most - 70_000)..<most, label: "end")
        try requireEqual(
            try readBytes(slice, at: 69_000, count: 1000), try readBytes(lower, at: most - 1000, count: 1000), "slice")
        let longer = try ResizedDevice(slice, size: most)
        #expect(try readBytes(longer, at: most - 3, count: 3) == [0, 0, 0])
        #expect(try mapped(longer, 70_000..<most).end == most)
        let faulty = FaultDevice(longer, plan: FaultPlan([.init(.corruption, range: 0..<UInt64.max)]))
        #expect(try readBytes(faulty, at: most - 3, count: 3) == [1, 0, 0])
        try requireError(.invalid, "rounding up past 2^63-1") { _ = try ResizedDevice(lower, roundedUpTo: 4096) }
        try requireError(.invalid, "a size past 2^63-1") { _ = try ResizedDevice(lower, size: most + 1) }
        try requireError(.invalid, "rounding to 2^63") { _ = try ResizedDevice(slice, roundedUpTo: 1 << 63) }
        try requireError(.tooLarge, "an overlay over it") {
            _ = try OverlayDevice(lower, scratch: try NamelessFile.memory(size: most))
        }
    }

    @Test func refusesSizesPastTheLargest() throws {
        for size in [0, most + 1, .max] {
            try requireError(.invalid, "a pattern of \(size) bytes") { _ = try PatternDevice(size: size) }
        }
        for share in [-0.1, 1.1, .nan, .infinity] {
            try requireError(.invalid, "a share of \(share)") {
                _ = try PatternDevice(size: 1, allocatedShare: share)
            }
        }
        try requireError(.invalid, "2^63 bytes of memory") { _ = try NamelessFile.memory(size: most + 1) }
    }
}
