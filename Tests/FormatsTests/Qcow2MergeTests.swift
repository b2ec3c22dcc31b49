// Merging an image into its base in place: always the same disk through the child, wherever it is cut off.
import Block
@testable import Formats
import Foundation
import LinuxIO
import Testing

/// Seeds of random tests: SEED from the environment, or some that stay the same and one that does not.
private func seeds(_ count: UInt64) -> [UInt64] {
    if let text = ProcessInfo.processInfo.environment["SEED"], let seed = UInt64(text) { return [seed] }
    return Array(0..<(count - 1)) + [UInt64.random(in: count...UInt64.max)]
}

/// Images of one disk over time, each with what the disk was then.
final class Increments {
    let scratch: Scratch
    var names: [String] = []
    var models: [ModelDisk] = []
    private var random: SplitMix
    private var made = 0
    private let compressions: [Qcow2WriterCompression]

    init(seed: UInt64, compressions: [Qcow2WriterCompression] = [.none, .zstd(level: 1)]) throws {
        scratch = try Scratch()
        random = SplitMix(seed: seed)
        self.compressions = compressions
    }

    /// Adds an image with changes; the disk grows now and then.
    func add(clusters: Int = 60, growth: Int = 0) throws {
        var model =
            models.last ?? ModelDisk(size: clusters * clusterSize - 512 * Int.random(in: 0..<20, using: &random))
        model.size += growth
        let backing = names.last.map { Qcow2Backing(name: $0, format: .qcow2) }
        made += 1
        let name = "\(made).qcow2"
        let writer = try Qcow2Writer.create(
            scratch.file(name), size: UInt64(model.size), backing: backing,
            compression: compressions.randomElement(using: &random) ?? .none)
        var index = 0
        while index < model.clusterCount {
            let count = min(Int.random(in: 1...6, using: &random), model.clusterCount - index)
            switch Int.random(in: 0..<6, using: &random) {
            case 0:
                try writer.zero(
                    UInt64(index * clusterSize)..<UInt64(min((index + count) * clusterSize, model.size)))
                for cluster in index..<(index + count) { model.clusters[cluster] = nil }
            case 1, 2:
                var bytes: [UInt8] = []
                for cluster in index..<(index + count) {
                    let content = ClusterContent.allCases.randomElement(using: &random) ?? .noise
                    model.clusters[cluster] = clusterBytes(content, random.next())
                    model.clusters[cluster] = model.cluster(cluster)
                    bytes += model.cluster(cluster)
                }
                try writer.write(bytes, cluster: index)
            default: break
            }
            index += count
            // Of a disk that has grown a lot, only the start and the end are in use.
            if index > 100 { index = max(index, model.clusterCount - 30) }
        }
        try writer.finish()
        names.append(name)
        models.append(model)
    }

    /// Merges an image into the one before it, which then takes its name.
    func merge(_ index: Int) throws {
        let (base, child) = (scratch.file(names[index - 1]), scratch.file(names[index]))
        try Qcow2Merge.merge(child: child, into: base)
        guard rename(base, child) == 0 else { throw ToolError(description: "renaming \(base): \(errno)") }
        names.remove(at: index - 1)
        models.remove(at: index - 1)
    }

    func randomIndex() -> Int { Int.random(in: 1..<names.count, using: &random) }
}

/// Whether qemu-img finds an image sound; leaks are allowed if the caller says so.
private func check(_ scratch: Scratch, _ name: String, leaksAllowed: Bool) throws -> String? {
    do {
        try scratch.qemuImg("check -f qcow2 \(name)")
        return nil
    } catch let error as ToolError {
        if leaksAllowed, error.description.contains("ended with 3") { return nil }
        return error.description
    }
}

