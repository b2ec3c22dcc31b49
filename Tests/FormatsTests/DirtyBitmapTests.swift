// Persistent dirty bitmaps: served when they can be trusted, listed with the reason when not.
import Block
import Formats
import Foundation
import Testing

@Suite struct DirtyBitmapTests {
    /// Offsets of an image's written ranges at a granularity, as the bitmap must have them.
    private func expected(_ ranges: [Range<UInt64>], size: UInt64, granularity: UInt64) throws -> [StatusExtent] {
        let bitmap = try DirtyBitmap(size: size, granularity: granularity)
        for range in ranges { bitmap.set(range) }
        var list = StatusList(capacity: 1 << 20)
        _ = bitmap.status(of: 0..<size, into: &list)
        return list.extents
    }

    private func same(_ a: [StatusExtent], _ b: [StatusExtent]) -> Bool {
        a.map(\.length) == b.map(\.length) && a.map(\.value) == b.map(\.value)
    }

    @Test(arguments: [512, 4096, 65536, 1 << 20], [512, 65536])
    func bitmapHasWhatWasWritten(granularity: Int, clusterSize: Int) throws {
        let scratch = try Scratch()
        try scratch.qemuImg("create -q -f qcow2 -o cluster_size=\(clusterSize) a.qcow2 64M")
        try scratch.qemuImg("bitmap --add -g \(granularity) a.qcow2 changes")
        try scratch.qemuIO(
            "a.qcow2",
            ["write -P 1 0 1", "write -P 1 100k 300k", "write -z 5M 1M", "discard 20M 64k", "write 67108863 1"])
        let device = try scratch.open("a.qcow2")
        #expect(device.info.dirtyBitmaps == ["changes"])
        let written: [Range<UInt64>] = [
            0..<1, (100 << 10)..<(400 << 10), (5 << 20)..<(6 << 20), (20 << 20)..<((20 << 20) + 65536),
            67_108_863..<67_108_864,
        ]
        let wanted = try expected(written, size: 64 << 20, granularity: UInt64(granularity))
        #expect(same(try wholeStatus(device, .dirtyBitmap(0)), wanted))
        #expect(same(try wholeStatus(device, .dirtyBitmap(0), capacity: 1), wanted))
    }

    @Test func partOfABitmapIsAskedFrom() throws {
        let scratch = try Scratch()
        try scratch.qemuImg("create -q -f qcow2 a.qcow2 16M")
        try scratch.qemuImg("bitmap --add -g 4096 a.qcow2 changes")
        try scratch.qemuIO("a.qcow2", ["write 1M 8k", "write 3M 4k"])
        let device = try scratch.open("a.qcow2")
        var list = StatusList(capacity: 10)
        let start: UInt64 = 1_048_576 + 1000
        let end: UInt64 = 3_145_729
        #expect(try device.status(.dirtyBitmap(0), of: start..<end, into: &list) == end)
        let lengths: [UInt64] = [8192 - 1000, 2_097_152 - 8192, 1]
        #expect(list.extents.map(\.length) == lengths)
        #expect(list.extents.map(\.value) == [1, 0, 1])
    }

    @Test func mergedAndEmptyAndManyBitmapsAreListedByName() throws {
        let scratch = try Scratch()
        try scratch.qemuImg("create -q -f qcow2 a.qcow2 16M")
        try scratch.qemuImg("bitmap --add -g 65536 a.qcow2 first")
        try scratch.qemuIO("a.qcow2", ["write 0 64k"])
        try scratch.qemuImg("bitmap --add -g 65536 a.qcow2 second")
        try scratch.qemuIO("a.qcow2", ["write 8M 64k"])
        try scratch.qemuImg("bitmap --add --merge first --merge second -g 65536 a.qcow2 both")
        try scratch.qemuImg("bitmap --add --disable -g 4096 a.qcow2 idle")
        let device = try scratch.open("a.qcow2")
        #expect(device.info.dirtyBitmaps.sorted() == ["both", "first", "idle", "second"])
        func dirty(_ name: String) throws -> [StatusExtent] {
            let index = try #require(device.info.dirtyBitmaps.firstIndex(of: name))
            return try wholeStatus(device, .dirtyBitmap(index))
        }
        let later: Range<UInt64> = 8_388_608..<8_388_609
        #expect(same(try dirty("both"), try expected([0..<1, later], size: 16 << 20, granularity: 65536)))
        #expect(same(try dirty("second"), try expected([later], size: 16 << 20, granularity: 65536)))
        #expect(try dirty("idle").map(\.value) == [0])
        #expect(throws: BlockError.self) { try wholeStatus(device, .dirtyBitmap(4)) }
    }

