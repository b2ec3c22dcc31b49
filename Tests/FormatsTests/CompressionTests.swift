// Compressed clusters come from a source, are decompressed once for many small reads, and are never trusted.
import Block
import Formats
import Synchronization
import Testing

@Suite struct CompressionTests {
    /// A disk whose clusters compress well, badly, and not at all, with holes between them.
    private func makeImage(_ scratch: Scratch, type: String, clusterSize: Int) throws {
        try scratch.makeRaw("source.raw", size: 3 << 20, seed: 3)
        try scratch.qemuIO(
            "source.raw", ["write -P 9 256k 700k", "write -z -u 1M 512k", "write -P 1 1600k 1k"], format: "raw")
        try scratch.qemuImg(
            "convert -c -f raw -O qcow2 -o compression_type=\(type),cluster_size=\(clusterSize) source.raw a.qcow2")
    }

    @Test(arguments: ["zlib", "zstd"], [512, 4096, 65536, 2 << 20])
    func compressedImagesReadAsInQEMU(type: String, clusterSize: Int) throws {
        let scratch = try Scratch()
        try makeImage(scratch, type: type, clusterSize: clusterSize)
        let device = try scratch.open("a.qcow2")
        try expectSameAsQEMU(scratch, "a.qcow2", device)
        #expect(try #require(device as? Qcow2Device).header.compression == (type == "zstd" ? .zstd : .zlib))
    }

    @Test func compressedClustersJoinToOneSourceExtent() throws {
        let scratch = try Scratch()
        try makeImage(scratch, type: "zstd", clusterSize: 65536)
        let device = try scratch.open("a.qcow2")
        var extents = ExtentList(capacity: 8)
        #expect(try device.map((300 << 10)..<(900 << 10), .blocking, into: &extents) == 900 << 10)
        #expect(extents.count == 1)
        guard case .source(_, let offset) = extents[0].place else {
            Issue.record("compressed data is not with a source")
            return
        }
        #expect(offset == 300 << 10)
    }

    @Test func smallReadsOfOneClusterDecompressItOnce() throws {
        let scratch = try Scratch()
        try makeImage(scratch, type: "zlib", clusterSize: 65536)
        let watched = WatchedDevice(try scratch.resolved("a.qcow2").device)
        let device = try Qcow2Device(lower: watched)
        _ = try readBytes(device, 320 << 10, 4096)
        let before = watched.blockingMaps.load(ordering: .relaxed)
        for step in 1..<16 {
            #expect(
                try readBytes(device, UInt64((320 << 10) + step * 4096), 4096) == [UInt8](repeating: 9, count: 4096))
        }
        #expect(watched.blockingMaps.load(ordering: .relaxed) == before)
    }

    @Test(arguments: ["zlib", "zstd"])
    func damagedCompressedDataIsAnErrorNeverData(type: String) throws {
        let scratch = try Scratch()
        try scratch.makeRaw("source.raw", size: 1 << 16, seed: 3)
        try scratch.qemuIO("source.raw", ["write -P 9 20k 44k"], format: "raw")
        try scratch.qemuImg("convert -c -f raw -O qcow2 -o compression_type=\(type) source.raw a.qcow2")
        let good = try scratch.bytes("a.qcow2")
        let expected = try scratch.bytes("source.raw")
        let layout = Qcow2Layout(good)
        let start = Int(layout.l2Entry(0) & ((1 << 54) - 1))
        var random = SplitMix(seed: 11)
        var errors = 0
        for _ in 0..<300 {
            var bytes = good
            // The first bytes hold the structure of the stream, so most changes must be noticed.
            bytes[start + Int.random(in: 0..<64, using: &random)] ^= UInt8.random(in: 1...255, using: &random)
            let device = try Qcow2Device(lower: BytesDevice(bytes))
            do {
                let read = try readBytes(device, 0, expected.count)
                #expect(read.count == expected.count)
            } catch let error as BlockError {
                #expect(error.kind == .corrupt)
                errors += 1
            }
        }
        #expect(errors > 0)
    }

    /// An image of one compressed cluster, made by hand from a stream that holds `length` bytes.
    private func image(holding length: Int, sectors: UInt64 = 8) -> [UInt8] {
        var bytes = Qcow2Builder.empty(clusterBits: 16, size: 65536)
        let stream = deflated([UInt8](repeating: 0x5A, count: length))
        let start = bytes.count
        bytes += stream
        Qcow2Builder.setL2Entry(&bytes, 0, 1 << 62 | UInt64(sectors - 1) << 54 | UInt64(start))
        return bytes
    }

    @Test func streamOfExactlyOneClusterIsRead() throws {
        let device = try Qcow2Device(lower: BytesDevice(image(holding: 65536)))
        #expect(try readBytes(device, 0, 65536) == [UInt8](repeating: 0x5A, count: 65536))
    }

    @Test(arguments: [65535, 65537, 1, 200_000])
    func streamOfAnotherLengthThanAClusterIsAnError(length: Int) throws {
        let device = try Qcow2Device(lower: BytesDevice(image(holding: length)))
        let error = #expect(throws: BlockError.self) { try readBytes(device, 0, 65536) }
        #expect(error?.kind == .corrupt)
        #expect(error?.message.contains("guest offset 0 is damaged") == true)
        #expect(throws: BlockError.self) { try readBytes(device, 100, 10) }
    }

    @Test func compressedClusterPastTheEndIsAnError() throws {
        var bytes = image(holding: 65536)
        Qcow2Builder.setL2Entry(&bytes, 0, 1 << 62 | UInt64(bytes.count))
        let device = try Qcow2Device(lower: BytesDevice(bytes))
        #expect(throws: BlockError.self) { try readBytes(device, 0, 65536) }
    }

    @Test func sectorCountLargerThanTheFileIsCutAtItsEnd() throws {
        let device = try Qcow2Device(lower: BytesDevice(image(holding: 65536, sectors: 256)))
        #expect(try readBytes(device, 5, 10) == [UInt8](repeating: 0x5A, count: 10))
    }
}
