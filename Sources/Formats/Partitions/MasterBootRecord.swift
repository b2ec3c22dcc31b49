// The first sector of a disk as a partition table, with the chain of extended partitions.
import Block

/// A master boot record.
struct MasterBootRecord {
    /// The most logical partitions that are listed: more than the kernel's 255 partitions of a disk.
    private static let logicalMax = 256

    private struct Entry {
        let isBootFlagValid: Bool
        let type: UInt8
        let first: UInt64
        let count: UInt64

        init(_ sector: UnsafeRawBufferPointer, _ index: Int) {
            let at = 446 + 16 * index
            isBootFlagValid = sector[at] == 0 || sector[at] == 0x80
            type = sector[at + 4]
            first = UInt64(sector.littleEndian(at + 8, as: UInt32.self))
            count = UInt64(sector.littleEndian(at + 12, as: UInt32.self))
        }
        var isUsed: Bool { type != 0 && count > 0 }
        var isExtended: Bool { type == 0x05 || type == 0x0F || type == 0x85 }
    }

    private let entries: [Entry]
    private let signature: UInt32

    /// The record in the first 512 bytes of a disk; nil when there is none: file systems have the same signature, but
    /// boot code where a record has flags.
    init?(_ sector: UnsafeRawBufferPointer) {
        guard sector.count >= 512, sector[510] == 0x55, sector[511] == 0xAA else { return nil }
        entries = (0..<4).map { Entry(sector, $0) }
        signature = sector.littleEndian(440)
        if !entries.allSatisfy(\.isBootFlagValid) { return nil }
    }

    /// Whether it says that the disk has a GPT.
    var announcesGPT: Bool { entries.contains { $0.type == 0xEE } }

    func table(of device: any BlockDevice) throws(BlockError) -> PartitionTable {
        let info = device.info
        let sectorSize: UInt64 = info.minimumBlock == 4096 ? 4096 : 512
        var partitions: [Partition] = []
        var warnings: [String] = []
        for (index, entry) in entries.enumerated() where entry.isUsed {
            partitions.append(Self.partition(index + 1, entry, base: 0, sectorSize, info.size))
        }
        var number = 5
        for entry in entries where entry.isUsed && entry.isExtended {
            let logical = try Self.logical(in: entry, from: number, device, sectorSize)
            partitions += logical.partitions
            warnings += logical.warnings
            number += logical.partitions.count
        }
        let digits = String(signature, radix: 16)
        return PartitionTable(
            scheme: .dos, sectorSize: sectorSize,
            identifier: "0x" + String(repeating: "0", count: 8 - digits.count) + digits, partitions: partitions,
            warnings: warnings)
    }

    /// - Parameter base: the sector that the entry's start counts from.
    private static func partition(_ number: Int, _ entry: Entry, base: UInt64, _ sectorSize: UInt64, _ size: UInt64)
        -> Partition
    {
        // Both summands have 32 bits (an extended partition's start, and a 32-bit field each), so nothing overflows.
        let placed = partitionRange(
            first: base + entry.first, count: entry.count, sectorSize: sectorSize, size: size)
        let digits = String(entry.type, radix: 16)
        return Partition(
            number: number, range: placed.range, type: digits, typeName: PartitionTypes.names[entry.type], name: "",
            identifier: nil, isExtended: entry.isExtended, problem: placed.problem)
    }

    /// The logical partitions of an extended one: a chain of records, each with one partition and a link to the next.
    private static func logical(
        in extended: Entry, from firstNumber: Int, _ device: any BlockDevice, _ sectorSize: UInt64
    ) throws(BlockError) -> (partitions: [Partition], warnings: [String]) {
        let size = device.info.size
        let sector = Buffer(count: 512)
        var partitions: [Partition] = []
        var seen: Set<UInt64> = []
        var position = extended.first
        while true {
            let where_ = "the extended partition at sector \(extended.first)"
            guard seen.insert(position).inserted else {
                return (partitions, ["\(where_) links back to sector \(position); the rest is left out"])
            }
            let offset = position * sectorSize
            guard offset < size, size - offset >= 512 else {
                return (partitions, ["\(where_) links to sector \(position), past the disk's end"])
            }
            try device.read(into: sector.bytes, at: offset)
            guard sector.bytes[510] == 0x55, sector.bytes[511] == 0xAA else {
                return (partitions, ["\(where_) has no record at sector \(position); the rest is left out"])
            }
            let two = (0..<2).map { Entry(sector.readable, $0) }
            for entry in two where entry.isUsed && !entry.isExtended {
                if partitions.count == Self.logicalMax {
                    return (partitions, ["\(where_) has more than \(Self.logicalMax) partitions; the rest is left out"])
                }
                partitions.append(
                    partition(firstNumber + partitions.count, entry, base: position, sectorSize, size))
            }
            guard let link = two.first(where: { $0.isUsed && $0.isExtended }), seen.count <= Self.logicalMax else {
                return (partitions, [])
            }
            position = extended.first + link.first
        }
    }
}
