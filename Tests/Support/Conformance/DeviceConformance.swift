// The device conformance suite: what BlockDevice.swift promises, run on every device and filter.
public import Block
import Glibc

/// A device to check, with what is known about it.
public struct ConformanceSubject {
    /// The device.
    public let device: any BlockDevice
    /// Its bytes, all of them. Random writes start from here, so it should not be zeros only.
    public let content: [UInt8]
    /// From here on a writable device takes nothing but zeros.
    public let writableSize: UInt64

    /// A device with its content.
    public init(_ device: any BlockDevice, content: [UInt8], writableSize: UInt64? = nil) {
        self.device = device
        self.content = content
        self.writableSize = writableSize ?? device.info.size
    }
}

/// The suite. A new subject is made for each group of checks that changes it.
public struct DeviceConformance {
    let make: () throws -> ConformanceSubject

    /// A suite for the devices that the closure makes.
    public init(_ make: @escaping () throws -> ConformanceSubject) { self.make = make }

    /// Runs every check that applies.
    ///
    /// - Throws: a failure that tells of all checks that failed.
    public func run() throws {
        var failures: [String] = []
        func check(_ name: String, _ body: () throws -> Void) {
            do { try body() } catch { failures.append("\(name): \(error)") }
        }
        // One subject at a time: some devices can be open only once.
        func withSubject(_ body: (ConformanceSubject) -> Void) throws { body(try make()) }
        var name = ""
        var isReadOnly = true
        try withSubject { subject in
            name = subject.device.info.name
            isReadOnly = subject.device.info.isReadOnly
            check("info") { try checkInfo(subject) }
            check("bounds") { try checkBounds(subject) }
            check("map") { try checkMaps(subject) }
            check("status") { try checkStatus(subject) }
            check("read") { try checkReads(subject) }
            check("resident read") { try checkResidentReads(subject) }
            if isReadOnly { check("refusal") { try checkRefusal(subject) } }
        }
        if !isReadOnly {
            try withSubject { subject in check("random operations") { try checkRandomOperations(subject) } }
            try withSubject { subject in check("concurrent writers") { try checkConcurrentWriters(subject) } }
        }
        if !failures.isEmpty {
            throw CheckFailure("\(name) does not conform:\n" + failures.joined(separator: "\n"))
        }
    }

    func checkInfo(_ subject: ConformanceSubject) throws {
        let info = subject.device.info
        try require(info.size == UInt64(subject.content.count), "size \(info.size), content \(subject.content.count)")
        try require(info.size > 0, "the size is 0")
        try require(!info.name.isEmpty && !info.format.isEmpty, "no name or no format")
        let minimum = info.minimumBlock
        try require(minimum.nonzeroBitCount == 1 && minimum <= 65536, "minimum block \(minimum)")
        try require(
            info.preferredBlock.nonzeroBitCount == 1 && info.preferredBlock >= minimum,
            "preferred block \(info.preferredBlock), minimum \(minimum)")
        try require(
            info.size % UInt64(minimum) == 0, "size \(info.size) is no multiple of the minimum block \(minimum)")
    }

    func checkBounds(_ subject: ConformanceSubject) throws {
        let device = subject.device
        let size = device.info.size
        for offset in [0, size / 2, size - 1] {
            let range = try device.info.check(offset: offset, length: 1)
            try require(range == offset..<(offset + 1), "check(\(offset), 1) gave \(range)")
        }
        try require(try device.info.check(offset: 0, length: size) == 0..<size, "check of everything")
        for offset in [0, size, size + 1, UInt64.max] {
            try requireError(.invalid, "no bytes at \(offset)") { _ = try device.info.check(offset: offset, length: 0) }
        }
        let outside: [(UInt64, UInt64)] = [
            (size, 1), (size - 1, 2), (0, size + 1), (0, .max), (1, .max), (.max, 1), (.max, .max),
            (size - 1, .max), (1 << 63, 1 << 63),
        ]
        for (offset, length) in outside {
            try requireError(.outOfRange, "\(length) bytes at \(offset)") {
                _ = try device.info.check(offset: offset, length: length)
            }
        }
        let buffer = Buffer(count: 16)
        for offset in [size - min(size, 15), size, .max - 3, .max] where size > 15 {
            try requireError(.outOfRange, "reading 16 bytes at \(offset)") {
                try device.read(into: buffer.bytes, at: offset)
            }
        }
    }

    /// Changes are refused and leave the content as it is.
    func checkRefusal(_ subject: ConformanceSubject) throws {
        let device = subject.device
        let bytes: [UInt8] = Array(repeating: 0xFF, count: 512)
        let range = 0..<min(512, device.info.size)
        try requireError(.readOnly, "writing") {
            try bytes.withUnsafeBytes {
                try device.write(UnsafeRawBufferPointer(rebasing: $0[..<range.count]), at: 0, durable: false)
            }
        }
        for options: ZeroOptions in [[], .mayPunch, .durable] {
            try requireError(.readOnly, "zeroing") { try device.zero(range, options) }
        }
        try requireError(.readOnly, "discarding") { try device.discard(range, durable: false) }
        try device.flush()
        device.prefetch(range)
        try requireEqual(
            try readBytes(device, at: 0, count: range.count), subject.content[..<range.count], "after refused changes")
    }

    /// Ranges worth asking about: ends, single bytes, across chunk boundaries, everything, and some at random.
    func ranges(of size: UInt64, random count: Int) -> [Range<UInt64>] {
        var ranges: [Range<UInt64>] = [0..<size, 0..<1, (size - 1)..<size]
        for boundary: UInt64 in [512, 4096, 65536, 262144, 1 << 20] where boundary + 4097 < size {
            ranges += [
                (boundary - 1)..<(boundary + 1), boundary..<(boundary + 1), (boundary - 1)..<boundary,
                (boundary - 511)..<(boundary + 4097), 0..<boundary, boundary..<size, 1..<boundary,
            ]
        }
        var generator = SeededGenerator(seed: runSeed)
        for _ in 0..<count {
            let start = UInt64.random(in: 0..<size, using: &generator)
            let lengthMax = generator.oneIn(2) ? min(size - start, 70000) : size - start
            ranges.append(start..<(start + .random(in: 1...lengthMax, using: &generator)))
        }
        return ranges
    }
}
