// Snapshots of a device that is being written: each equals what the device held when the snapshot was made.
import Block
import LinuxIO
import Support
import Synchronization
import Testing

/// Bytes of the disks here: many chunks, the last of them a part.
private let size = 40 * 65536 + 5003

/// Notes changes in memory.
private final class Recorder: ChangeRecorder {
    let bits: DirtyBitmap
    init() throws { bits = try DirtyBitmap(size: UInt64(size), granularity: 65536) }
    func record(_ range: Range<UInt64>) { bits.set(range) }
    func isRecorded(_ range: Range<UInt64>) -> Bool { bits.isAllSet(range) }
}

/// Remembers the ranges that it is told of.
private final class Listener: ChangeRecorder {
    let ranges = Locked<[Range<UInt64>]>([])
    func record(_ range: Range<UInt64>) { ranges.withLock { $0.append(range) } }
    func isRecorded(_ range: Range<UInt64>) -> Bool { false }
}

private func memory(_ content: [UInt8]) throws -> RawFileDevice {
    let device = try NamelessFile.memory(size: UInt64(content.count))
    try content.withUnsafeBytes { try device.write($0, at: 0, durable: false) }
    return device
}

private func snapshot(
    _ device: TrackedDevice, recorder: Recorder? = nil, scratch: (any BlockDevice)? = nil,
    mayGrow: @escaping @Sendable () throws(BlockError) -> Void = { () throws(BlockError) in },
    onFailure: @escaping @Sendable (BlockError) -> Void = { _ in }
) throws -> SnapshotDevice {
    try device.makeSnapshot(
        scratch: scratch ?? NamelessFile.memory(size: device.info.size), bitmaps: [], recorder: recorder ?? Recorder(),
        mayGrow: mayGrow, onFailure: onFailure)
}

private func all(_ device: any BlockDevice) throws -> [UInt8] {
    try readBytes(device, at: 0, count: Int(device.info.size))
}

/// A device whose version moves with every map: only who holds it still reads it to the end.
private final class RestlessDevice: BlockDevice {
    let info: DeviceInfo
    private let lower: any BlockDevice
    private let version = Atomic<UInt64>(0)
    private let lock = Lock()
    let held = Atomic<Int>(0)

    init(_ lower: any BlockDevice) {
        self.lower = lower
        info = lower.info
    }

    var mapVersion: UInt64 { version.load(ordering: .sequentiallyConsistent) }
    func map(_ range: Range<UInt64>, _ patience: Patience, into extents: inout ExtentList) throws(BlockError) -> UInt64
    {
        version.wrappingAdd(1, ordering: .sequentiallyConsistent)
        return try lower.map(range, patience, into: &extents)
    }
    func holdingMap(of range: Range<UInt64>, _ body: () throws(BlockError) -> Void) throws(BlockError) {
        held.add(1, ordering: .relaxed)
        try lock.withLock { () throws(BlockError) in try body() }
    }
}

@Suite struct SnapshotTests {
    @Test func `a tracked device conforms, alone and with snapshots`() throws {
        let content = patternBytes(size, seed: 11)
        for count in 0...2 {
            try DeviceConformance {
                let device = TrackedDevice(try memory(content))
                for _ in 0..<count { _ = try snapshot(device) }
                return ConformanceSubject(device, content: content)
            }.run()
        }
    }

    @Test func `a snapshot conforms, of a device that has changed since`() throws {
        let content = patternBytes(size, seed: 12)
        try DeviceConformance {
            let device = TrackedDevice(try memory(content))
            let view = try snapshot(device)
            let other = patternBytes(70_000, seed: 13)
            for offset in [0, 200_000, 65536 * 9 - 3, size - 70_000] {
                try other.withUnsafeBytes { try device.write($0, at: UInt64(offset), durable: false) }
            }
            try device.zero(1_000_001..<1_200_002, .mayPunch)
            return ConformanceSubject(view, content: content)
        }.run()
    }