@Suite struct Qcow2MergeTests {
    @Test(arguments: seeds(6))
    func mergesInAnyOrderKeepEveryPoint(seed: UInt64) throws {
        let points = try Increments(seed: seed)
        var random = SplitMix(seed: seed ^ 77)
        for level in 0..<Int.random(in: 3...6, using: &random) {
            try points.add(growth: level == 2 ? 5 * clusterSize : 0)
        }
        while points.names.count > 1 {
            let index = points.randomIndex()
            try points.merge(index)
            for (name, model) in zip(points.names, points.models) {
                let difference = try model.with(wholeSectors: true).firstDifference(points.scratch.open(name))
                #expect(difference == nil, "SEED=\(seed): \(name) after merging \(index)")
            }
            #expect(
                try check(points.scratch, points.names[index - 1], leaksAllowed: false) == nil, "SEED=\(seed)")
        }
        // Forever incremental: one more comes and goes, and room is used again.
        for _ in 0..<3 {
            try points.add()
            try points.merge(1)
        }
        #expect(try check(points.scratch, points.names[0], leaksAllowed: false) == nil, "SEED=\(seed)")
        let device = try points.scratch.open(points.names[0])
        #expect(try points.models[0].with(wholeSectors: true).firstDifference(device) == nil, "SEED=\(seed)")
        let size = try points.scratch.bytes(points.names[0]).count
        #expect(size < 3 * points.models[0].size, "SEED=\(seed): the file has \(size) bytes")
    }

    @Test(arguments: seeds(2))
    func powerLostAtAnyOperationLosesNothing(seed: UInt64) throws {
        let points = try Increments(seed: seed)
        // An image below the base makes zero clusters count.
        let hasBelow = seed % 2 == 1
        if hasBelow { try points.add(clusters: 14) }
        try points.add(clusters: 14)
        try points.add(growth: seed % 3 == 0 ? 9000 * clusterSize : 0)
        let last = points.names.count - 1
        let below = hasBelow ? try points.scratch.bytes(points.names[0]) : []
        let base = try points.scratch.bytes(points.names[last - 1])
        let child = try points.scratch.bytes(points.names[last])
        let model = points.models[last].with(wholeSectors: true)
        func device(_ file: SimulatedFile, throughChild: Bool) throws -> any BlockDevice {
            let lowest = hasBelow ? try Qcow2Device(lower: BytesDevice(below)) : nil
            let merged = try Qcow2Device(lower: BytesDevice(file.bytes), backing: lowest)
            return throughChild ? try Qcow2Device(lower: BytesDevice(child), backing: merged) : merged
        }
        func merge(_ file: SimulatedFile) throws {
            _ = try Qcow2Merge.merge(child: SimulatedFile(child), into: file, batchBytes: 256 << 10)
        }
        let undisturbed = SimulatedFile(base)
        try merge(undisturbed)
        #expect(try model.sample.firstDifference(device(undisturbed, throughChild: false)) == nil)
        var random = SplitMix(seed: seed)
        for count in 0..<undisturbed.operations {
            let file = SimulatedFile(base)
            file.operationsLeft = count
            #expect(throws: BlockError.self) { try merge(file) }
            file.losePower(&random)
            let place: Comment = "SEED=\(seed), power lost after \(count) operations"
            #expect(try model.sample.firstDifference(device(file, throughChild: true)) == nil, place)
            if count % 7 == Int(seed % 7) {
                try Data(file.bytes).write(to: URL(fileURLWithPath: points.scratch.file("crashed.qcow2")))
                #expect(try check(points.scratch, "crashed.qcow2", leaksAllowed: true) == nil, place)
            }
            // Once more, and the power goes again on the way.
            file.operationsLeft = Int.random(in: 0..<undisturbed.operations, using: &random)
            if (try? merge(file)) == nil {
                file.losePower(&random)
                #expect(try model.sample.firstDifference(device(file, throughChild: true)) == nil, "\(place), twice")
            }
            file.operationsLeft = .max
            try merge(file)
            #expect(try model.sample.firstDifference(device(file, throughChild: true)) == nil, place)
            #expect(try model.sample.firstDifference(device(file, throughChild: false)) == nil, place)
            if count % 7 == Int(seed % 7) {
                try Data(file.bytes).write(to: URL(fileURLWithPath: points.scratch.file("crashed.qcow2")))
                #expect(try check(points.scratch, "crashed.qcow2", leaksAllowed: true) == nil, place)
            }
        }
    }

    @Test func refcountTableGrowsPastItsEnd() throws {
        let points = try Increments(seed: 5, compressions: [.none])
        try points.add(clusters: 24)
        try points.add()
        let base = try points.scratch.bytes(points.names[0])
        let child = try points.scratch.bytes(points.names[1])
        let file = SimulatedFile(base)
        let run = try MergeRun(
            child: ProfileImage(SimulatedFile(child)), base: ProfileImage(file), batchBytes: MergeRun.batchBytes)
        // As if all that the table has room to count, 16 TiB, were in use.
        run.counts.search = 8192 * Qcow2Profile.countsPerBlock
        try run.run { _ in }
        let merged = try ProfileImage(file)
        #expect(merged.refcountTableClusters == 2)
        let size = try file.size()
        #expect(size > 16 << 40)
        let counts = try ReferenceCounts(merged)
        #expect(try counts.count(merged.refcountTableOffset >> 16) == 1)
        for index in merged.l1.indices where merged.table(index) != 0 {
            let table = try WordTable(file, at: merged.table(index), count: 8192)
            for place in 0..<table.count where table[place] != 0 {
                let clusters = try #require(ProfileEntry(table[place], fileSize: size)).clusters
                for cluster in clusters { #expect(try counts.count(cluster) == 1) }
            }
        }
    }

    @Test func imagesOutsideTheProfileAreRefusedUntouched() throws {
        let scratch = try Scratch()
        let backing = Qcow2Backing(name: "base.qcow2", format: .qcow2)
        let writer = try Qcow2Writer.create(scratch.file("child.qcow2"), size: 1 << 20, backing: backing)
        try writer.write(clusterBytes(.noise, 1), cluster: 1)
        try writer.finish()
        for options in [
            "cluster_size=4096", "extended_l2=on", "refcount_bits=1", "lazy_refcounts=on", "compat=0.10",
            "data_file=data.raw",
        ] {
            try scratch.qemuImg("create -f qcow2 -o \(options) base.qcow2 1M")
            let before = try scratch.bytes("base.qcow2")
            let error = #expect(throws: BlockError.self, "\(options)") {
                try Qcow2Merge.merge(child: scratch.file("child.qcow2"), into: scratch.file("base.qcow2"))
            }
            #expect(error?.kind == .unsupported, "\(options)")
            #expect(try scratch.bytes("base.qcow2") == before)
        }
        for commands in ["snapshot -c s base.qcow2", "bitmap --add base.qcow2 b"] {
            try scratch.qemuImg("create -f qcow2 base.qcow2 1M")
            try scratch.qemuImg(commands)
            let error = #expect(throws: BlockError.self, "\(commands)") {
                try Qcow2Merge.merge(child: scratch.file("child.qcow2"), into: scratch.file("base.qcow2"))
            }
            #expect(error?.kind == .unsupported)
        }
        // A larger base, and a child with nothing below.
        try scratch.qemuImg("create -f qcow2 base.qcow2 2M")
        for (child, base) in [("child", "base"), ("base", "child"), ("base", "base")] {
            #expect(throws: BlockError.self) {
                try Qcow2Merge.merge(child: scratch.file("\(child).qcow2"), into: scratch.file("\(base).qcow2"))
            }
        }
    }

    @Test(arguments: ["zlib", "zstd"])
    func imagesOfQEMUAreMergedToo(type: String) throws {
        let scratch = try Scratch()
        try scratch.makeRaw("base.raw", size: 3 << 20, seed: 1)
        try scratch.qemuIO("base.raw", ["write -P 7 1M 1M"], format: "raw")
        try scratch.qemuImg("convert -c -O qcow2 -o compression_type=\(type) base.raw base.qcow2")
        try scratch.qemuIO("base.raw", ["write -P 9 512k 1M", "write -z 2M 128k"], format: "raw")
        try scratch.qemuImg(
            "convert -c -O qcow2 -B base.qcow2 -F qcow2 -o compression_type=\(type) base.raw child.qcow2")
        let report = try Qcow2Merge.merge(child: scratch.file("child.qcow2"), into: scratch.file("base.qcow2"))
        #expect((report.copiedCompressed > 0) == (type == "zstd"))
        try scratch.qemuImg("check base.qcow2")
        try scratch.qemuImg("compare base.raw base.qcow2")
        try scratch.qemuImg("compare base.raw child.qcow2")
    }

    @Test func damagedChildIsAnErrorAndStaysReadable() throws {
        let points = try Increments(seed: 3)
        try points.add(clusters: 30)
        try points.add()
        let good = try points.scratch.bytes(points.names[1])
        let base = try points.scratch.bytes(points.names[0])
        var random = SplitMix(seed: 4)
        for _ in 0..<40 {
            var bytes = good
            for _ in 0..<3 {
                let table = Qcow2Layout(good).l2Offset
                bytes[table + Int.random(in: 0..<240, using: &random)] ^= UInt8.random(in: 1...255, using: &random)
            }
            // Whatever it does, it ends.
            _ = try? Qcow2Merge.merge(child: SimulatedFile(bytes), into: SimulatedFile(base))
            var damagedBase = base
            let table = Qcow2Layout(base).l2Offset
            damagedBase[table + Int.random(in: 0..<240, using: &random)] ^= UInt8.random(in: 1...255, using: &random)
            _ = try? Qcow2Merge.merge(child: SimulatedFile(good), into: SimulatedFile(damagedBase))
        }
        #expect(throws: BlockError.self) {
            try Qcow2Merge.merge(child: SimulatedFile(Array(good[..<4096])), into: SimulatedFile(base))
        }
    }
}

extension ModelDisk {
    /// The disk as an image has it.
    func with(wholeSectors: Bool) -> ModelDisk {
        var other = self
        other.size = (size + 511) & ~511
        return other
    }

    /// For a disk that has grown a lot: what was ever written, and the end.
    var sample: ModelSample { ModelSample(model: self) }
}

struct ModelSample {
    let model: ModelDisk

    func firstDifference(_ device: any BlockDevice) throws -> String? {
        if model.clusterCount < 200 { return try model.firstDifference(device) }
        guard device.info.size == UInt64(model.size) else { return "it has \(device.info.size) bytes" }
        for index in Array(0..<100) + model.clusters.keys.sorted().suffix(100) + [model.clusterCount - 1] {
            let expected = model.cluster(index)
            if try readBytes(device, UInt64(index * clusterSize), expected.count) != expected {
                return "cluster \(index) differs"
            }
        }
        return nil
    }
}
