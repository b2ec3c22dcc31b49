// Opening a source with what is laid over it: the order of the filters, and everything that is refused.
import Block
import Glibc
import LinuxIO
import Support
import Testing
import Transports

private func specification(_ text: String) throws -> DiskSpecification { DiskSpecification(try SourceReference(text)) }

@Suite struct OpenSourceTests {
    @Test func opensAFile() throws {
        try withTemporaryDirectory { directory in
            let content = patternBytes(10_000, seed: 1)
            let path = try directory.makeFile("disk.img", content)
            for text in [path, "file:\(path)", "file://\(path)?format=raw", "file://\(path)?direct=yes"] {
                let device = try SourceReference(text).open()
                #expect(device.info.isReadOnly)
                try requireEqual(try readBytes(device, at: 0, count: 10_000), content, text)
            }
            let writable = try SourceReference(path).open(writable: true)
            #expect(!writable.info.isReadOnly)
        }
    }

    @Test(arguments: [
        "pattern:1M?allocated=", "pattern:1M?allocated=%", "pattern:1M?allocated=%25", "pattern:1M?allocated=x",
        "pattern:1M?allocated=nan%", "pattern:1M?allocated=101%", "pattern:1M?allocated=-1%",
        "pattern:1M?allocated=1%%",
        "pattern:1M?allocated=50%x", "pattern:1M?seed=", "pattern:1M?seed=-1", "pattern:1M?seed=x", "pattern:1M?sead=1",
        "pattern:0", "memory:1M?x=1", "memory:0",
    ])
    func refuses(text: String) throws {
        try requireError(.invalid, text) { _ = try SourceReference(text).open() }
    }

    @Test func refusesParametersThatMeanNothing() throws {
        try withTemporaryDirectory { directory in
            let path = try directory.makeFile("disk.img", [1])
            for query in ["direct=maybe", "exclusive=", "readonly=1", "format=vhdx7", "seed=1"] {
                try requireError(.invalid, query) { _ = try SourceReference("file://\(path)?\(query)").open() }
            }
            try requireError(.notFound, "no file") { _ = try SourceReference(directory.file("none")).open() }
            try requireError(.invalid, "a directory") { _ = try SourceReference(directory.path).open() }
            try require(mkfifo(directory.file("pipe.img"), 0o600) == 0)
            try requireError(.invalid, "a pipe") { _ = try SourceReference(directory.file("pipe.img")).open() }
        }
    }

    @Test func patternFollowsItsParameters() throws {
        let first = try SourceReference("pattern:256K?seed=1").open()
        let again = try SourceReference("pattern:256K?seed=1&allocated=100%").open()
        let other = try SourceReference("pattern:256K?seed=2").open()
        let bytes = try readBytes(first, at: 0, count: 262_144)
        #expect(bytes == (try readBytes(again, at: 0, count: 262_144)))
        #expect(bytes != (try readBytes(other, at: 0, count: 262_144)))
        let holes = try SourceReference("pattern:256K?allocated=0").open()
        #expect(try status(holes, .allocation, of: 0..<262_144).extents.map(\.value) == [3])
    }
}

@Suite struct DiskSpecificationTests {
    @Test func offsetAndLengthCut() throws {
        let whole = try readBytes(try SourceReference("pattern:1M").open(), at: 0, count: 1 << 20)
        for (offset, length, expected) in [
            (0, nil, 0..<(1 << 20)), (1000, nil, 1000..<(1 << 20)), (1000, 50, 1000..<1050),
            ((1 << 20) - 1, 1, ((1 << 20) - 1)..<(1 << 20)),
        ] as [(UInt64, UInt64?, Range<Int>)] {
            var disk = try specification("pattern:1M")
            disk.offset = offset
            disk.length = length
            let device = try disk.open()
            try requireEqual(try readBytes(device, at: 0, count: expected.count), whole[expected], "\(expected)")
            #expect(device.info.size == UInt64(expected.count))
        }
    }

    @Test(arguments: [(1 << 20, nil), (0, 0), (0, (1 << 20) + 1), (5, 1 << 20), (.max, nil), (.max, 1), (1, .max)])
    func refusesPartsThatAreNotThere(offset: UInt64, length: UInt64?) throws {
        var disk = try specification("pattern:1M")
        disk.offset = offset
        disk.length = length
        try requireError(.outOfRange, "\(offset), \(String(describing: length))") { _ = try disk.open() }
    }

    /// Faults count from the source's start, the offset comes after them, the size last.
    @Test func layersLieInOrder() throws {
        var disk = try specification("pattern:1M?seed=3")
        disk.faults = [.init(.corruption, range: 1000..<1001)]
        disk.offset = 1000
        disk.length = 100
        disk.size = 200
        disk.roundedTo = 512
        disk.access = .overlay
        let device = try disk.open()
        let source = try readBytes(try SourceReference("pattern:1M?seed=3").open(), at: 1000, count: 100)
        #expect(device.info.size == 512 && !device.info.isReadOnly)
        let expected = [source[0] ^ 1] + source[1...] + [UInt8](repeating: 0, count: 412)
        try requireEqual(try readBytes(device, at: 0, count: 512), expected, "all layers")
        // On top of them all, even the zeros past the end can be written.
        try [UInt8(9)].withUnsafeBytes { try device.write($0, at: 511, durable: false) }
        #expect(try readBytes(device, at: 510, count: 2) == [0, 9])
    }

    @Test func sizeIsTheLastWordBeforeRounding() throws {
        var disk = try specification("pattern:1M")
        for size in [1, 1000, 2_000_000] as [UInt64] {
            disk.roundedTo = nil
            disk.size = size
            #expect(try disk.open().info.size == size)
            disk.roundedTo = 4096
            #expect(try disk.open().info.size == (size + 4095) / 4096 * 4096)
        }
    }

    @Test func overlayConformsAndLeavesTheSourceAlone() throws {
        try withTemporaryDirectory { directory in
            let content = patternBytes(700_001, seed: 5)
            let path = try directory.makeFile("disk.img", content)
            var disk = try specification(path)
            disk.access = .overlay
            disk.scratchDirectory = directory.path
            try DeviceConformance { ConformanceSubject(try disk.open(), content: content) }.run()
            try requireEqual(try contentOfFile(path), content, "the source")
        }
    }

    @Test func overlayNeedsScratchSpace() throws {
        var disk = try specification("pattern:1M")
        disk.access = .overlay
        disk.scratchDirectory = "/nonexistent/scratch"
        try requireError(.notFound, "no scratch directory") { _ = try disk.open() }
    }

    @Test func writableNeedsAWritableSource() throws {
        var disk = try specification("pattern:1M")
        disk.access = .writable
        try requireError(.readOnly, "a pattern") { _ = try disk.open() }
        disk = try specification("memory:1M")
        disk.access = .writable
        #expect(try !disk.open().info.isReadOnly)
    }

    @Test func partitionThatIsNotThere() throws {
        var disk = try specification("memory:1M")
        disk.partition = 1
        try requireError(.notFound, "no partition table") { _ = try disk.open() }
    }
}
