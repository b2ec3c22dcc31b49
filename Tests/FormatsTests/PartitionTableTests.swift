// Partition tables that the usual tools make are read as these tools read them.
import Block
import Formats
import Foundation
import Testing

/// Makes a GPT with two partitions, from 4 to 9 and from 9 to 14 MiB, on disk.raw.
private func makeGPT(_ scratch: Scratch, sectorSize: Int) throws {
    try Tool.run(
        "parted",
        ["-s", "disk.raw", "mklabel", "gpt", "mkpart", "first", "4MiB", "9MiB", "mkpart", "second", "9MiB", "14MiB"],
        in: scratch.path, environment: ["PARTED_SECTOR_SIZE": "\(sectorSize)"])
}

@Suite struct PartitionTableTests {
    /// What `sfdisk --json` says.
    private struct Listing: Decodable {
        struct Table: Decodable {
            let label: String
            let id: String
            let sectorsize: UInt64
            let partitions: [Entry]?
        }
        struct Entry: Decodable {
            let node: String
            let start: UInt64
            let size: UInt64
            let type: String
            let uuid: String?
            let name: String?
        }
        let partitiontable: Table
    }

    private func makeDisk(_ scratch: Scratch, size: String = "64M") throws {
        try scratch.qemuImg("create -q -f raw disk.raw \(size)")
    }

    private func read(_ scratch: Scratch) throws -> PartitionTable {
        try #require(try PartitionTable.read(from: scratch.resolved("disk.raw").device))
    }

    private func expectSameAsSfdisk(_ scratch: Scratch, sourceLocation: SourceLocation = #_sourceLocation) throws {
        let text = try scratch.run("sfdisk", "--json", "disk.raw")
        let theirs = try JSONDecoder().decode(Listing.self, from: Data(text.utf8)).partitiontable
        let ours = try read(scratch)
        #expect(ours.scheme.rawValue == theirs.label, sourceLocation: sourceLocation)
        #expect(ours.identifier == theirs.id, sourceLocation: sourceLocation)
        #expect(ours.warnings.isEmpty, sourceLocation: sourceLocation)
        let entries = theirs.partitions ?? []
        #expect(ours.partitions.count == entries.count, sourceLocation: sourceLocation)
        for (partition, entry) in zip(ours.partitions.sorted { $0.number < $1.number }, entries) {
            #expect(entry.node == "disk.raw\(partition.number)", sourceLocation: sourceLocation)
            #expect(partition.range.lowerBound == entry.start * theirs.sectorsize, sourceLocation: sourceLocation)
            #expect(partition.range.count64 == entry.size * theirs.sectorsize, sourceLocation: sourceLocation)
            #expect(partition.type == entry.type, sourceLocation: sourceLocation)
            #expect(partition.identifier == entry.uuid, sourceLocation: sourceLocation)
            #expect(partition.name == entry.name ?? "", sourceLocation: sourceLocation)
            #expect(partition.problem == nil, sourceLocation: sourceLocation)
        }
    }

    @Test func gptFromSgdisk() throws {
        let scratch = try Scratch()
        try makeDisk(scratch)
        try scratch.run(
            "sgdisk", "-n", "1:2048:4095", "-t", "1:EF00", "-c", "1:EFI System", "-n", "2:4096:40959", "-t", "2:8300",
            "-c", "2:Wurzel ä 磁盘", "-n", "128:40960:40960", "-t", "128:8E00", "disk.raw")
        try expectSameAsSfdisk(scratch)
        let table = try read(scratch)
        #expect(table.partitions.map(\.number) == [1, 2, 128])
        #expect(table.partitions.map(\.typeName) == ["EFI system", "Linux", "Linux LVM"])
        #expect(table.partitions.last?.range.count64 == 512)
        let device = try table.open(2, of: scratch.resolved("disk.raw").device)
        #expect(device.info.size == 36864 * 512)
    }

