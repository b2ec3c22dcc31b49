// Maps that must not wait never do, and many threads may ask one image at once.
import Block
import Dispatch
import Formats
import Synchronization
import Testing

@Suite struct PatienceTests {
    private func image() throws -> Scratch {
        let scratch = try Scratch()
        try scratch.makeRaw("source.raw", size: 8 << 20, seed: 12)
        try scratch.qemuImg("convert -f raw -O qcow2 -o cluster_size=512 source.raw a.qcow2")
        return scratch
    }

    @Test func residentMapStopsWhereTablesAreNotInMemory() throws {
        let scratch = try image()
        let file = WatchedDevice(try scratch.resolved("a.qcow2").device)
        let device = try Qcow2Device(lower: file)
        let waited = file.blockingMaps.load(ordering: .relaxed)
        var extents = ExtentList(capacity: 64)
        #expect(try device.map(0..<65536, .resident, into: &extents) == 0)
        #expect(file.blockingMaps.load(ordering: .relaxed) == waited)
        // What is read once is in memory, but this file's own map may wait, too. A slice of a table maps 32 KiB here.
        #expect(try readBytes(device, 100, 10).count == 10)
        #expect(try device.map(0..<256, .resident, into: &extents) == 0)
        #expect(try device.map(40000..<65536, .resident, into: &extents) == 40000)
    }

    @Test func residentMapReadsTablesFromThePageCache() throws {
        let scratch = try image()
        let file = WatchedDevice(try scratch.resolved("a.qcow2").device, isResident: true)
        let device = try Qcow2Device(lower: file)
        let waited = file.blockingMaps.load(ordering: .relaxed)
        // The file was just written, so its pages are there, unless its file system cannot be tried.
        var extents = ExtentList(capacity: 256)
        let end = try device.map(0..<65536, .resident, into: &extents)
        #expect(end == 65536 || end == 0)
        #expect(extents.length == end)
        #expect(file.blockingMaps.load(ordering: .relaxed) == waited)
    }

    @Test func prefetchPassesHostRangesOn() throws {
        let scratch = try Scratch()
        try scratch.qemuImg("create -q -f qcow2 a.qcow2 4M")
        try scratch.qemuIO("a.qcow2", ["write -P 1 0 128k", "write -P 2 1M 64k"])
        let file = WatchedDevice(try scratch.resolved("a.qcow2").device)
        let device = try Qcow2Device(lower: file)
        device.prefetch(0..<(4 << 20))
        // Without the table in memory, the table is what is fetched.
        #expect(file.prefetched.withLock { $0 }.map(\.count64) == [65536])
        _ = try readBytes(device, 0, 1)
        file.prefetched.withLock { $0.removeAll() }
        device.prefetch(0..<(2 << 20))
        #expect(file.prefetched.withLock { $0 }.map(\.count64) == [131072, 65536])
    }

    @Test func manyThreadsReadThroughACacheThatIsTooSmall() throws {
        let scratch = try image()
        var options = Qcow2Options()
        options.cacheBytes = 512
        let device = try scratch.open("a.qcow2", options)
        let expected = try scratch.bytes("source.raw")
        let failures = Atomic<Int>(0)
        DispatchQueue.concurrentPerform(iterations: 8) { thread in
            var random = SplitMix(seed: UInt64(thread))
            for _ in 0..<200 {
                let count = Int.random(in: 1...3000, using: &random)
                let offset = Int.random(in: 0..<(expected.count - count), using: &random)
                let read = try? readBytes(device, UInt64(offset), count)
                if read != Array(expected[offset..<(offset + count)]) { failures.add(1, ordering: .relaxed) }
            }
        }
        #expect(failures.load(ordering: .relaxed) == 0)
    }

    @Test(arguments: ["zlib", "zstd"])
    func manyThreadsReadCompressedClusters(type: String) throws {
        let scratch = try Scratch()
        try scratch.makeRaw("source.raw", size: 8 << 20, seed: 12)
        try scratch.qemuIO("source.raw", ["write -P 3 1M 6M"], format: "raw")
        try scratch.qemuImg("convert -c -f raw -O qcow2 -o compression_type=\(type) source.raw a.qcow2")
        let device = try scratch.open("a.qcow2")
        let expected = try scratch.bytes("source.raw")
        let failures = Atomic<Int>(0)
        DispatchQueue.concurrentPerform(iterations: 8) { thread in
            var random = SplitMix(seed: UInt64(thread))
            for _ in 0..<60 {
                let count = Int.random(in: 1...100_000, using: &random)
                let offset = Int.random(in: 0..<(expected.count - count), using: &random)
                let read = try? readBytes(device, UInt64(offset), count)
                if read != Array(expected[offset..<(offset + count)]) { failures.add(1, ordering: .relaxed) }
            }
        }
        #expect(failures.load(ordering: .relaxed) == 0)
    }
}
