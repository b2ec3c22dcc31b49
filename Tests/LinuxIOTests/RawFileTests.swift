// What regular files do beyond the contract: holes, space given back, files that shrink, writers elsewhere, full disks.
import Block
import Glibc
import LinuxIO
import Support
import Testing

private func writable(direct: Bool = false) -> RawOptions {
    var options = RawOptions()
    options.isWritable = true
    options.isDirect = direct
    return options
}

private func write(_ bytes: [UInt8], to device: any BlockDevice, at offset: UInt64) throws {
    try bytes.withUnsafeBytes { try device.write($0, at: offset, durable: false) }
}

/// Bytes of storage that a file takes.
private func storage(_ path: String) throws -> Int {
    var status = stat()
    try require(stat(path, &status) == 0, "stat of \(path)")
    return Int(status.st_blocks) * 512
}

private func traits(_ device: any BlockDevice) throws -> FileTraits {
    guard case .file(let reference, _) = try mapped(device, 0..<1).extents[0].place else {
        throw CheckFailure("a raw disk is not mapped to a file")
    }
    return reference.traits
}

@Suite struct HoleTests {
    private let hole = AllocationFlags.hole | AllocationFlags.zero

    @Test func statusTellsWhatWasPunched() throws {
        try withTemporaryDirectory { directory in
            let path = try directory.makeFile("disk", patternBytes(1 << 20, seed: 1))
            let device = try RawFileDevice.open(path, writable())
            try device.zero(65536..<131_072, .mayPunch)
            try device.discard(524_288..<1_048_576, durable: true)
            let found = try status(device, .allocation, of: 0..<(1 << 20))
            #expect(found.extents.map(\.length) == [65536, 65536, 393_216, 524_288])
            #expect(found.extents.map(\.value) == [0, hole, 0, hole])
            // The same from the middle of a hole and of data, to the middle of others.
            let inner = try status(device, .allocation, of: 70_000..<600_000)
            #expect(inner.extents.map(\.length) == [61_072, 393_216, 75_712])
            #expect(inner.extents.map(\.value) == [hole, 0, hole])
            // Asked afresh: a write into a hole shows.
            try write([1], to: device, at: 600_000)
            #expect(try status(device, .allocation, of: 600_000..<600_001).extents.map(\.value) == [0])
        }
    }

    @Test func onlyPunchingGivesStorageBack() throws {
        try withTemporaryDirectory { directory in
            let path = try directory.makeFile("disk", patternBytes(1 << 20, seed: 2))
            let device = try RawFileDevice.open(path, writable())
            try device.flush()
            let before = try storage(path)
            #expect(before >= 1 << 20)
            try device.zero(0..<262_144, [])
            #expect(try storage(path) >= before, "zeroing without .mayPunch gave storage back")
            try device.zero(262_144..<524_288, .mayPunch)
            #expect(try storage(path) <= before - 262_144)
            try device.discard(524_288..<786_432, durable: false)
            #expect(try storage(path) <= before - 524_288)
            var expected = [UInt8](repeating: 0, count: 786_432)
            expected += patternBytes(1 << 20, seed: 2)[786_432...]
            try requireEqual(try contentOfFile(path), expected, "the file")
        }
    }

    /// tmpfs knows holes but cannot zero a range in place.
    @Test func memoryRefusesFastZerosThatItCannotDo() throws {
        let device = try NamelessFile.memory(size: 1 << 20)
        try write(patternBytes(1 << 20, seed: 3), to: device, at: 0)
        try requireError(.unsupported, "fast zeros in place") { try device.zero(0..<4096, .fastOnly) }
        #expect(try readBytes(device, at: 0, count: 8) == Array(patternBytes(1 << 20, seed: 3)[..<8]))
        try device.zero(0..<4096, [.fastOnly, .mayPunch])
        try device.zero(4096..<8192, [])
        let found = try status(device, .allocation, of: 0..<(1 << 20))
        #expect(found.extents.map(\.length) == [4096, (1 << 20) - 4096])
        #expect(found.extents.map(\.value) == [hole, 0])
    }

