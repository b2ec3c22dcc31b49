// Extended L2 entries: parts of clusters allocated, zero, or left to the backing file.
import Block
import Formats
import Testing

@Suite struct SubclusterTests {
    @Test(arguments: [16384, 65536, 2 << 20], [false, true])
    func subclustersReadAsInQEMU(clusterSize: Int, hasBacking: Bool) throws {
        let scratch = try Scratch()
        try scratch.makeRaw("base.raw", size: 5 << 20, seed: 5)
        let backing = hasBacking ? "-b base.raw -F raw" : ""
        try scratch.qemuImg(
            "create -q -f qcow2 -o extended_l2=on,cluster_size=\(clusterSize) \(backing) a.qcow2 5M")
        let sub = clusterSize / 32
        var commands: [String] = []
        // Single subclusters, runs of them, all of a cluster, across clusters, and zeros in all of these.
        for (index, part) in [(0, 1), (5, 2), (31, 1), (31, 2), (64, 32), (100, 40)].enumerated() {
            commands.append("write -P \(index + 1) \(part.0 * sub) \(part.1 * sub)")
            commands.append("write -z \(clusterSize * 2 + part.0 * sub) \(part.1 * sub)")
        }
        commands = commands.filter { command in
            let numbers = command.split(separator: " ").compactMap { Int($0) }
            return (numbers.suffix(2).reduce(0, +)) <= 5 << 20
        }
        commands += ["write -P 77 3M 1M", "write -z 3100k 100k", "discard 3500k 256k", "write -P 78 3600k 3"]
        try scratch.qemuIO("a.qcow2", commands)
        let device = try scratch.open("a.qcow2")
        #expect(try #require(device as? Qcow2Device).header.hasSubclusters)
        try expectSameAsQEMU(scratch, "a.qcow2", device)
    }

    @Test func compressedClustersAmongSubclustersReadAsInQEMU() throws {
        let scratch = try Scratch()
        try scratch.makeRaw("source.raw", size: 1 << 20, seed: 6)
        try scratch.qemuIO("source.raw", ["write -P 9 100k 700k"], format: "raw")
        try scratch.qemuImg("convert -c -f raw -O qcow2 -o extended_l2=on source.raw a.qcow2")
        try scratch.qemuIO("a.qcow2", ["write -P 3 130k 5k", "write -z 300k 2k"])
        try expectSameAsQEMU(scratch, "a.qcow2", try scratch.open("a.qcow2"))
    }

    /// Every subcluster of each state, all against qemu's content.
    @Test func everyPatternOfSubclustersReadsAsInQEMU() throws {
        let scratch = try Scratch()
        try scratch.makeRaw("base.raw", size: 2 << 20, seed: 8)
        try scratch.qemuImg("create -q -f qcow2 -o extended_l2=on -b base.raw -F raw a.qcow2 2M")
        var random = SplitMix(seed: 9)
        let commands = (0..<300).map { index in
            let start = Int.random(in: 0..<1000, using: &random) * 2
            let length = Int.random(in: 1...12, using: &random) * 2
            let what = ["write -P \(index % 250 + 1)", "write -z", "discard"].randomElement(using: &random) ?? "write"
            return "\(what) \(start)k \(length)k"
        }
        try scratch.qemuIO("a.qcow2", commands)
        try expectSameAsQEMU(scratch, "a.qcow2", try scratch.open("a.qcow2"))
    }
}
