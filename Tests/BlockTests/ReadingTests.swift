// Reading over a map: maps that move meanwhile, maps that are wrong, files that end, and how filters hand it all on.
import Block
import LinuxIO
import Support
import Synchronization
import Testing

/// A device whose map is whatever a closure says; its bytes are one source's.
private final class ScriptedDevice: BlockDevice {
    let info: DeviceInfo
    let version = Atomic<UInt64>(0)
    let asked = Atomic<Int>(0)
    private let answer: @Sendable (Range<UInt64>, SourceRef, inout ExtentList) -> UInt64
    private let handle: SourceHandle

    private final class Content: ByteSource {
        let isPrompt = true
        let body: @Sendable (UInt64) -> UInt8
        init(_ body: @escaping @Sendable (UInt64) -> UInt8) { self.body = body }
        func read(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(BlockError) {
            for index in buffer.indices { buffer[index] = body(offset + UInt64(index)) }
        }
    }

    init(
        size: UInt64, content: @escaping @Sendable (UInt64) -> UInt8,
        _ answer: @escaping @Sendable (Range<UInt64>, SourceRef, inout ExtentList) -> UInt64
    ) {
        info = DeviceInfo(size: size, format: "scripted", name: "scripted")
        handle = SourceHandle(Content(content))
        self.answer = answer
    }

    var mapVersion: UInt64 { version.load(ordering: .sequentiallyConsistent) }

    func map(_ range: Range<UInt64>, _ patience: Patience, into extents: inout ExtentList) throws(BlockError) -> UInt64
    {
        asked.add(1, ordering: .relaxed)
        return answer(range, handle.reference, &extents)
    }
}

@Suite struct ReadingTests {
    /// The bytes change and the version with them while the first read is under way.
    @Test func readsAgainWhenTheVersionMoves() throws {
        final class Change: Sendable { let count = Atomic<Int>(0) }
        let change = Change()
        nonisolated(unsafe) weak var device: ScriptedDevice?
        let made = ScriptedDevice(
            size: 8192,
            content: { offset in
                // In the middle of the first reading the map becomes another.
                if offset == 100, change.count.add(1, ordering: .relaxed).newValue == 1 {
                    device?.version.add(1, ordering: .sequentiallyConsistent)
                    return 0xEE
                }
                return UInt8(truncatingIfNeeded: offset)
            },
            { range, source, list in
                list.append(range.count64, .source(source, offset: range.lowerBound))
                    ? range.upperBound : range.lowerBound
            })
        device = made
        let filters: [any BlockDevice] = [
            made, try SliceDevice(made, range: 0..<8192, label: "all"), try ResizedDevice(made, size: 9000),
            FaultDevice(made, plan: FaultPlan([])),
            try OverlayDevice(made, scratch: try NamelessFile.memory(size: 8192)),
        ]
        for filter in filters {
            change.count.store(0, ordering: .relaxed)
            let bytes = try readBytes(filter, at: 0, count: 8192)
            try requireEqual(bytes, (0..<8192).map { UInt8(truncatingIfNeeded: $0) }, filter.info.name)
            #expect(change.count.load(ordering: .relaxed) == 2, "read twice through \(filter.info.format)")
        }
    }

    @Test func refusesMapsThatDoNotCover() throws {
        let wrong: [@Sendable (Range<UInt64>, SourceRef, inout ExtentList) -> UInt64] = [
            { range, _, _ in range.lowerBound },
            { range, _, list in
                _ = list.append(range.count64 + 1, .zeros(allocated: false))
                return range.upperBound + 1
            },
            { range, _, list in
                _ = list.append(range.count64 - 1, .zeros(allocated: false))
                return range.upperBound
            },
        ]
        for answer in wrong {
            let device = ScriptedDevice(size: 8192, content: { _ in 0 }, answer)
            try requireError(.inputOutput, "reading through a wrong map") {
                _ = try readBytes(device, at: 10, count: 50)
            }
        }
        let stuck = ScriptedDevice(size: 8192, content: { _ in 0 }, wrong[0])
        try requireError(.inputOutput, "status through a wrong map") {
            _ = try status(stuck, .allocation, of: 0..<8192)
        }
    }

    /// More extents than a read takes at a time.
    @Test func readsThroughManySmallExtents() throws {
        let device = ScriptedDevice(size: 1000, content: { UInt8(truncatingIfNeeded: $0 + 1) }) { range, source, list in
            var position = range.lowerBound
            while position < range.upperBound {
                let place: Place = position % 2 == 0 ? .source(source, offset: position) : .zeros(allocated: true)
                if !list.append(1, place) { break }
                position += 1
            }
            return position
        }
        try requireEqual(
            try readBytes(device, at: 1, count: 999),
            (1..<1000).map { $0 % 2 == 0 ? UInt8(truncatingIfNeeded: $0 + 1) : 0 }, "single bytes")
        #expect(device.asked.load(ordering: .relaxed) > 10)
        let found = try status(device, .allocation, of: 0..<1000, capacity: 2000)
        #expect(found.end == 1000)
        #expect(found.extents.count == 1000)
        #expect(found.extents.prefix(2).map(\.value) == [AllocationFlags.data, AllocationFlags.zero])
    }

    @Test func defaultsOfAReadOnlyDevice() throws {
        let device = try PatternDevice(size: 4096)
        try requireError(.readOnly, "zeroing") { try device.zero(0..<1, []) }
        try device.flush()
        #expect(device.mapVersion == 0)
        let depth = try status(device, .depth, of: 0..<4096, capacity: 1)
        #expect(depth.end == 4096)
        #expect(depth.extents.map(\.value) == [1])
    }
}