    @Test func `a device that never rests is read all the same`() throws {
        let content = patternBytes(1 << 20, seed: 14)
        let device = RestlessDevice(try memory(content))
        try requireEqual(try readBytes(device, at: 0, count: content.count), content, "all")
        #expect(device.held.load(ordering: .relaxed) == 4, "in pieces")
        let filters: [any BlockDevice] = [
            try SliceDevice(device, range: 4096..<65536, label: "slice"), try ResizedDevice(device, size: 2 << 20),
            try OverlayDevice(device, scratch: try NamelessFile.memory(size: 1 << 20)),
        ]
        for filter in filters {
            _ = try readBytes(filter, at: 0, count: 8192)
        }
        #expect(device.held.load(ordering: .relaxed) == 7, "the filters pass it on")
    }

    @Test func `each change is before a snapshot or after it, and noted`() throws {
        let content = patternBytes(size, seed: 15)
        let device = TrackedDevice(try memory(content))
        let (first, second) = (try Recorder(), try Recorder())
        let one = try snapshot(device, recorder: first)
        try patternBytes(10, seed: 1).withUnsafeBytes { try device.write($0, at: 65530, durable: true) }
        let between = try all(device)
        let two = try snapshot(device, recorder: second)
        try device.zero(0..<UInt64(size), [.mayPunch, .durable])
        try device.discard(0..<UInt64(size), durable: true)
        try requireEqual(try all(one), content, "the first")
        try requireEqual(try all(two), between, "the second")
        #expect(try all(device).allSatisfy { $0 == 0 })
        #expect(first.bits.setCount == 2 && first.bits.isSet(0) && first.bits.isSet(1))
        #expect(second.bits.setCount == 41)
        device.release(one)
        try requireError(.shutdown, "reading a released snapshot") { _ = try all(one) }
        try requireEqual(try all(two), between, "the second, without the first")
    }

    @Test func `a change in pieces is noted as a whole first`() throws {
        let device = TrackedDevice(try NamelessFile.memory(size: 12 << 20))
        let listener = Listener()
        _ = try device.makeSnapshot(
            scratch: NamelessFile.memory(size: 12 << 20), bitmaps: [], recorder: listener,
            mayGrow: { () throws(BlockError) in }, onFailure: { _ in })
        try device.zero(4096..<(12 << 20), .mayPunch)
        let ranges = listener.ranges.withLock { $0 }
        #expect(ranges.first == 4096..<(12 << 20) && ranges.count == 4)
    }

    @Test func `a full scratch breaks the snapshot, not the writer`() throws {
        let content = patternBytes(size, seed: 16)
        let device = TrackedDevice(try memory(content))
        let told = Locked(0)
        let left = Atomic<Int>(1)
        let broken = try snapshot(
            device,
            mayGrow: { () throws(BlockError) in
                if left.subtract(1, ordering: .relaxed).newValue < 0 { throw BlockError(.noSpace, "full") }
            }, onFailure: { _ in told.withLock { $0 += 1 } })
        let faulty = FaultDevice(
            try NamelessFile.memory(size: UInt64(size)),
            plan: FaultPlan([FaultPlan.Fault(.writeError(.noSpace), range: 65536..<131_072, probability: 1)]))
        let second = try snapshot(device, scratch: faulty, onFailure: { _ in told.withLock { $0 += 1 } })
        let third = try snapshot(device)
        let new = patternBytes(size, seed: 17)
        try new.withUnsafeBytes { try device.write($0, at: 0, durable: false) }
        try requireEqual(try all(device), new, "the writer's")
        for device in [broken, second] {
            try requireError(.inputOutput, "reading a broken snapshot") { _ = try all(device) }
            try requireError(.inputOutput, "its status") { _ = try status(device, .allocation, of: 0..<65536) }
        }
        try broken.giveScratchBack()
        #expect(told.withLock { $0 } == 2)
        try requireEqual(try all(third), content, "the third")
    }

