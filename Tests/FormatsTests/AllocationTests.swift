// Allocation as qemu reports it, whatever made the image: preallocation, lazy reference counts, internal snapshots.
import Block
import Formats
import Testing

@Suite struct AllocationTests {
    @Test(arguments: ["off", "metadata", "falloc", "full"])
    func preallocatedImagesReadAsInQEMU(mode: String) throws {
        let scratch = try Scratch()
        try scratch.qemuImg("create -q -f qcow2 -o preallocation=\(mode) a.qcow2 8M")
        try scratch.qemuIO("a.qcow2", ["write -P 1 1M 300k", "write -P 2 6M 64k", "write -z 7M 64k"])
        try expectSameAsQEMU(scratch, "a.qcow2", try scratch.open("a.qcow2"))
    }

    @Test func neverWrittenPreallocatedSpaceIsKnownToBeZero() throws {
        let scratch = try Scratch()
        try scratch.qemuImg("create -q -f qcow2 -o preallocation=metadata a.qcow2 64M")
        let flags = try wholeStatus(try scratch.open("a.qcow2"), .allocation)
        #expect(flags.map(\.value) == [AllocationFlags.zero])
    }

    @Test func imageWithStaleReferenceCountsIsRead() throws {
        let scratch = try Scratch()
        try scratch.qemuImg("create -q -f qcow2 -o lazy_refcounts=on a.qcow2 4M")
        try scratch.qemuIO("a.qcow2", ["write -P 1 1M 300k"])
        var bytes = try scratch.bytes("a.qcow2")
        // The dirty bit, as a crash leaves it.
        bytes[79] |= 1
        let device = try Qcow2Device(lower: BytesDevice(bytes))
        #expect(device.header.incompatible == .dirty)
        #expect(try readBytes(device, 1 << 20, 4096) == [UInt8](repeating: 1, count: 4096))
    }

    @Test func internalSnapshotsAreLeftAlone() throws {
        let scratch = try Scratch()
        try scratch.qemuImg("create -q -f qcow2 a.qcow2 4M")
        try scratch.qemuIO("a.qcow2", ["write -P 1 0 1M"])
        try scratch.qemuImg("snapshot -c before a.qcow2")
        try scratch.qemuIO("a.qcow2", ["write -P 2 512k 1M"])
        let device = try scratch.open("a.qcow2")
        #expect(try #require(device as? Qcow2Device).header.snapshotCount == 1)
        try expectSameAsQEMU(scratch, "a.qcow2", device)
    }

    @Test func sizeThatIsNoMultipleOfAClusterIsKept() throws {
        let scratch = try Scratch()
        try scratch.makeRaw("source.raw", size: 300_032, seed: 4)
        try scratch.qemuImg("convert -f raw -O qcow2 source.raw a.qcow2")
        try expectSameAsQEMU(scratch, "a.qcow2", try scratch.open("a.qcow2"))
    }

    @Test func emptyDiskIsOpened() throws {
        let scratch = try Scratch()
        try scratch.qemuImg("create -q -f qcow2 a.qcow2 0")
        #expect(try scratch.open("a.qcow2").info.size == 0)
    }

    @Test func resizedImageReadsAsInQEMU() throws {
        let scratch = try Scratch()
        try scratch.qemuImg("create -q -f qcow2 -o cluster_size=512 a.qcow2 1M")
        try scratch.qemuIO("a.qcow2", ["write -P 1 0 1M"])
        try scratch.qemuImg("resize -q a.qcow2 9M")
        try scratch.qemuIO("a.qcow2", ["write -P 3 8M 1k"])
        try expectSameAsQEMU(scratch, "a.qcow2", try scratch.open("a.qcow2"))
    }
}

@Suite struct LargeDiskTests {
    @Test func sparseDiskOf64TebibytesIsMappedWhole() throws {
        let scratch = try Scratch()
        try scratch.qemuImg("create -q -f qcow2 a.qcow2 64T")
        try scratch.qemuIO("a.qcow2", ["write -P 1 40T 64k", "write -P 2 70368744173568 4k", "write -P 3 4095M 2M"])
        let device = try scratch.open("a.qcow2")
        #expect(device.info.size == 64 << 40)
        var extents = ExtentList(capacity: 16)
        #expect(try device.map(0..<device.info.size, .blocking, into: &extents) == device.info.size)
        // Holes and data take turns, the last cluster is data, and 4095M + 2M lie in two L2 tables.
        #expect((6...7).contains(extents.count))
        #expect(try readBytes(device, 40 << 40, 65536) == [UInt8](repeating: 1, count: 65536))
        #expect(try readBytes(device, 70_368_744_173_568, 4096) == [UInt8](repeating: 2, count: 4096))
        #expect(try readBytes(device, (4095 << 20) - 1, 2) == [0, 3])
        let qemu = try qemuMap(scratch, "a.qcow2")
        let flags = try wholeStatus(device, .allocation)
        for segment in qemu {
            for place in [segment.start, segment.start + segment.length - 1] {
                #expect(value(flags, at: place) == (segment.zero ? 3 : 0))
            }
        }
    }
}
