// Every filter, alone and in stacks, against the device conformance suite.
import Block
import LinuxIO
import Support
import Testing

/// Bytes of most devices here: past 1 MiB, and no multiple of anything.
private let size = 1_200_003

/// A disk in memory that holds `content`.
private func memory(_ content: [UInt8]) throws -> RawFileDevice {
    let device = try NamelessFile.memory(size: UInt64(content.count))
    try content.withUnsafeBytes { try device.write($0, at: 0, durable: false) }
    return device
}

/// A disk whose places move, that holds `content`.
private func relocating(_ content: [UInt8]) throws -> any BlockDevice {
    let device = try makeRelocatingDevice(size: UInt64(content.count))
    try content.withUnsafeBytes { try device.write($0, at: 0, durable: false) }
    return device
}

/// A pattern with holes, and its bytes.
private func pattern(_ size: Int) throws -> (PatternDevice, [UInt8]) {
    let device = try PatternDevice(size: UInt64(size), seed: 5, allocatedShare: 0.6)
    return (device, try readBytes(device, at: 0, count: size))
}

private func scratch(_ device: any BlockDevice) throws -> any BlockDevice {
    try NamelessFile.memory(size: device.info.size)
}

@Suite struct FilterConformanceTests {
    @Test func relocatingDeviceConforms() throws {
        let content = patternBytes(size, seed: 1)
        try DeviceConformance { ConformanceSubject(try relocating(content), content: content) }.run()
    }

    @Test(arguments: [0..<size, 4096..<1_048_576, 1..<1_100_001, 513..<70_000, 65_535..<65_537])
    func sliceConforms(range: Range<Int>) throws {
        let content = patternBytes(size, seed: 2)
        let bytes = UInt64(range.lowerBound)..<UInt64(range.upperBound)
        try DeviceConformance {
            let device = try SliceDevice(try relocating(content), range: bytes, label: "slice")
            return ConformanceSubject(device, content: Array(content[range]))
        }.run()
    }

    @Test func sliceOfPatternConforms() throws {
        let (lower, content) = try pattern(size)
        try DeviceConformance {
            let device = try SliceDevice(lower, range: 77..<1_000_000, label: "slice")
            return ConformanceSubject(device, content: Array(content[77..<1_000_000]))
        }.run()
    }

    @Test(arguments: [1, 511, 65_536, 1_000_000, size - 1, size, size + 1, 1_300_000, 2_097_152])
    func resizedConforms(newSize: Int) throws {
        let content = patternBytes(size, seed: 3)
        let padding = [UInt8](repeating: 0, count: max(0, newSize - size))
        try DeviceConformance {
            let device = try ResizedDevice(try memory(content), size: UInt64(newSize))
            return ConformanceSubject(
                device, content: Array(content.prefix(newSize)) + padding, writableSize: UInt64(min(size, newSize)))
        }.run()
    }

    @Test func roundedConforms() throws {
        let content = patternBytes(size, seed: 4)
        let rounded = (size + 4095) / 4096 * 4096
        try DeviceConformance {
            let device = try ResizedDevice(try relocating(content), roundedUpTo: 4096)
            return ConformanceSubject(
                device, content: content + [UInt8](repeating: 0, count: rounded - size), writableSize: UInt64(size))
        }.run()
    }

    @Test func overlayOverMemoryConforms() throws {
        let content = patternBytes(size, seed: 6)
        try DeviceConformance {
            let lower = try memory(content)
            return ConformanceSubject(try OverlayDevice(lower, scratch: try scratch(lower)), content: content)
        }.run()
    }

    @Test func overlayOverPatternConforms() throws {
        let (lower, content) = try pattern(size)
        try DeviceConformance {
            ConformanceSubject(try OverlayDevice(lower, scratch: try scratch(lower)), content: content)
        }.run()
    }

    @Test func overlayOverSliceAndResizedConforms() throws {
        let (lower, content) = try pattern(size)
        let expected = Array(content[1000...]) + [UInt8](repeating: 0, count: 100_000)
        try DeviceConformance {
            let slice = try SliceDevice(lower, range: 1000..<UInt64(size), label: "slice")
            let longer = try ResizedDevice(slice, size: UInt64(expected.count))
            return ConformanceSubject(try OverlayDevice(longer, scratch: try scratch(longer)), content: expected)
        }.run()
    }

    /// What was copied up before the suite starts is part of the expected content.
    @Test func overlayOverOverlayConforms() throws {
        let (lower, content) = try pattern(size)
        let change = patternBytes(100_000, seed: 7)
        var expected = content
        expected.replaceSubrange(30_000..<130_000, with: change)
        try DeviceConformance {
            let first = try OverlayDevice(lower, scratch: try scratch(lower))
            try change.withUnsafeBytes { try first.write($0, at: 30_000, durable: false) }
            return ConformanceSubject(try OverlayDevice(first, scratch: try scratch(first)), content: expected)
        }.run()
    }

    @Test func readOnlyFiltersConform() throws {
        let (lower, content) = try pattern(size)
        try DeviceConformance {
            ConformanceSubject(FaultDevice(lower, plan: FaultPlan([])), content: content)
        }.run()
        try DeviceConformance {
            ConformanceSubject(try ResizedDevice(lower, size: 500_000), content: Array(content[..<500_000]))
        }.run()
    }

    @Test func faultWithoutFaultsConforms() throws {
        let content = patternBytes(size, seed: 8)
        try DeviceConformance {
            ConformanceSubject(FaultDevice(try relocating(content), plan: FaultPlan([])), content: content)
        }.run()
    }

    /// Faults that never happen send every read through the fault device's own source.
    @Test func faultThatNeverHappensConforms() throws {
        let content = patternBytes(size, seed: 9)
        let plan = FaultPlan([
            .init(.readError(.inputOutput), range: 1000..<600_000, probability: 0),
            .init(.corruption, range: 700_001..<700_002, probability: 0),
            .init(.writeError(.noSpace), range: 0..<UInt64.max, probability: 0),
        ])
        try DeviceConformance {
            ConformanceSubject(FaultDevice(try relocating(content), plan: plan), content: content)
        }.run()
    }

    @Test func faultsElsewhereConform() throws {
        let content = patternBytes(size, seed: 10)
        let beyond = UInt64(size)..<UInt64(size + 4096)
        let plan = FaultPlan([
            .init(.readError(.inputOutput), range: beyond), .init(.corruption, range: beyond),
            .init(.writeError(.noSpace), range: beyond),
        ])
        try DeviceConformance {
            ConformanceSubject(FaultDevice(try memory(content), plan: plan), content: content)
        }.run()
    }

    @Test func tallStackConforms() throws {
        let content = patternBytes(size, seed: 11)
        let expected = Array(content[333..<900_000]) + [UInt8](repeating: 0, count: 123)
        let plan = FaultPlan([.init(.corruption, range: 0..<50_000, probability: 0)])
        try DeviceConformance {
            let faulty = FaultDevice(try relocating(content), plan: plan)
            let slice = try SliceDevice(faulty, range: 333..<900_000, label: "slice")
            let longer = try ResizedDevice(slice, size: UInt64(expected.count))
            let overlay = try OverlayDevice(longer, scratch: try scratch(longer))
            return ConformanceSubject(
                try SliceDevice(overlay, range: 0..<UInt64(expected.count), label: "all"), content: expected)
        }.run()
    }
}