    @Test func gptFromPartedAndSfdisk() throws {
        let scratch = try Scratch()
        try makeDisk(scratch)
        try scratch.run(
            "parted", "-s", "disk.raw", "mklabel", "gpt", "mkpart", "one", "ext4", "1MiB", "20MiB", "mkpart", "two",
            "fat32", "20MiB", "100%")
        try expectSameAsSfdisk(scratch)
        try makeDisk(scratch)
        try scratch.run("sfdisk", "-q", "disk.raw", input: "label: gpt\nsize=5M, type=L\nsize=7M, type=S\ntype=U\n")
        try expectSameAsSfdisk(scratch)
        try makeDisk(scratch)
        try scratch.run("sfdisk", "-q", "disk.raw", input: "label: gpt\n")
        try expectSameAsSfdisk(scratch)
    }

    @Test func gptWith4096ByteSectors() throws {
        let scratch = try Scratch()
        try makeDisk(scratch)
        try makeGPT(scratch, sectorSize: 4096)
        let table = try read(scratch)
        #expect(table.sectorSize == 4096)
        #expect(table.partitions.map(\.range) == [4_194_304..<9_437_184, 9_437_184..<14_680_064])
        #expect(table.partitions[1].name == "second")
    }

    @Test func mbrOnADiskWith4096ByteSectorsCountsInThem() throws {
        var disk = [UInt8](repeating: 0, count: 1 << 20)
        disk.replaceSubrange(450..<462, with: [0x83, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0])
        disk.replaceSubrange(510..<512, with: [0x55, 0xAA])
        let large = try #require(try PartitionTable.read(from: BytesDevice(disk, minimumBlock: 4096)))
        #expect(large.partitions.map(\.range) == [8192..<20480])
        let small = try #require(try PartitionTable.read(from: BytesDevice(disk)))
        #expect(small.partitions.map(\.range) == [1024..<2560])
    }

    @Test func mbrWithLogicalPartitions() throws {
        let scratch = try Scratch()
        try makeDisk(scratch)
        let logical = (0..<9).map { "size=\($0 + 1)M, type=\(["83", "82", "7", "c"][$0 % 4])\n" }.joined()
        try scratch.run(
            "sfdisk", "-q", "disk.raw",
            input: "label: dos\nlabel-id: 0x0012ab34\nsize=2M, type=83\nsize=3M, type=fb\ntype=5\n" + logical)
        try expectSameAsSfdisk(scratch)
        let table = try read(scratch)
        #expect(table.identifier == "0x0012ab34")
        #expect(table.partitions.map(\.number) == [1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13])
        #expect(table.partitions[1].typeName == "VMware VMFS")
        #expect(table.partitions[2].isExtended)
        #expect(try table.open(7, of: scratch.resolved("disk.raw").device).info.size == 3 << 20)
    }

    @Test func mbrWithGapsAndExtendedPartitionInTheFirstSlot() throws {
        let scratch = try Scratch()
        try makeDisk(scratch)
        try scratch.run(
            "sfdisk", "-q", "disk.raw",
            input:
                "label: dos\n1: start=40960, size=60000, type=f\n4: start=2048, size=2048, type=83\n"
                + "5: size=2M\n6: size=1M\n"
        )
        try expectSameAsSfdisk(scratch)
        try scratch.run("sfdisk", "-q", "--delete", "disk.raw", "5")
        try expectSameAsSfdisk(scratch)
    }

    @Test func mbrFromPartedWithoutPartitions() throws {
        let scratch = try Scratch()
        try makeDisk(scratch)
        try scratch.run("parted", "-s", "disk.raw", "mklabel", "msdos")
        try expectSameAsSfdisk(scratch)
    }

    @Test func backupIsUsedWhenTheHeaderIsDamaged() throws {
        let scratch = try Scratch()
        try makeDisk(scratch)
        try scratch.run("sgdisk", "-n", "1:2048:4095", "-c", "1:kept", "disk.raw")
        let good = try scratch.bytes("disk.raw")
        for damage in [512, 512 + 20, 512 + 72, 1024, 1024 + 16383] {
            var bytes = good
            bytes[damage] ^= 0x40
            let table = try #require(try PartitionTable.read(from: BytesDevice(bytes)))
            #expect(table.partitions.map(\.name) == ["kept"])
            #expect(table.warnings.count == 1)
        }
        // Without the backup, too, there is nothing to go by.
        var bytes = good
        bytes[512] ^= 1
        bytes[bytes.count - 512] ^= 1
        let error = #expect(throws: BlockError.self) { try PartitionTable.read(from: BytesDevice(bytes)) }
        #expect(error?.kind == .corrupt)
    }

