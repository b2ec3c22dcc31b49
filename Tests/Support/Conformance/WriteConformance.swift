// The suite's part about changes by one thread: random operations against a model in memory, pre-filled, never zeros.
import Block
import Glibc

/// What a disk should hold: bytes, and which of them nobody can know since they were discarded.
struct DiskModel {
    private(set) var bytes: [UInt8]
    private var isUnknown: [Bool]

    init(_ content: [UInt8]) {
        bytes = content
        isUnknown = Array(repeating: false, count: content.count)
    }

    mutating func write(_ new: [UInt8], at offset: Int) {
        if new.isEmpty { return }
        bytes.withUnsafeMutableBytes { UnsafeMutableRawBufferPointer(rebasing: $0[offset...]).copyBytes(from: new) }
        markUnknown(offset..<(offset + new.count), false)
    }

    mutating func zero(_ range: Range<Int>) {
        bytes.withUnsafeMutableBytes {
            _ = UnsafeMutableRawBufferPointer(rebasing: $0[range]).initializeMemory(as: UInt8.self, repeating: 0)
        }
        markUnknown(range, false)
    }

    mutating func discard(_ range: Range<Int>) { markUnknown(range, true) }

    private mutating func markUnknown(_ range: Range<Int>, _ value: Bool) {
        isUnknown.withUnsafeMutableBufferPointer {
            UnsafeMutableBufferPointer(rebasing: $0[range]).update(repeating: value)
        }
    }

    func check(_ actual: [UInt8], at offset: Int, _ what: @autoclosure () -> String) throws {
        let range = offset..<(offset + actual.count)
        var expected = Array(bytes[range])
        if !actual.withUnsafeBytes({ left in expected.withUnsafeBytes { areEqual(left, $0) } }) {
            for index in range where isUnknown[index] { expected[index - offset] = actual[index - offset] }
        }
        try requireEqual(actual, expected, what(), at: UInt64(offset))
    }
}

extension DeviceConformance {
    /// Operations for each device.
    static let operationCount = 250

    func checkRandomOperations(_ subject: ConformanceSubject) throws {
        try withSeed { generator in
            var model = DiskModel(subject.content)
            var journal: [String] = []
            for step in 1...Self.operationCount {
                do {
                    try randomOperation(subject, &model, &generator, &journal)
                    if step % 50 == 0 { try checkWhole(subject.device, model) }
                } catch { throw CheckFailure("operation \(step): \(error); before: \(journal.suffix(8))") }
            }
            try subject.device.flush()
            try checkWhole(subject.device, model)
            try checkFastZero(subject, &model)
        }
    }

    private func checkWhole(_ device: any BlockDevice, _ model: DiskModel) throws {
        try model.check(try readBytes(device, at: 0, count: model.bytes.count), at: 0, "the whole disk")
    }

    /// A range up to `limit`, half of the time aligned, mostly small.
    private func randomRange(_ limit: UInt64, _ generator: inout SeededGenerator) -> Range<UInt64> {
        let lengthMax: UInt64 = generator.oneIn(8) ? 300_000 : 9000
        var start = UInt64.random(in: 0..<limit, using: &generator)
        var length = UInt64.random(in: 1...min(lengthMax, limit - start), using: &generator)
        if generator.oneIn(2) {
            let unit: UInt64 = [512, 4096, 65536].randomElement(using: &generator) ?? 512
            start = start / unit * unit
            length = min((length + unit - 1) / unit * unit, limit - start)
        }
        return start..<(start + length)
    }

    private func randomOperation(
        _ subject: ConformanceSubject, _ model: inout DiskModel, _ generator: inout SeededGenerator,
        _ journal: inout [String]
    ) throws {
        let device = subject.device
        let kind = Int.random(in: 0..<10, using: &generator)
        let durable = generator.oneIn(12)
        // Where only zeros fit, zeroing and discarding are still allowed.
        let limit = kind < 4 ? min(subject.writableSize, device.info.size) : device.info.size
        let range = randomRange(limit, &generator)
        let offset = Int(range.lowerBound)
        switch kind {
        case 0..<4:
            journal.append("write \(range) durable \(durable)")
            let bytes = patternBytes(range.count, seed: generator.next())
            let shift = generator.oneIn(2) ? 0 : 3
            let memory = Buffer(count: shift + bytes.count)
            let part = UnsafeMutableRawBufferPointer(rebasing: memory.bytes[shift..<(shift + bytes.count)])
            part.copyBytes(from: bytes)
            try device.write(UnsafeRawBufferPointer(part), at: range.lowerBound, durable: durable)
            model.write(bytes, at: offset)
        case 4, 5:
            var options: ZeroOptions = durable ? .durable : []
            if kind == 5 { options.insert(.mayPunch) }
            journal.append("zero \(range) \(options.rawValue)")
            try device.zero(range, options)
            model.zero(offset..<(offset + range.count))
        case 6:
            journal.append("discard \(range)")
            try device.discard(range, durable: durable)
            model.discard(offset..<(offset + range.count))
        case 7:
            journal.append("flush")
            try device.flush()
        default:
            try model.check(
                try readBytes(device, at: range.lowerBound, count: range.count), at: offset, "reading \(range)")
        }
    }

    /// `.fastOnly` zeroes, or refuses and changes nothing.
    private func checkFastZero(_ subject: ConformanceSubject, _ model: inout DiskModel) throws {
        let range = 0..<min(subject.device.info.size, 8192)
        for options: ZeroOptions in [[.fastOnly], [.fastOnly, .mayPunch]] {
            do {
                try subject.device.zero(range, options)
                model.zero(0..<range.count)
            } catch { try require(error.kind == .unsupported, "fast zeroing: \(error)") }
            try model.check(try readBytes(subject.device, at: 0, count: range.count), at: 0, "after fast zeroing")
        }
    }
}
