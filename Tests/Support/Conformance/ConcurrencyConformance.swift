// The suite's part about a writer between map and read: every byte read is its old or its new value, never another's.
import Block
import Glibc
import LinuxIO
import Synchronization

/// Cells of a disk that one writer each changes, generation by generation; what a byte may be follows from how far its
/// cell's writer has come. Cells are not aligned, so that neighbours share sectors, pages and chunks.
private final class Cells: Sendable {
    static let size = 3001
    static let generations: UInt64 = 24

    let count: Int
    private let started: [AtomicBox]
    private let finished: [AtomicBox]

    final class AtomicBox: Sendable {
        let value = Atomic<UInt64>(0)
    }

    init(count: Int) {
        self.count = count
        started = (0..<count).map { _ in AtomicBox() }
        finished = (0..<count).map { _ in AtomicBox() }
    }

    /// Every fourth generation is zeros, so that zeroing takes part.
    static func isZero(_ generation: UInt64) -> Bool { generation % 4 == 3 }

    /// For each generation the bytes that cells are cut from. No two generations agree in any byte, and none is zero.
    private static let rows: [[UInt8]] = (0...generations).map { generation in
        (0..<(size + 256)).map { UInt8(truncatingIfNeeded: (UInt64($0 % 191) + generation * 7) % 255 + 1) }
    }
    private static let zeros = [UInt8](repeating: 0, count: size + 256)

    static func bytes(_ cell: Int, _ generation: UInt64) -> ArraySlice<UInt8> {
        let row = isZero(generation) ? zeros : rows[Int(generation)]
        let shift = cell * 37 % 256
        return row[shift..<(shift + size)]
    }

    func change(_ cell: Int, to generation: UInt64, on device: any BlockDevice) throws {
        started[cell].value.store(generation, ordering: .sequentiallyConsistent)
        let offset = UInt64(cell * Self.size)
        if Self.isZero(generation) {
            try device.zero(offset..<(offset + UInt64(Self.size)), generation % 8 == 3 ? .mayPunch : [])
        } else {
            try Self.bytes(cell, generation).withUnsafeBytes {
                try device.write($0, at: offset, durable: false)
            }
        }
        finished[cell].value.store(generation, ordering: .sequentiallyConsistent)
    }

    func finishedGenerations() -> [UInt64] { finished.map { $0.value.load(ordering: .sequentiallyConsistent) } }
    func startedGenerations() -> [UInt64] { started.map { $0.value.load(ordering: .sequentiallyConsistent) } }

    /// Checks bytes that were read after `low` was taken and before `high` was.
    func check(_ bytes: [UInt8], at offset: Int, _ low: [UInt64], _ high: [UInt64]) throws {
        var done = 0
        while done < bytes.count {
            let cell = (offset + done) / Self.size
            let start = offset + done - cell * Self.size
            let count = min(Self.size - start, bytes.count - done)
            try check(bytes[done..<(done + count)], cell, start, Array(low[cell]...high[cell]))
            done += count
        }
    }

    private func check(_ actual: ArraySlice<UInt8>, _ cell: Int, _ start: Int, _ generations: [UInt64]) throws {
        let possible = generations.map { Self.bytes(cell, $0).dropFirst(start).prefix(actual.count) }
        func isEqual(_ expected: ArraySlice<UInt8>) -> Bool {
            actual.withUnsafeBytes { left in expected.withUnsafeBytes { areEqual(left, $0) } }
        }
        if possible.contains(where: isEqual) { return }
        for index in 0..<actual.count {
            let byte = actual[actual.startIndex + index]
            let values = possible.map { $0[$0.startIndex + index] }
            try require(
                values.contains(byte),
                "byte \(start + index) of cell \(cell) is \(byte), which is none of generations \(generations): "
                    + "\(values)")
        }
    }
}

extension DeviceConformance {
    /// Threads that write, each its own cells, and threads that read anything.
    private static let writerCount = 2

    func checkConcurrentWriters(_ subject: ConformanceSubject) throws {
        let device = subject.device
        let usable = Int(min(subject.writableSize, device.info.size, 160_000))
        let cells = Cells(count: usable / Cells.size)
        if cells.count < 2 { return }
        for cell in 0..<cells.count { try cells.change(cell, to: 0, on: device) }
        let active = Atomic<Int>(Self.writerCount)
        let seed = runSeed
        let writers = (0..<Self.writerCount).map { writer in
            { @Sendable () throws in
                defer { active.subtract(1, ordering: .sequentiallyConsistent) }
                var generator = SeededGenerator(seed: seed &+ UInt64(writer))
                // Even cells belong to one writer, odd ones to the other: every edge is contended.
                let own = Array(stride(from: writer, to: cells.count, by: Self.writerCount))
                for generation in 1...Cells.generations {
                    for cell in own.shuffled(using: &generator) { try cells.change(cell, to: generation, on: device) }
                }
            }
        }
        let readers = (0..<2).map { reader in
            { @Sendable () throws in
                var generator = SeededGenerator(seed: seed &+ 100 &+ UInt64(reader))
                while active.load(ordering: .sequentiallyConsistent) > 0 {
                    let start = Int.random(in: 0..<(cells.count * Cells.size), using: &generator)
                    let count = Int.random(in: 1...min(9000, cells.count * Cells.size - start), using: &generator)
                    try Self.readOnce(device, cells, start, count, mapFirst: reader == 1)
                }
            }
        }
        do {
            try concurrently(writers + readers)
        } catch { throw CheckFailure("SEED=\(seed): \(error)") }
        let all = try readBytes(device, at: 0, count: cells.count * Cells.size)
        try cells.check(all, at: 0, cells.finishedGenerations(), cells.startedGenerations())
    }

    /// Reads by `read`, or in the two steps of a connection, with time for a writer in between.
    private static func readOnce(
        _ device: any BlockDevice, _ cells: Cells, _ start: Int, _ count: Int, mapFirst: Bool
    ) throws {
        let low = cells.finishedGenerations()
        var bytes: [UInt8]
        if mapFirst {
            let version = device.mapVersion
            var list = ExtentList(capacity: 64)
            let range = UInt64(start)..<UInt64(start + count)
            let end = try device.map(range, .blocking, into: &list)
            sched_yield()
            bytes = try readExtents(list, count: Int(end - range.lowerBound))
            // Another version: what was read may be anything.
            if device.mapVersion != version { return }
        } else {
            bytes = try readBytes(device, at: UInt64(start), count: count)
        }
        try cells.check(bytes, at: start, low, cells.startedGenerations())
    }

    private static func readExtents(_ list: borrowing ExtentList, count: Int) throws -> [UInt8] {
        let buffer = Buffer(count: count)
        buffer.bytes.initializeMemory(as: UInt8.self, repeating: 0xA5)
        var done = 0
        for index in 0..<list.count {
            let extent = list[index]
            let part = UnsafeMutableRawBufferPointer(rebasing: buffer.bytes[done..<(done + Int(extent.length))])
            switch extent.place {
            case .zeros: part.initializeMemory(as: UInt8.self, repeating: 0)
            case .file(let file, let offset): try file.read(into: part, at: offset)
            case .source(let source, let offset): try source.source.read(into: part, at: offset)
            }
            done += part.count
        }
        return Array(buffer.readable)
    }
}