    @Test func disksWithoutATableHaveNone() throws {
        #expect(try PartitionTable.read(from: BytesDevice([])) == nil)
        #expect(try PartitionTable.read(from: BytesDevice([UInt8](repeating: 0, count: 511))) == nil)
        #expect(try PartitionTable.read(from: BytesDevice([UInt8](repeating: 0, count: 1 << 20))) == nil)
        #expect(try PartitionTable.read(from: BytesDevice([UInt8](repeating: 0xFF, count: 1 << 20))) == nil)
        // A file system's boot sector: the signature of an MBR, but code where a table would be.
        var boot = (0..<4096).map { UInt8(truncatingIfNeeded: $0 &* 7 &+ 3) }
        boot[510] = 0x55
        boot[511] = 0xAA
        #expect(try PartitionTable.read(from: BytesDevice(boot)) == nil)
    }

    @Test func oldTableWithoutProtectiveRecordIsNotRevived() throws {
        let scratch = try Scratch()
        try makeDisk(scratch)
        try scratch.run("sgdisk", "-n", "1:2048:4095", "disk.raw")
        var bytes = try scratch.bytes("disk.raw")
        // The disk was given an MBR later by a tool that knows no GPT.
        bytes[446 + 4] = 0x83
        let table = try #require(try PartitionTable.read(from: BytesDevice(bytes)))
        #expect(table.scheme == .dos)
    }
}

@Suite struct HostilePartitionTableTests {
    private func mbr(_ entries: [(type: UInt8, start: UInt32, count: UInt32)], at sector: Int, in disk: inout [UInt8]) {
        for (index, entry) in entries.enumerated() {
            let at = sector * 512 + 446 + index * 16
            disk[at + 4] = entry.type
            for (byte, shift) in [0, 8, 16, 24].enumerated() {
                disk[at + 8 + byte] = UInt8(truncatingIfNeeded: entry.start >> UInt32(shift))
                disk[at + 12 + byte] = UInt8(truncatingIfNeeded: entry.count >> UInt32(shift))
            }
        }
        disk[sector * 512 + 510] = 0x55
        disk[sector * 512 + 511] = 0xAA
    }

    @Test func partitionBeyondTheDiskIsListedAndRefused() throws {
        var disk = [UInt8](repeating: 0, count: 1 << 20)
        mbr([(0x83, 1, 100), (0x83, 1000, 2000), (0x83, .max, .max)], at: 0, in: &disk)
        let device = BytesDevice(disk)
        let table = try #require(try PartitionTable.read(from: device))
        #expect(table.partitions.map { $0.problem == nil } == [true, false, false])
        let error = #expect(throws: BlockError.self) { try table.open(2, of: device) }
        #expect(error?.kind == .outOfRange)
        #expect(error?.message.contains("only 1048576 bytes") == true)
        #expect(throws: BlockError.self) { try table.open(4, of: device) }
        #expect(try table.open(1, of: device).info.size == 51200)
    }

    @Test func loopOfExtendedPartitionsEnds() throws {
        var disk = [UInt8](repeating: 0, count: 1 << 20)
        mbr([(0x05, 100, 1000)], at: 0, in: &disk)
        mbr([(0x83, 1, 10), (0x05, 50, 10)], at: 100, in: &disk)
        mbr([(0x83, 1, 10), (0x05, 0, 10)], at: 150, in: &disk)
        let table = try #require(try PartitionTable.read(from: BytesDevice(disk)))
        #expect(table.partitions.map(\.number) == [1, 5, 6])
        #expect(table.warnings.count == 1)
    }

