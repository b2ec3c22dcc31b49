// Damaged VMDKs: every byte of the metadata may lie, every file may end anywhere. An error or data, never a trap, and
// never data that a check could have known to be wrong.
import Block
import Foundation
import Support
import Testing

@testable import Formats

@Suite struct VMDKHostileTests {
    /// Opens a disk and asks everything of it. Errors are fine; traps are not.
    private func exercise(_ files: FilesInMemory, _ name: String) {
        var options = VMDKOptions()
        options.cacheBytes = 1
        guard let device = try? files.disk(name, options), device.info.size > 0 else { return }
        let size = device.info.size
        for offset in [0, 65_000, size / 2, size - min(size, 3000)] where offset < size {
            let count = Int(min(size - offset, 20_000))
            _ = try? readBytes(device, offset, count)
            _ = try? mapped(device, offset..<(offset + UInt64(count)), .resident, capacity: 3)
            device.prefetch(offset..<(offset + UInt64(count)))
        }
        for context in [StatusContext.allocation, .depth, .dirtyBitmap(0)] {
            _ = try? status(device, context, of: 0..<size)
            _ = try? status(device, context, of: (size - 1)..<size)
        }
    }

    /// Small disks of every kind: files, the top one's name, and the file whose bytes are damaged.
    private static func disks() throws -> [(files: FilesInMemory, top: String, victim: String)] {
        let scratch = try Scratch()
        try VMDKHostedTests.makeSource(scratch, size: 300_032)
        try scratch.qemuImg("convert -f raw -O vmdk source.raw sparse.vmdk")
        try scratch.qemuImg("convert -f raw -O vmdk -o subformat=streamOptimized source.raw stream.vmdk")
        let cow = VMDKChainTests.cowChain(grainSectors: 8).files
        let se = VMDKChainTests.seSparseChain().files
        return [
            (FilesInMemory(files: ["a.vmdk": try scratch.bytes("sparse.vmdk")]), "a.vmdk", "a.vmdk"),
            (FilesInMemory(files: ["a.vmdk": try scratch.bytes("stream.vmdk")]), "a.vmdk", "a.vmdk"),
            (FilesInMemory(files: ["a.vmdk": try streamOptimized(patternBytes(200_000, seed: 8))]), "a.vmdk", "a.vmdk"),
            (cow, "vm-000002.vmdk", "vm-000002-delta.vmdk"), (se, "vm-000002.vmdk", "vm-000002-sesparse.vmdk"),
            (se, "vm-000002.vmdk", "vm-000002.vmdk"),
        ]
    }

    @Test func everyByteOfTheMetadataMayLie() throws {
        for (files, top, victim) in try Self.disks() {
            let good = try #require(files.files[victim])
            var damaged = files
            var places = Array(0..<min(260, good.count))
            places += stride(from: 260, to: min(good.count, 80_000), by: 499)
            places += stride(from: good.count - min(good.count, 1700), to: good.count, by: 17)
            for place in places {
                for value in [0, good[place] ^ 0x90] where value != good[place] {
                    damaged.files[victim]?[place] = value
                    exercise(damaged, top)
                }
                damaged.files[victim]?[place] = good[place]
            }
        }
    }

    @Test func filesMayEndAnywhere() throws {
        for (files, top, victim) in try Self.disks() {
            let good = try #require(files.files[victim])
            let whole = try #require(try? files.disk(top))
            let expected = try readBytes(whole, 0, Int(whole.info.size))
            var cut = files
            for length in Array(stride(from: 0, to: min(3000, good.count), by: 61))
                + Array(stride(from: 3000, to: good.count, by: 1511)) + [good.count - 1]
            {
                cut.files[victim] = Array(good[..<length])
                exercise(cut, top)
                // What can still be read is right.
                guard let device = try? cut.disk(top) else { continue }
                for start in stride(from: 0, to: expected.count, by: 65536) {
                    let count = min(65536, expected.count - start)
                    guard let read = try? readBytes(device, UInt64(start), count) else { continue }
                    try requireEqual(read, expected[start..<(start + count)], "\(victim) cut at \(length)")
                }
            }
        }
    }

    @Test func damagedCompressedGrainIsNeverData() throws {
        let source = patternBytes(200_000, seed: 8)
        let good = try streamOptimized(source)
        var random = SplitMix(seed: 5)
        for _ in 0..<200 {
            var bytes = good
            // Somewhere between the first grain and the footer.
            let place = Int.random(in: 65536..<(good.count - 1600), using: &random)
            bytes[place] ^= UInt8(1) << UInt8.random(in: 0..<8, using: &random)
            guard let device = try? FilesInMemory(files: ["a.vmdk": bytes]).disk("a.vmdk") else { continue }
            for start in stride(from: 0, to: source.count, by: 65536) {
                let count = min(65536, source.count - start)
                guard let read = try? readBytes(device, UInt64(start), count) else { continue }
                // A table's entry that became 0 says that the grain was never written, which nothing contradicts.
                let isGone = read.allSatisfy { $0 == 0 }
                if !isGone { try requireEqual(read, source[start..<(start + count)], "bit at \(place)") }
            }
        }
    }

