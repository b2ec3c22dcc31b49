// What block nodes do beyond the contract: sizes, sectors, exclusive use, the kernel's read-only switch, discard.
import Block
import CLinux
import Glibc
import LinuxIO
import Support
import Testing

private func options(writable: Bool = false, direct: Bool = false, exclusive: Bool = false) -> RawOptions {
    var options = RawOptions()
    options.isWritable = writable
    options.isDirect = direct
    options.isExclusive = exclusive
    return options
}

/// The kernel's read-only switch of a node (BLKROGET).
private func isReadOnly(_ node: String) throws -> Bool {
    let descriptor = try Descriptor.open(node, O_RDONLY)
    var answer = false
    try require(dg_block_read_only_get(descriptor.number, &answer) == 0, "BLKROGET of \(node)")
    return answer
}

@Suite(.serialized, .enabled(if: LoopDevice.areAvailable, Comment(rawValue: LoopDevice.reason)))
struct BlockNodeTests {
    private let content = patternBytes(1 << 20, seed: 1)

    @Test(arguments: [512, 4096])
    func tellsSizesAndSectors(sectorSize: Int) throws {
        try LoopDevice.with(content + patternBytes(700, seed: 2), sectorSize: sectorSize) { node, _ in
            let info = try BlockNodeDevice.open(node).info
            // The kernel counts in 512 bytes but reads and writes whole sectors only.
            #expect(info.size == (sectorSize == 512 ? 1_049_088 : 1 << 20))
            #expect(info.minimumBlock == UInt32(sectorSize))
            #expect(info.preferredBlock >= 4096)
            #expect(info.isReadOnly && info.format == "raw" && info.name == node)
            #expect(info.identity.contains { $0.key == "diskseq" })
        }
    }

    @Test func exclusiveReadingSwitchesTheNodeReadOnly() throws {
        try LoopDevice.with(content) { node, _ in
            #expect(try !isReadOnly(node))
            do {
                let device = try BlockNodeDevice.open(node, options(exclusive: true))
                #expect(try isReadOnly(node))
                try requireEqual(try readBytes(device, at: 0, count: content.count), content, "the node")
                try requireError(.readOnly, "opening for writing") {
                    let descriptor = try Descriptor.open(node, O_RDWR)
                    try [1].withUnsafeBytes { bytes in
                        if pwrite(descriptor.number, bytes.baseAddress, 1, 0) < 0 {
                            throw BlockError(errno: errno, "x")
                        }
                    }
                }
                withExtendedLifetime(device) {}
            }
            #expect(try !isReadOnly(node), "BLKROSET was not taken back")
        }
    }

    /// A node that was read-only before stays so.
    @Test func readOnlyNodeStaysReadOnly() throws {
        try LoopDevice.with(content) { node, _ in
            let holder = try Descriptor.open(node, O_RDONLY)
            try require(dg_block_read_only_set(holder.number, true) == 0, "BLKROSET")
            do {
                let device = try BlockNodeDevice.open(node, options(exclusive: true))
                #expect(device.info.isReadOnly)
            }
            #expect(try isReadOnly(node))
            do {
                _ = try BlockNodeDevice.open(node, options(writable: true))
                Issue.record("a read-only node was opened for writing")
            } catch let error as BlockError {
                #expect([.readOnly, .denied].contains(error.kind), "\(error)")
            }
            try require(dg_block_read_only_set(holder.number, false) == 0, "BLKROSET")
        }
    }

    @Test func busyNodeSaysWhatToDo() throws {
        try LoopDevice.with(content) { node, _ in
            let holder = try BlockNodeDevice.open(node, options(writable: true))
            for second in [options(writable: true), options(exclusive: true)] {
                do {
                    _ = try BlockNodeDevice.open(node, second)
                    Issue.record("a node that is held was opened")
                } catch let error as BlockError {
                    #expect(error.message.contains("lsblk \(node)"), "\(error)")
                    #expect(error.message.contains("held by"), "\(error)")
                }
            }
            // Shared reading is allowed beside a writer, and then nothing is stable.
            let reader = try BlockNodeDevice.open(node)
            if case .file(let reference, _) = try mapped(reader, 0..<512).extents[0].place {
                #expect(!reference.traits.contains(.stable) && reference.traits.contains(.blockNode))
            }
            withExtendedLifetime(holder) {}
        }
    }

    @Test(arguments: [false, true])
    func partsOfSectorsAreZeroedAndWritten(direct: Bool) throws {
        try LoopDevice.with(content, sectorSize: 4096) { node, file in
            var expected = content
            do {
                let device = try BlockNodeDevice.open(node, options(writable: true, direct: direct))
                for range in [1..<2, 4095..<4097, 5000..<20_000, 65_536..<131_072, 140_000..<140_100] {
                    try device.zero(UInt64(range.lowerBound)..<UInt64(range.upperBound), [])
                    expected.replaceSubrange(range, with: [UInt8](repeating: 0, count: range.count))
                }
                try patternBytes(3, seed: 3).withUnsafeBytes { try device.write($0, at: 8191, durable: true) }
                expected.replaceSubrange(8191..<8194, with: patternBytes(3, seed: 3))
                // Less than a sector is left alone: discard is advice.
                try device.discard(300_001..<300_500, durable: false)
                try device.flush()
                try requireEqual(try readBytes(device, at: 0, count: content.count), expected, "the node")
            }
            try requireEqual(try contentOfFile(file), expected, "the file behind the node")
        }
    }

    @Test func discardOfUnalignedRangeKeepsTheEdges() throws {
        try LoopDevice.with(content, sectorSize: 4096) { node, file in
            let device = try BlockNodeDevice.open(node, options(writable: true))
            try device.discard(4000..<20_000, durable: true)
            try requireEqual(try readBytes(device, at: 0, count: 4096), content[..<4096], "before the whole sectors")
            try requireEqual(
                try readBytes(device, at: 16_384, count: 10_000), content[16_384..<26_384], "behind the whole sectors")
            var status = stat()
            try require(stat(file, &status) == 0)
            #expect(status.st_blocks * 512 <= (1 << 20) - 12_288, "no storage was given back")
        }
    }

    @Test func zeroingFastIsRefused() throws {
        try LoopDevice.with(content) { node, _ in
            let device = try BlockNodeDevice.open(node, options(writable: true))
            #expect(!device.info.canZeroFast && device.info.canDiscard)
            try requireError(.unsupported, "fast zeros") { try device.zero(0..<4096, .fastOnly) }
        }
    }

    /// O_DIRECT on 4096-byte sectors: every request smaller than that goes through a bounce buffer.
    @Test func directReadsOfAnySize() throws {
        try LoopDevice.with(content, sectorSize: 4096) { node, _ in
            let device = try BlockNodeDevice.open(node, options(direct: true))
            if case .file(let reference, _) = try mapped(device, 0..<1).extents[0].place {
                #expect(reference.traits.contains(.direct))
                #expect(reference.traits.alignment == 4096)
            }
            for (offset, count, shift) in [(0, 1, 0), (4095, 2, 1), (511, 4096, 0), (0, 4096, 8), (1 << 20 - 1, 1, 3)] {
                let bytes = try readBytes(device, at: UInt64(offset), count: count, shift: shift)
                try requireEqual(bytes, content[offset..<(offset + count)], "\(count) at \(offset)")
            }
        }
    }
}