    @Test func endlessChainOfExtendedPartitionsEnds() throws {
        var disk = [UInt8](repeating: 0, count: 512 * 2000)
        mbr([(0x05, 1, 1999)], at: 0, in: &disk)
        for sector in 1..<1999 { mbr([(0x83, 1, 1), (0x05, UInt32(sector), 1)], at: sector, in: &disk) }
        let table = try #require(try PartitionTable.read(from: BytesDevice(disk)))
        #expect(table.partitions.count <= 258)
    }

    @Test func linkPastTheDiskEndsTheChain() throws {
        var disk = [UInt8](repeating: 0, count: 1 << 20)
        mbr([(0x05, 100, 1000), (0x0F, .max, 5)], at: 0, in: &disk)
        mbr([(0x83, 1, 10), (0x05, .max, 10)], at: 100, in: &disk)
        let table = try #require(try PartitionTable.read(from: BytesDevice(disk)))
        #expect(table.partitions.map(\.number) == [1, 2, 5])
        #expect(table.warnings.count == 2)
    }

    @Test(arguments: [512, 4096])
    func everyByteOfAGPTMayLie(sectorSize: Int) throws {
        let scratch = try Scratch()
        try scratch.qemuImg("create -q -f raw disk.raw 16M")
        try makeGPT(scratch, sectorSize: sectorSize)
        let good = try scratch.bytes("disk.raw")
        #expect(try PartitionTable.read(from: BytesDevice(good))?.partitions.count == 2)
        let places =
            Array(440..<512) + Array(sectorSize..<(sectorSize + 100)) + Array(0..<300).map { 2 * sectorSize + $0 }
        for place in places {
            for value in [0, 0xFF, good[place] ^ 1, good[place] ^ 0x80] where value != good[place] {
                var bytes = good
                bytes[place] = value
                let table = try? PartitionTable.read(from: BytesDevice(bytes))
                for partition in table?.partitions ?? [] {
                    _ = try? table?.open(partition.number, of: BytesDevice(bytes))
                }
            }
        }
        for length in stride(from: 0, to: 40960, by: 1487) {
            _ = try? PartitionTable.read(from: BytesDevice(Array(good[..<length])))
        }
    }

    /// A header with a right checksum and wrong numbers.
    @Test func absurdNumbersWithARightChecksumAreRefused() throws {
        let scratch = try Scratch()
        try scratch.qemuImg("create -q -f raw disk.raw 1M")
        try scratch.run("sgdisk", "-n", "1:34:40", "disk.raw")
        let good = try scratch.bytes("disk.raw")
        let changes: [(Int, UInt64, Int)] = [
            (12, 91, 4), (12, 513, 4), (12, 0xFFFF_FFFF, 4), (24, 2, 8), (72, .max, 8), (72, 1 << 60, 8), (72, 2047, 8),
            (80, 0xFFFF_FFFF, 4), (80, 0, 4), (80, 8193, 4), (84, 0, 4), (84, 127, 4), (84, 132, 4),
            (84, 0xFFFF_FFF8, 4),
        ]
        for (offset, value, width) in changes {
            var bytes = good
            for index in 0..<width {
                bytes[512 + offset + index] = UInt8(truncatingIfNeeded: value >> UInt64(8 * index))
            }
            sign(&bytes)
            let table = try #require(try PartitionTable.read(from: BytesDevice(bytes)))
            #expect(table.warnings.count == 1, "\(value) at \(offset)")
        }
    }

    /// Renews the checksum of the header at sector 1.
    private func sign(_ bytes: inout [UInt8]) {
        bytes.replaceSubrange(528..<532, with: [0, 0, 0, 0])
        var sum: UInt32 = .max
        for byte in bytes[512..<604] {
            sum ^= UInt32(byte)
            for _ in 0..<8 { sum = sum >> 1 ^ (sum & 1 == 0 ? 0 : 0xEDB8_8320) }
        }
        sum = ~sum
        for index in 0..<4 { bytes[528 + index] = UInt8(truncatingIfNeeded: sum >> UInt32(8 * index)) }
    }
}