    /// Zeros take no room, and holes stay holes, whatever happens below.
    @Test func `allocation is the snapshot's`() throws {
        let base = try NamelessFile.memory(size: UInt64(size))
        let device = TrackedDevice(base)
        let data = patternBytes(65536, seed: 18)
        try data.withUnsafeBytes { try device.write($0, at: 65536, durable: false) }
        let view = try snapshot(device)
        try data.withUnsafeBytes { try device.write($0, at: 0, durable: false) }
        try device.zero(65536..<131_072, .mayPunch)
        #expect(view.copiedBytes == 65536)
        let found = try status(view, .allocation, of: 0..<UInt64(size), capacity: 100)
        let hole = AllocationFlags.hole | AllocationFlags.zero
        #expect(found.extents.map(\.value) == [hole, AllocationFlags.data, hole])
        #expect(found.extents.first?.length == 65536)
        try requireError(.unsupported, "fast zeroing that has to copy") {
            try device.zero(262_144..<300_000, [.fastOnly, .mayPunch])
        }
        #expect(!device.isPrompt(toWrite: 262_144..<300_000) && device.isPrompt(toWrite: 0..<100))
        try device.zero(262_144..<300_000, .mayPunch)
    }

    @Test func `a closed device takes no changes`() throws {
        let device = TrackedDevice(try memory(patternBytes(size, seed: 19)))
        try device.close()
        try requireError(.shutdown, "writing") { try device.zero(0..<4096, []) }
        try requireError(.shutdown, "a snapshot") { _ = try snapshot(device) }
    }
}

@Suite struct SnapshotConcurrencyTests {
    /// Writers change cells of their own, snapshots are made in between, readers compare each with what it must hold:
    /// every cell one generation, which lies between the last that had finished and the last that had started.
    @Test func `snapshots hold still while writers hammer`() throws {
        let cell = 3001
        let cells = size / cell
        let device = TrackedDevice(try memory([UInt8](repeating: 1, count: size)))
        let started = Locked([UInt8](repeating: 1, count: cells))
        let finished = Locked([UInt8](repeating: 1, count: cells))
        let isOver = Atomic<Bool>(false)
        let compared = Atomic<Int>(0)
        let seed = runSeed

        @Sendable func change(_ index: Int, _ generation: UInt8, _ generator: inout SeededGenerator) throws {
            started.withLock { $0[index] = generation }
            let offset = UInt64(index * cell)
            let range = offset..<(offset + UInt64(cell))
            if generation % 4 == 0 {
                try device.zero(range, generator.oneIn(2) ? .mayPunch : [])
            } else {
                let bytes = [UInt8](repeating: generation, count: cell)
                try bytes.withUnsafeBytes { try device.write($0, at: offset, durable: false) }
            }
            finished.withLock { $0[index] = generation }
        }
        @Sendable func value(_ generation: UInt8) -> UInt8 { generation % 4 == 0 ? 0 : generation }

        let writers = (0..<2).map { writer in
            { @Sendable () throws in
                var generator = SeededGenerator(seed: seed &+ UInt64(writer))
                let own = Array(stride(from: writer, to: cells, by: 2))
                for generation in UInt8(2)...60 {
                    for index in own.shuffled(using: &generator) { try change(index, generation, &generator) }
                    if isOver.load(ordering: .relaxed) { return }
                }
            }
        }
        let reader = { @Sendable () throws in
            defer { isOver.store(true, ordering: .relaxed) }
            for _ in 0..<5 {
                let low = finished.withLock { $0 }
                let one = try snapshot(device)
                let two = try snapshot(device)
                let high = started.withLock { $0 }
                let before = try all(one)
                for index in 0..<cells {
                    let byte = before[index * cell]
                    let part = before[(index * cell)..<((index + 1) * cell)]
                    guard part.allSatisfy({ $0 == byte }) else {
                        throw CheckFailure("SEED=\(seed): cell \(index) of a snapshot is torn")
                    }
                    guard (low[index]...high[index]).contains(where: { value($0) == byte }) else {
                        throw CheckFailure("SEED=\(seed): cell \(index) is \(byte), not \(low[index])...\(high[index])")
                    }
                }
                // Again and again the same, while everything below changes.
                let last = try all(two)
                try concurrently(
                    [(one, before), (two, last)].map { view, expected in
                        { @Sendable () throws in
                            for _ in 0..<3 {
                                try requireEqual(try all(view), expected, "SEED=\(seed): a snapshot")
                                compared.add(1, ordering: .relaxed)
                            }
                        }
                    })
                device.release(one)
                device.release(two)
            }
        }
        try concurrently(writers + [reader])
        #expect(compared.load(ordering: .relaxed) == 30)
    }
}
