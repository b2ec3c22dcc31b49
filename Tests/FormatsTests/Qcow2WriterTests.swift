// Images written by the writer are what qemu-img says they have to be, whatever the order, size and compression.
import Block
@testable import Formats
import Foundation
import Testing

@Suite struct Qcow2WriterTests {
    static let compressions: [Qcow2WriterCompression] = [.none, .zstd(level: 1), .zstd(level: 3)]

    /// Checks an image's structure with qemu-img (any leak or corruption fails it), and its content with both readers.
    private func expectImage(_ scratch: Scratch, _ name: String, is model: ModelDisk) throws {
        try scratch.qemuImg("check -f qcow2 \(name)")
        try Data(model.bytes).write(to: URL(fileURLWithPath: scratch.file("model.raw")))
        try scratch.qemuImg("compare -f raw -F qcow2 model.raw \(name)")
        #expect(try model.firstDifference(scratch.open(name)) == nil)
    }

    /// A disk with clusters of all kinds, some written in one call, and where they go.
    private func fill(_ writer: Qcow2Writer, _ model: inout ModelDisk, seed: UInt64) throws {
        var random = SplitMix(seed: seed)
        var index = 0
        while index < model.clusterCount {
            let count = min(Int.random(in: 1...20, using: &random), model.clusterCount - index)
            switch Int.random(in: 0..<5, using: &random) {
            case 0: break
            case 1:
                let end = min((index + count) * clusterSize, model.size)
                try writer.zero(UInt64(index * clusterSize)..<UInt64(end))
                for cluster in index..<(index + count) { model.clusters[cluster] = nil }
            default:
                var bytes: [UInt8] = []
                for cluster in index..<(index + count) {
                    let content = ClusterContent.allCases.randomElement(using: &random) ?? .noise
                    model.clusters[cluster] =
                        Int.random(in: 0..<6, using: &random) == 0
                        ? nil : clusterBytes(content, random.next())
                    // What lies past the disk's end was never written.
                    model.clusters[cluster] = model.cluster(cluster)
                    bytes += model.cluster(cluster)
                }
                try writer.write(bytes, cluster: index)
            }
            index += count
        }
    }

    @Test(arguments: compressions, [64 << 20, (20 << 20) + 512, (9 << 20) - 1])
    func imageIsWhatWasWritten(compression: Qcow2WriterCompression, size: Int) throws {
        let scratch = try Scratch()
        let writer = try Qcow2Writer.create(scratch.file("a.qcow2"), size: UInt64(size), compression: compression)
        var model = ModelDisk(size: size)
        try fill(writer, &model, seed: UInt64(size))
        try writer.finish()
        // Images have whole sectors.
        model.size = (size + 511) & ~511
        try expectImage(scratch, "a.qcow2", is: model)
        let info = try scratch.qemuImg("info --output=json a.qcow2")
        #expect(info.contains("\"compression-type\": \"\(compression == .none ? "zlib" : "zstd")\""))
        let written = writer.written
        #expect((written.compressed > 0) == (compression != .none))
        #expect(written.plain > 0 && written.zero > 0)
    }

    @Test(arguments: [0, 1, 512, 65536, 65537])
    func smallDisksAreImages(size: Int) throws {
        let scratch = try Scratch()
        for name in ["empty.qcow2", "full.qcow2"] {
            let writer = try Qcow2Writer.create(
                scratch.file(name), size: UInt64(size), compression: .zstd(level: 1))
            var model = ModelDisk(size: size)
            if name == "full.qcow2" {
                for index in 0..<model.clusterCount {
                    model.clusters[index] = Array(
                        clusterBytes(.noise, 7)[..<min(clusterSize, size - index * clusterSize)])
                    try writer.write(model.cluster(index), cluster: index)
                }
            }
            try writer.finish()
            try scratch.qemuImg("check -f qcow2 \(name)")
            model.size = (size + 511) & ~511
            #expect(try model.firstDifference(scratch.open(name)) == nil)
        }
    }

