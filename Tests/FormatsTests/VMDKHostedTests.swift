// The kinds of VMDK that qemu-img makes, read whole and compared: sparse, flat, in parts, stream-optimised.
import Block
import Foundation
import Support
import Testing

@testable import Formats

@Suite struct VMDKHostedTests {
    static let subformats = [
        "monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "streamOptimized",
    ]

    /// A raw disk with data, runs of zeros and holes, also across what one grain table maps (32 MiB).
    static func makeSource(_ scratch: Scratch, size: Int) throws {
        try Data().write(to: URL(fileURLWithPath: scratch.file("source.raw")))
        truncate(scratch.file("source.raw"), off_t(size))
        let file = try #require(FileHandle(forWritingAtPath: scratch.file("source.raw")))
        var random = SplitMix(seed: UInt64(size))
        var offset = 0
        while offset < size {
            let count = min(Int.random(in: 1...400_000, using: &random), size - offset)
            try file.seek(toOffset: UInt64(offset))
            try file.write(contentsOf: Data(patternBytes(count, seed: UInt64(offset) + 1)))
            offset += count + Int.random(in: 0...3_000_000, using: &random)
        }
        for boundary in [32 << 20, 64 << 20] where boundary + 5000 < size {
            try file.seek(toOffset: UInt64(boundary - 5000))
            try file.write(contentsOf: Data(patternBytes(10_000, seed: UInt64(boundary))))
        }
        try file.close()
    }

    static func open(_ scratch: Scratch, _ name: String) throws -> any BlockDevice {
        try openDisk(scratch.resolved(name), .guess(name: name, isNodeOrRemote: false))
    }

    // The sizes: past two grain tables; no whole number of grains, with less than a grain; a single sector.
    @Test(arguments: subformats, [(70 << 20) + 3 * 512, 40 * 512, 512])
    func diskIsReadWhole(subformat: String, size: Int) throws {
        let scratch = try Scratch()
        try Self.makeSource(scratch, size: size)
        try scratch.qemuImg("convert -f raw -O vmdk -o subformat=\(subformat) source.raw a.vmdk")
        let device = try Self.open(scratch, "a.vmdk")
        #expect(device.info.format == "vmdk" && device.info.isReadOnly)
        #expect(device.info.identity.contains { $0 == ("vmdk type", subformat) })
        try expectSame(device, try scratch.bytes("source.raw"))
    }

    @Test(arguments: subformats)
    func whatIsAllocatedIsWhatQEMUSays(subformat: String) throws {
        let scratch = try Scratch()
        try Self.makeSource(scratch, size: 40 << 20)
        try scratch.qemuImg("convert -f raw -O vmdk -o subformat=\(subformat) source.raw a.vmdk")
        try expectSameAllocation(
            scratch, "a.vmdk", try Self.open(scratch, "a.vmdk"), try scratch.bytes("source.raw"),
            depth: subformat != "twoGbMaxExtentFlat" && subformat != "monolithicFlat", format: "vmdk")
    }

    @Test(arguments: ["twoGbMaxExtentSparse", "twoGbMaxExtentFlat"])
    func disksInPartsAreReadAcrossThem(subformat: String) throws {
        let scratch = try Scratch()
        try scratch.qemuImg("create -q -f vmdk -o subformat=\(subformat) a.vmdk 5G")
        let edges = [2 << 30, 4 << 30]
        try scratch.qemuIO(
            "a.vmdk", edges.flatMap { ["write -P 7 \($0 - 4096) 4k", "write -P 9 \($0) 8k"] }, format: "vmdk")
        let device = try Self.open(scratch, "a.vmdk")
        #expect(device.info.size == 5 << 30)
        for edge in edges {
            let expected =
                [UInt8](repeating: 0, count: 1000) + [UInt8](repeating: 7, count: 4096)
                + [UInt8](repeating: 9, count: 8192) + [UInt8](repeating: 0, count: 1000)
            #expect(try readBytes(device, UInt64(edge - 5096), expected.count) == expected)
        }
    }

    @Test func zeroedGrainsAreZeros() throws {
        let scratch = try Scratch()
        try scratch.qemuImg("create -q -f vmdk -o zeroed_grain=on base.vmdk 8M")
        try scratch.qemuIO("base.vmdk", ["write -P 5 0 4M"], format: "vmdk")
        try scratch.qemuImg("create -q -f vmdk -o zeroed_grain=on -b base.vmdk -F vmdk a.vmdk")
        try scratch.qemuIO("a.vmdk", ["write -z 1M 1M", "write -P 6 3M 64k"], format: "vmdk")
        let device = try Self.open(scratch, "a.vmdk")
        try scratch.qemuImg("convert -f vmdk -O raw a.vmdk expected.raw")
        let expected = try scratch.bytes("expected.raw")
        #expect(expected[1 << 20] == 0 && expected[0] == 5)
        try expectSame(device, expected)
        try expectSameAllocation(scratch, "a.vmdk", device, expected, depth: true, format: "vmdk")
    }

    @Test(arguments: [1, 2])
    func secondDirectoryIsUsedWhereTheFirstIsLost(mode: Int) throws {
        var files = FilesInMemory(files: [:])
        files.files["a.vmdk"] = VMDKBytes.descriptor(["RW 20000 SPARSE \"a-s001.vmdk\""])
        files.files["a-s001.vmdk"] = VMDKBytes.hosted(
            sectors: 20000, flags: mode == 1 ? 3 : 1, redundant: true,
            [0: .data([UInt8](repeating: 3, count: 4096)), 1025: .data([UInt8](repeating: 4, count: 4096))])
        if mode == 2 {
            // Without the flag there is no second one.
            try requireError(.corrupt, "no directory") { _ = try files.disk("a.vmdk") }
            return
        }
        let device = try files.disk("a.vmdk")
        #expect(try readBytes(device, 0, 4096) == [UInt8](repeating: 3, count: 4096))
        #expect(try readBytes(device, 1025 * 4096, 4096) == [UInt8](repeating: 4, count: 4096))
        #expect(device.info.identity.contains { $0.key == "remark" })
    }

    @Test func anExtentIsNoDisk() throws {
        let scratch = try Scratch()
        try scratch.qemuImg("create -q -f vmdk -o subformat=twoGbMaxExtentSparse a.vmdk 10M")
        try requireError(.invalid, "a part of a disk") { _ = try Self.open(scratch, "a-s001.vmdk") }
        try scratch.qemuImg("create -q -f vmdk -o subformat=twoGbMaxExtentFlat b.vmdk 10M")
        #expect(try Self.open(scratch, "b-f001.vmdk").info.format == "raw")
    }

    @Test func compressedGrainsAreReadByManyThreads() throws {
        let scratch = try Scratch()
        try Self.makeSource(scratch, size: 8 << 20)
        try scratch.qemuImg("convert -f raw -O vmdk -o subformat=streamOptimized source.raw a.vmdk")
        let device = try Self.open(scratch, "a.vmdk")
        let expected = try scratch.bytes("source.raw")
        try concurrently(
            (0..<8).map { thread in
                { @Sendable () throws in
                    var random = SplitMix(seed: UInt64(thread))
                    for _ in 0..<60 {
                        let count = Int.random(in: 1...100_000, using: &random)
                        let offset = Int.random(in: 0..<(expected.count - count), using: &random)
                        let read = try readBytes(device, UInt64(offset), count)
                        try requireEqual(read, expected[offset..<(offset + count)], "grains", at: UInt64(offset))
                    }
                }
            })
    }
}