    @Test func bitmapOfAFullyWrittenDiskIsAllOnes() throws {
        let scratch = try Scratch()
        try scratch.qemuImg("create -q -f qcow2 -o cluster_size=512 a.qcow2 4M")
        try scratch.qemuImg("bitmap --add -g 512 a.qcow2 changes")
        try scratch.qemuIO("a.qcow2", ["write 0 4M"])
        let extents = try wholeStatus(try scratch.open("a.qcow2"), .dirtyBitmap(0))
        #expect(same(extents, [StatusExtent(length: 4 << 20, value: 1)]))
    }

    /// An image with one bitmap, as bytes, and where its directory and table are.
    private func image() throws -> (bytes: [UInt8], directory: Int, table: Int) {
        let scratch = try Scratch()
        try scratch.qemuImg("create -q -f qcow2 a.qcow2 16M")
        try scratch.qemuImg("bitmap --add -g 65536 a.qcow2 changes")
        try scratch.qemuIO("a.qcow2", ["write 0 64k"])
        let bytes = try scratch.bytes("a.qcow2")
        var position = Int(Qcow2Layout(bytes).half(100))
        while Qcow2Layout(bytes).half(position) != 0x2385_2875 {
            position += 8 + (Int(Qcow2Layout(bytes).half(position + 4)) + 7) & ~7
        }
        let directory = Int(Qcow2Layout(bytes).word(position + 24))
        return (bytes, directory, Int(Qcow2Layout(bytes).word(directory)))
    }

    private func expectUnavailable(_ bytes: [UInt8], sourceLocation: SourceLocation = #_sourceLocation) throws {
        let device = try Qcow2Device(lower: BytesDevice(bytes))
        #expect(device.info.dirtyBitmaps.isEmpty, sourceLocation: sourceLocation)
        #expect(!device.bitmaps.isEmpty, sourceLocation: sourceLocation)
        #expect(device.bitmaps.allSatisfy { $0.problem != nil }, sourceLocation: sourceLocation)
        #expect(throws: BlockError.self, sourceLocation: sourceLocation) { try wholeStatus(device, .dirtyBitmap(0)) }
        // The disk itself is not in doubt.
        #expect(try readBytes(device, 0, 512).count == 512, sourceLocation: sourceLocation)
    }

    @Test func bitmapInUseIsListedButNotServed() throws {
        var (bytes, directory, _) = try image()
        bytes[directory + 15] |= 1
        try expectUnavailable(bytes)
    }

    @Test func bitmapsOfAnImageChangedByOthersAreNotServed() throws {
        var (bytes, _, _) = try image()
        bytes[95] &= ~1
        try expectUnavailable(bytes)
    }

    @Test func absurdDirectoriesAreNotServed() throws {
        let (good, directory, _) = try image()
        // Field by field: table offset, its entries, flags, type, granularity, lengths of the name and of extra data.
        let changes: [(Int, [UInt8])] = [
            (0, [0xFF, 0xFF, 0xFF, 0xFF]), (4, [0, 0, 0, 1]), (8, [0xFF, 0xFF, 0xFF, 0xFF]), (8, [0, 0, 0, 0]),
            (12, [0x80, 0, 0, 0]), (16, [7]), (17, [8]), (17, [32]), (17, [255]), (18, [0xFF, 0xFF]), (18, [0, 0]),
            (20, [0xFF, 0xFF, 0xFF, 0xFF]), (20, [0, 0, 0, 8]),
        ]
        for (offset, value) in changes {
            var bytes = good
            bytes.replaceSubrange((directory + offset)..<(directory + offset + value.count), with: value)
            try expectUnavailable(bytes)
        }
    }

    @Test func absurdDirectoryExtensionsAreNotServed() throws {
        let (good, _, _) = try image()
        var position = Int(Qcow2Layout(good).half(100))
        while Qcow2Layout(good).half(position) != 0x2385_2875 {
            position += 8 + (Int(Qcow2Layout(good).half(position + 4)) + 7) & ~7
        }
        for (offset, value) in [
            (8, UInt64.max), (16, .max), (24, .max), (24, 512), (16, 1), (16, 1 << 40), (24, 1 << 50),
        ] {
            var bytes = good
            Qcow2Builder.store(&bytes, position + offset, value)
            try expectUnavailable(bytes)
        }
    }

    @Test func wrongTableEntriesAreErrors() throws {
        let (good, _, table) = try image()
        for entry: UInt64 in [.max, 0x200, 1 << 55, 0x1234, 65536 | 1] {
            var bytes = good
            Qcow2Builder.store(&bytes, table, entry)
            let device = try Qcow2Device(lower: BytesDevice(bytes))
            #expect(throws: BlockError.self) { try wholeStatus(device, .dirtyBitmap(0)) }
        }
        var bytes = good
        Qcow2Builder.store(&bytes, table, UInt64(1))
        let device = try Qcow2Device(lower: BytesDevice(bytes))
        #expect(try wholeStatus(device, .dirtyBitmap(0)).map(\.value) == [1])
    }
}
