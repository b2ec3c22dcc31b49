// Every device over files, memory and block nodes against the device conformance suite.
import Block
import Glibc
import LinuxIO
import Support
import Testing

private let size = 1_200_003

private func options(writable: Bool = true, direct: Bool = false) -> RawOptions {
    var options = RawOptions()
    options.isWritable = writable
    options.isDirect = direct
    return options
}

private func fill(_ device: any BlockDevice, _ content: [UInt8]) throws {
    try content.withUnsafeBytes { try device.write($0, at: 0, durable: false) }
}

@Suite struct FileConformanceTests {
    @Test(arguments: [false, true], [false, true])
    func fileConforms(writable: Bool, direct: Bool) throws {
        try withTemporaryDirectory { directory in
            let content = patternBytes(size, seed: 1)
            try DeviceConformance {
                let path = try directory.makeFile("disk", content)
                let device = try RawFileDevice.open(path, options(writable: writable, direct: direct))
                return ConformanceSubject(device, content: content)
            }.run()
            #expect(try contentOfFile(directory.file("disk")).count == size, "the file's size has changed")
        }
    }

    /// Data and holes of all sizes, one of them at the end.
    @Test(arguments: [false, true])
    func sparseFileConforms(direct: Bool) throws {
        try withTemporaryDirectory { directory in
            var content = [UInt8](repeating: 0, count: size)
            let islands = [0..<4096, 65_536..<70_000, 500_001..<500_002, 900_000..<1_100_000]
            try DeviceConformance {
                let path = try directory.makeSparseFile("disk", size: UInt64(size))
                let writer = try RawFileDevice.open(path, options())
                for island in islands {
                    let bytes = patternBytes(island.count, seed: UInt64(island.lowerBound))
                    try bytes.withUnsafeBytes { try writer.write($0, at: UInt64(island.lowerBound), durable: false) }
                    content.replaceSubrange(island, with: bytes)
                }
                return ConformanceSubject(
                    try RawFileDevice.open(path, options(direct: direct)), content: content)
            }.run()
        }
    }

    @Test func fileOnTmpfsConforms() throws {
        guard access("/dev/shm", W_OK) == 0 else { return }
        try withTemporaryDirectory(in: "/dev/shm") { directory in
            let content = patternBytes(size, seed: 2)
            try DeviceConformance {
                let path = try directory.makeFile("disk", content)
                return ConformanceSubject(try RawFileDevice.open(path, options()), content: content)
            }.run()
        }
    }

    @Test func memoryConforms() throws {
        let content = patternBytes(size, seed: 3)
        try DeviceConformance {
            let device = try NamelessFile.memory(size: UInt64(size))
            try fill(device, content)
            return ConformanceSubject(device, content: content)
        }.run()
    }

    @Test func scratchConforms() throws {
        try withTemporaryDirectory { directory in
            let content = patternBytes(size, seed: 4)
            try DeviceConformance {
                let device = try NamelessFile.scratch(size: UInt64(size), directory: directory.path)
                try fill(device, content)
                return ConformanceSubject(device, content: content)
            }.run()
        }
    }

    @Test(arguments: [0, 0.3, 1])
    func patternConforms(share: Double) throws {
        let device = try PatternDevice(size: UInt64(size), seed: 7, allocatedShare: share)
        let content = try readBytes(device, at: 0, count: size)
        #expect(content.contains { $0 != 0 } == (share > 0))
        try DeviceConformance { ConformanceSubject(device, content: content) }.run()
    }

    /// Copy-up from a file into scratch, as serve --overlay does.
    @Test func overlayOverFileConforms() throws {
        try withTemporaryDirectory { directory in
            let content = patternBytes(size, seed: 5)
            let path = try directory.makeFile("disk", content)
            try DeviceConformance {
                let lower = try RawFileDevice.open(path)
                let scratch = try NamelessFile.scratch(size: UInt64(size), directory: directory.path)
                return ConformanceSubject(try OverlayDevice(lower, scratch: scratch), content: content)
            }.run()
            try requireEqual(try contentOfFile(path), content, "the source after writes to the overlay")
        }
    }
}

/// Loop devices are few, so one at a time.
@Suite(.serialized, .enabled(if: LoopDevice.areAvailable, Comment(rawValue: LoopDevice.reason)))
struct BlockNodeConformanceTests {
    @Test(arguments: [512, 4096], [false, true])
    func blockNodeConforms(sectorSize: Int, direct: Bool) throws {
        let content = patternBytes(293 * 4096, seed: 6)
        try LoopDevice.with(content, sectorSize: sectorSize) { node, _ in
            try DeviceConformance {
                let device = try openWhenReleased(node, options(direct: direct))
                try fill(device, content)
                return ConformanceSubject(device, content: content)
            }.run()
            let reader = try openWhenReleased(node, options(writable: false, direct: direct))
            let now = try readBytes(reader, at: 0, count: Int(reader.info.size))
            try DeviceConformance { ConformanceSubject(reader, content: now) }.run()
        }
    }

    @Test func filtersOverABlockNodeConform() throws {
        let content = patternBytes(1 << 20, seed: 8)
        try LoopDevice.with(content, sectorSize: 4096) { node, _ in
            try DeviceConformance {
                let device = try BlockNodeDevice.open(node, options(direct: true))
                try fill(device, content)
                let slice = try SliceDevice(device, range: 4096..<1_000_448, label: "part")
                return ConformanceSubject(
                    try ResizedDevice(slice, size: 900_001), content: Array(content[4096..<904_097]))
            }.run()
        }
    }
}

/// Opens a node, which nobody else may have open; the threads of the test before let go of theirs a moment after it.
private func openWhenReleased(_ node: String, _ options: RawOptions) throws -> any BlockDevice {
    for _ in 0..<500 {
        if let device = try? BlockNodeDevice.open(node, options) { return device }
        usleep(10_000)
    }
    return try BlockNodeDevice.open(node, options)
}