    @Test func memoryOfTheLargestSize() throws {
        let most = UInt64(Int64.max)
        let device = try NamelessFile.memory(size: most)
        try write([1, 2, 3], to: device, at: most - 3)
        #expect(try readBytes(device, at: most - 4, count: 4) == [0, 1, 2, 3])
        try requireError(.outOfRange, "past the end") { _ = try readBytes(device, at: most - 1, count: 2) }
        // The kernel's search for data does not reach the last page of all, but the one before the last two.
        let last = (most - 8192) / 4096 * 4096
        try write([1], to: device, at: last + 1)
        let found = try status(device, .allocation, of: 0..<(last + 8192))
        #expect(found.extents.map(\.length) == [last, 4096, 4096])
        #expect(found.extents.map(\.value) == [hole, 0, hole])
        try device.zero(0..<most, .mayPunch)
        #expect(try readBytes(device, at: most - 4, count: 4) == [0, 0, 0, 0])
    }
}

@Suite struct ChangingFileTests {
    @Test(arguments: [false, true])
    func fileThatShrinksFailsToRead(direct: Bool) throws {
        try withTemporaryDirectory { directory in
            let content = patternBytes(100_000, seed: 4)
            let path = try directory.makeFile("disk", content)
            var options = RawOptions()
            options.isDirect = direct
            let device = try RawFileDevice.open(path, options)
            try require(truncate(path, 50_000) == 0)
            try requireEqual(try readBytes(device, at: 0, count: 50_000), content[..<50_000], "what is left")
            for (offset, count) in [(0, 100_000), (49_999, 2), (50_000, 1), (49_152, 4096), (99_999, 1)] {
                try requireError(.inputOutput, "reading \(count) bytes at \(offset)") {
                    _ = try readBytes(device, at: UInt64(offset), count: count)
                }
            }
            let buffer = Buffer(count: 4096)
            #expect(try !device.readResident(into: buffer.bytes, at: 90_000))
        }
    }

    /// What is gone is no hole: a copy must not take it for zeros.
    @Test func fileThatShrinksHasNoHoleAtItsEnd() throws {
        try withTemporaryDirectory { directory in
            let path = try directory.makeFile("disk", patternBytes(100_000, seed: 5))
            let device = try RawFileDevice.open(path)
            try require(truncate(path, 50_000) == 0)
            try requireError(.inputOutput, "status past the end") {
                _ = try status(device, .allocation, of: 60_000..<100_000)
            }
            try requireError(.inputOutput, "status across the end") {
                _ = try status(device, .allocation, of: 0..<100_000)
            }
        }
    }

    @Test func writersElsewhereMakeAFileUnstable() throws {
        try withTemporaryDirectory { directory in
            let path = try directory.makeFile("disk", patternBytes(10_000, seed: 6))
            try require(link(path, directory.file("other name")) == 0)
            let reader = try RawFileDevice.open(path)
            #expect(try traits(reader).contains(.stable))
            do {
                let writer = try RawFileDevice.open(directory.file("other name"), writable())
                #expect(try !traits(reader).contains(.stable))
                #expect(try !traits(writer).contains(.stable))
                do {
                    let second = try RawFileDevice.open(path, writable())
                    #expect(try !traits(second).contains(.stable))
                }
                #expect(try !traits(reader).contains(.stable), "one of two writers is gone")
                _ = writer.info
                withExtendedLifetime(writer) {}
            }
            #expect(try traits(reader).contains(.stable), "all writers are gone")
            let elsewhere = try RawFileDevice.open(try directory.makeFile("third", [1]), writable())
            #expect(try traits(reader).contains(.stable), "another file is written")
            withExtendedLifetime(elsewhere) {}
        }
    }

    @Test func directFilesAreNeverTried() throws {
        try withTemporaryDirectory { directory in
            let path = try directory.makeFile("disk", patternBytes(8192, seed: 7))
            var options = RawOptions()
            #expect(try !traits(RawFileDevice.open(path, options)).contains(.direct))
            options.isDirect = true
            let device = try RawFileDevice.open(path, options)
            let found = try traits(device)
            #expect(found.contains(.direct) && !found.contains(.tryable))
            #expect(found.alignment >= 512 && found.alignment <= 4096)
            let buffer = Buffer(count: 4096)
            #expect(try !device.readResident(into: buffer.bytes, at: 0))
        }
    }