    @Test func grainOfAnotherPlaceIsRefused() throws {
        var bytes = try streamOptimized(patternBytes(131_072, seed: 8))
        // The grains' entries change places: only the markers tell.
        let layout = try SparseLayout.read(from: BytesDevice(bytes))
        let table = bytes.withUnsafeBytes {
            UnsafeRawBufferPointer($0).littleEndian(Int(layout.directoryStart), as: UInt32.self)
        }
        let start = Int(table) * 512
        bytes =
            Array(bytes[..<start]) + bytes[(start + 4)..<(start + 8)] + bytes[start..<(start + 4)]
            + bytes[(start + 8)...]
        let device = try FilesInMemory(files: ["a.vmdk": bytes]).disk("a.vmdk")
        try requireError(.corrupt, "another grain") { _ = try readBytes(device, 0, 512) }
    }

    @Test func entriesThatCannotBeAreCorruptOnlyWhereTheyCount() throws {
        let data = [UInt8](repeating: 7, count: 4096)
        let extents: [(String, [UInt8])] = [
            ("SPARSE", VMDKBytes.hosted(sectors: 80, [0: .data(data), 1: .entry(1), 2: .entry(0xFFFF_FFFF)])),
            (
                "VMFSSPARSE",
                VMDKBytes.cow(sectors: 80, grainSectors: 8, [0: .data(data), 1: .entry(3), 2: .entry(1 << 31)])
            ),
            (
                "SESPARSE",
                VMDKBytes.seSparse(
                    sectors: 80, [0: .data(data), 1: .entry(4 << 60), 2: .entry(3 << 60 | 0xFFFF_FFFF_FFFF)])
            ),
            ("SESPARSE", VMDKBytes.seSparse(sectors: 80, [0: .data(data), 1: .entry(5), 2: .entry(15 << 60)])),
        ]
        for (kind, bytes) in extents {
            let files = FilesInMemory(files: [
                "x.vmdk": bytes, "a.vmdk": VMDKBytes.descriptor(["RW 80 \(kind) \"x.vmdk\""]),
            ])
            let device = try files.disk("a.vmdk")
            #expect(try readBytes(device, 0, 4096) == data)
            for grain in [1, 2] {
                try requireError(.corrupt, kind) { _ = try readBytes(device, UInt64(grain * 4096 + 5), 10) }
                try requireError(.corrupt, kind) { _ = try readBytes(device, UInt64(grain * 4096 - 5), 10) }
            }
            #expect(try readBytes(device, 3 * 4096, 4096) == [UInt8](repeating: 0, count: 4096))
            // Maps and status stop before the fault, then name it.
            #expect(try mapped(device, 0..<16384).end == 4096)
            #expect(try status(device, .allocation, of: 0..<16384).end == 4096)
        }
    }

    @Test func faultOfAParentCountsOnlyWhereTheParentDoes() throws {
        let data = { (layer: UInt8) in VMDKBytes.Grain.data([UInt8](repeating: layer, count: 4096)) }
        let files = FilesInMemory(files: [
            "p": VMDKBytes.cow(sectors: 32, grainSectors: 8, [0: data(1), 1: .entry(1), 2: data(1), 3: .entry(1)]),
            "c": VMDKBytes.cow(sectors: 32, grainSectors: 8, [0: data(2), 1: data(2)]),
            "parent.vmdk": VMDKBytes.descriptor(["RW 32 VMFSSPARSE \"p\""]),
            "child.vmdk": VMDKBytes.descriptor(
                ["RW 32 VMFSSPARSE \"c\""], parentID: "11111111", parent: "parent.vmdk"),
        ])
        let child = try files.disk("child.vmdk")
        #expect(try mapped(child, 0..<16384).end == 12288)
        #expect(try status(child, .allocation, of: 0..<16384).end == 12288)
        #expect(try status(child, .depth, of: 0..<16384).end == 12288)
        #expect(
            try readBytes(child, 0, 12288) == [UInt8](repeating: 2, count: 8192) + [UInt8](repeating: 1, count: 4096))
        try requireError(.corrupt, "the parent's fault") { _ = try readBytes(child, 12000, 300) }
        try requireError(.corrupt, "the parent's own fault") {
            _ = try readBytes(try files.disk("parent.vmdk"), 4096, 1)
        }
    }

    @Test func journalThatWaitsIsRefused() throws {
        let files = FilesInMemory(files: [
            "x.vmdk": VMDKBytes.seSparse(sectors: 80, replaysJournal: true, [:]),
            "a.vmdk": VMDKBytes.descriptor(["RW 80 SESPARSE \"x.vmdk\""]),
        ])
        let error = #expect(throws: BlockError.self) { try files.disk("a.vmdk") }
        #expect(error?.kind == .unsupported && error?.message.contains("journal") == true)
    }

    @Test func textModeTransferIsNoticed() throws {
        var bytes = VMDKBytes.hosted(sectors: 80, [:])
        bytes[0x4B] = 0x0A
        let files = FilesInMemory(files: [
            "x.vmdk": bytes, "a.vmdk": VMDKBytes.descriptor(["RW 80 SPARSE \"x.vmdk\""]),
        ])
        try requireError(.corrupt, "line breaks") { _ = try files.disk("a.vmdk") }
    }
}