    @Test func hugeSparseDiskIsSmall() throws {
        let scratch = try Scratch()
        let size: UInt64 = 64 << 40
        let writer = try Qcow2Writer.create(scratch.file("a.qcow2"), size: size)
        try writer.zero(0..<(32 << 40))
        let bytes = clusterBytes(.noise, 5)
        try writer.write(bytes, cluster: (32 << 40) / clusterSize)
        try writer.zero(((32 << 40) + 65536)..<size)
        try writer.finish()
        try scratch.qemuImg("check -f qcow2 a.qcow2")
        #expect(try scratch.bytes("a.qcow2").count < 2 << 20)
        #expect(try readBytes(scratch.open("a.qcow2"), 32 << 40, clusterSize) == bytes)
        #expect(throws: BlockError.self) {
            try Qcow2Writer.create(scratch.file("b.qcow2"), size: (2 << 50) + 1)
        }
    }

    @Test(arguments: compressions)
    func fourThreadsWriteAtOnce(compression: Qcow2WriterCompression) throws {
        let scratch = try Scratch()
        let size = 48 << 20
        let writer = try Qcow2Writer.create(
            scratch.file("a.qcow2"), size: UInt64(size), compression: compression, keepsCache: false)
        var model = ModelDisk(size: size)
        for index in 0..<model.clusterCount {
            model.clusters[index] = clusterBytes(ClusterContent.allCases[index % 3], UInt64(index))
        }
        let failures = Locked<[any Error]>([])
        let filled = model
        DispatchQueue.concurrentPerform(iterations: 4) { thread in
            do {
                // Pieces of 256 KiB, every fourth for each thread.
                for piece in stride(from: thread * 4, to: filled.clusterCount, by: 16) {
                    try writer.write((piece..<(piece + 4)).flatMap { filled.cluster($0) }, cluster: piece)
                }
            } catch { failures.withLock { $0.append(error) } }
        }
        #expect(failures.withLock { $0.isEmpty })
        try writer.finish()
        try expectImage(scratch, "a.qcow2", is: model)
    }

    @Test func clusterIsWrittenOnce() throws {
        let scratch = try Scratch()
        let backing = Qcow2Backing(name: "base.qcow2", format: .qcow2)
        let writer = try Qcow2Writer.create(scratch.file("a.qcow2"), size: 1 << 20, backing: backing)
        try writer.write(clusterBytes(.noise, 1), cluster: 3)
        try writer.zero((5 << 16)..<(6 << 16))
        for cluster in [3, 5] {
            let error = #expect(throws: BlockError.self) { try writer.write(clusterBytes(.noise, 2), cluster: cluster) }
            #expect(error?.kind == .invalid)
        }
        #expect(throws: BlockError.self) { try writer.write(clusterBytes(.noise, 2) * 2, cluster: 2) }
        #expect(throws: BlockError.self) { try writer.zero(0..<(1 << 20)) }
        for (offset, count) in [(512, 65536), (0, 512), (1 << 20, 65536), (15 << 16, 65537)] {
            let bytes = [UInt8](repeating: 1, count: count)
            #expect(throws: BlockError.self) { try bytes.withUnsafeBytes { try writer.write($0, at: UInt64(offset)) } }
        }
        try writer.finish()
        #expect(throws: BlockError.self) { try writer.write(clusterBytes(.noise, 2), cluster: 0) }
        writer.abandon()
        let base = try Qcow2Writer.create(scratch.file("base.qcow2"), size: 1 << 20)
        try base.finish()
        var model = ModelDisk(size: 1 << 20)
        model.clusters[3] = clusterBytes(.noise, 1)
        try expectImage(scratch, "a.qcow2", is: model)
    }

    @Test(arguments: compressions)
    func chainOfWrittenImagesReadsTheSameInQEMU(compression: Qcow2WriterCompression) throws {
        let scratch = try Scratch()
        var model = ModelDisk(size: (12 << 20) + 4096)
        var backing: Qcow2Backing?
        for level in 0..<4 {
            // The disk grows on the way.
            if level == 2 { model.size += 3 << 20 }
            let name = "\(level).qcow2"
            let writer = try Qcow2Writer.create(
                scratch.file(name), size: UInt64(model.size), backing: backing, compression: compression)
            try fill(writer, &model, seed: UInt64(level))
            try writer.finish()
            backing = Qcow2Backing(name: name, format: .qcow2)
            try expectImage(scratch, name, is: model)
        }
        try expectSameAsQEMU(scratch, "3.qcow2", scratch.open("3.qcow2"))
        #expect(try scratch.qemuImg("info --backing-chain 3.qcow2").contains("backing file format: qcow2"))
    }

    @Test func backingNamesThatLeadElsewhereAreRefused() throws {
        let scratch = try Scratch()
        for name in ["", "/etc/passwd", "../a", "a/../b", "json:{}", "nbd://x", "a//b", "a\nb"] {
            #expect(throws: BlockError.self, "\(name)") {
                try Qcow2Writer.create(
                    scratch.file("a.qcow2"), size: 1 << 20, backing: Qcow2Backing(name: name, format: .raw))
            }
        }
        #expect(!FileManager.default.fileExists(atPath: scratch.file("a.qcow2")))
    }

    @Test func unfinishedFileIsNoImage() throws {
        let scratch = try Scratch()
        let writer = try Qcow2Writer.create(scratch.file("a.qcow2"), size: 1 << 20)
        try writer.write(clusterBytes(.noise, 1), cluster: 0)
        try writer.flush()
        #expect(throws: BlockError.self) { try scratch.open("a.qcow2") }
        #expect(throws: BlockError.self) { try Qcow2Writer.create(scratch.file("a.qcow2"), size: 1 << 20) }
        writer.abandon()
        #expect(!FileManager.default.fileExists(atPath: scratch.file("a.qcow2")))
        #expect(throws: BlockError.self) { try writer.finish() }
    }

    @Test(arguments: [Qcow2WriterCompression.none, .zstd(level: 1)])
    func tablesInMemoryAreBounded(compression: Qcow2WriterCompression) throws {
        let scratch = try Scratch()
        let size: UInt64 = 1 << 40
        let writer = try Qcow2Writer.create(
            scratch.file("a.qcow2"), size: size, backing: nil, compression: compression)
        var random = SplitMix(seed: 8)
        var written: [Int: UInt64] = [:]
        // Far more slices of 32 MiB than stay in memory.
        let bytes = clusterBytes(.constant, 77)
        while written.count < 3 * Qcow2Writer.slicesMax {
            let cluster = Int.random(in: 0..<Int(size) / clusterSize, using: &random)
            if written.updateValue(77, forKey: cluster) == nil { try writer.write(bytes, cluster: cluster) }
            let memory = writer.metadataInMemory
            guard memory.slices <= Qcow2Writer.slicesMax, memory.blocks <= 2 else {
                Issue.record("\(memory) in memory")
                return
            }
        }
        try writer.finish()
        try scratch.qemuImg("check -f qcow2 a.qcow2")
        let device = try scratch.open("a.qcow2")
        for cluster in written.keys.sorted().prefix(1000) {
            #expect(try readBytes(device, UInt64(cluster * clusterSize), clusterSize) == bytes)
        }
    }

    @Test func manyTinyClustersShareTheirHosts() throws {
        let scratch = try Scratch()
        let count = 5000
        let writer = try Qcow2Writer.create(
            scratch.file("a.qcow2"), size: UInt64(count * clusterSize), compression: .zstd(level: 1))
        let bytes = [UInt8](repeating: 0x41, count: clusterSize)
        for cluster in 0..<count { try writer.write(bytes, cluster: cluster) }
        try writer.finish()
        try scratch.qemuImg("check -f qcow2 a.qcow2")
        #expect(try scratch.bytes("a.qcow2").count < 1 << 20)
        #expect(try readBytes(scratch.open("a.qcow2"), UInt64((count - 1) * clusterSize), clusterSize) == bytes)
    }
}

private func * (bytes: [UInt8], count: Int) -> [UInt8] { (0..<count).flatMap { _ in bytes } }