    /// The last sector is a part only: it is written whole, and the file does not grow.
    @Test(arguments: [1003, 4097, 70_001])
    func directWritesKeepTheFilesSize(size: Int) throws {
        try withTemporaryDirectory { directory in
            var expected = patternBytes(size, seed: 8)
            let path = try directory.makeFile("disk", expected)
            let device = try RawFileDevice.open(path, writable(direct: true))
            try write([1, 2, 3], to: device, at: UInt64(size - 3))
            expected.replaceSubrange((size - 3)..<size, with: [1, 2, 3])
            try requireEqual(try contentOfFile(path), expected, "after writing the end")
            try device.zero(UInt64(size - 2)..<UInt64(size), [])
            try write([9], to: device, at: 0)
            expected.replaceSubrange((size - 2)..<size, with: [0, 0])
            expected[0] = 9
            try requireEqual(try contentOfFile(path), expected, "after zeroing the end")
        }
    }

    @Test func refusesWhatIsNoDisk() throws {
        try withTemporaryDirectory { directory in
            try requireError(.notFound, "nothing") { _ = try RawFileDevice.open(directory.file("nothing")) }
            try requireError(.invalid, "a directory") { _ = try RawFileDevice.open(directory.path) }
            try requireError(.invalid, "a character device") { _ = try RawFileDevice.open("/dev/zero") }
            // Opening must not wait for somebody to write into it.
            try require(mkfifo(directory.file("pipe"), 0o600) == 0)
            try requireError(.invalid, "a pipe") { _ = try RawFileDevice.open(directory.file("pipe")) }
            try requireError(.invalid, "a file as a node") {
                _ = try BlockNodeDevice.open(try directory.makeFile("file", [1]))
            }
        }
    }
}

@Suite(.enabled(if: SmallFileSystem.isAvailable, "needs root and the right to mount"))
struct FullDiskTests {
    @Test func fullFileSystemIsNoSpace() throws {
        try SmallFileSystem.with { directory in
            let content = patternBytes(65536, seed: 8)
            let path = try directory.makeSparseFile("disk", size: 1 << 30)
            let device = try RawFileDevice.open(path, writable())
            try write(content, to: device, at: 0)
            try requireError(.noSpace, "more than fits") {
                try write(patternBytes(4 << 20, seed: 9), to: device, at: 1 << 20)
            }
            try requireEqual(try readBytes(device, at: 0, count: content.count), content, "what was written before")
            // Room again once something is given back.
            try device.discard(1 << 20..<1 << 30, durable: false)
            try write(content, to: device, at: 1 << 29)
            try requireEqual(try readBytes(device, at: 1 << 29, count: content.count), content, "after making room")
        }
    }

    /// The overlay's scratch fills up: the write fails, everything reads as before.
    @Test func fullScratchLosesNothing() throws {
        try SmallFileSystem.with { directory in
            let lower = try PatternDevice(size: 64 << 20, seed: 1)
            let scratch = try NamelessFile.scratch(size: 64 << 20, directory: directory.path)
            let overlay = try OverlayDevice(lower, scratch: scratch)
            var written: [UInt64] = []
            var failure: BlockError?
            for chunk: UInt64 in 0..<64 {
                do {
                    try write([7, 7, 7], to: overlay, at: chunk * 65536 + 5)
                    written.append(chunk)
                } catch let error as BlockError {
                    failure = error
                    break
                }
            }
            #expect(failure?.kind == .noSpace)
            #expect(!written.isEmpty)
            var model = try readBytes(lower, at: 0, count: 4 << 20)
            for chunk in written {
                let start = Int(chunk) * 65536 + 5
                model.replaceSubrange(start..<(start + 3), with: [7, 7, 7])
            }
            try requireEqual(try readBytes(overlay, at: 0, count: 4 << 20), model, "after the failure")
        }
    }
}
