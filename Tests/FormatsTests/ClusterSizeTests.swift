// Images of every cluster size and both header versions read as qemu reads them.
import Block
import Formats
import Testing

@Suite struct ClusterSizeTests {
    /// Writes that start and end inside clusters, leave gaps, and touch the end of the disk.
    private static let writes = [
        "write -P 1 0 100k", "write -P 2 1000k 3", "write -P 3 2M 1536k", "write -z 2200k 100k", "write -P 4 5119k 1k",
        "discard 2304k 64k",
    ]

    @Test(arguments: 9...21, ["0.10", "1.1"])
    func everyClusterSizeReadsAsInQEMU(bits: Int, compatibility: String) throws {
        let scratch = try Scratch()
        try scratch.qemuImg("create -q -f qcow2 -o cluster_size=\(1 << bits),compat=\(compatibility) a.qcow2 5M")
        try scratch.qemuIO("a.qcow2", Self.writes)
        let device = try scratch.open("a.qcow2")
        let qcow2 = try #require(device as? Qcow2Device)
        #expect(qcow2.header.version == (compatibility == "0.10" ? 2 : 3))
        #expect(qcow2.header.clusterBits == bits)
        #expect(device.info.format == "qcow2")
        #expect(device.info.isReadOnly)
        try expectSameAsQEMU(scratch, "a.qcow2", device)
    }

    @Test func contiguousClustersAreOneExtent() throws {
        let scratch = try Scratch()
        try scratch.makeRaw("source.raw", size: 4 << 20, seed: 7)
        try scratch.qemuImg("convert -f raw -O qcow2 source.raw a.qcow2")
        let device = try scratch.open("a.qcow2")
        var extents = ExtentList(capacity: 8)
        let end = try device.map(0..<device.info.size, .blocking, into: &extents)
        #expect(end == device.info.size)
        #expect(extents.count == 1)
        guard case .file(let file, _) = extents[0].place else {
            Issue.record("data is not in a file")
            return
        }
        #expect(file.traits.contains(.stable))
    }

    @Test func fullListStopsTheMapAtAnExtent() throws {
        let scratch = try Scratch()
        try scratch.qemuImg("create -q -f qcow2 a.qcow2 4M")
        try scratch.qemuIO("a.qcow2", (0..<16).map { "write -P \($0 + 1) \($0 * 128)k 64k" })
        let device = try scratch.open("a.qcow2")
        var extents = ExtentList(capacity: 3)
        let end = try device.map(1000..<device.info.size, .blocking, into: &extents)
        #expect(extents.count == 3)
        #expect(extents.length == end - 1000)
        #expect(end == 192 << 10)
    }
}
