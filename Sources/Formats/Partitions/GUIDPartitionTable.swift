// GUID partition tables (UEFI specification, chapter 5): the header, its backup, and the array of entries.
import Block
import CZlib

/// Reads GUID partition tables.
enum GUIDPartitionTable {
    /// The most bytes of entries: 8192 entries of 128 bytes. Usual tables have 128 entries.
    private static let entriesBytesMax: UInt64 = 1 << 20

    /// A header whose checksum is right, and its entries, whose checksum is right, too.
    private struct Copy: ~Copyable {
        let diskIdentifier: String
        let entrySize: Int
        let entryCount: Int
        let entries: Buffer
    }

    /// Reads the table of a disk.
    ///
    /// - Parameter isAnnounced: whether an MBR says that there is one.
    /// - Returns: nil when there is none.
    /// - Throws: `.corrupt` when an MBR announces one and no copy is right, or what reading throws.
    static func read(from device: any BlockDevice, isAnnounced: Bool) throws(BlockError) -> PartitionTable? {
        let size = device.info.size
        var isThere = false
        for sectorSize: UInt64 in [512, 4096] where size / sectorSize >= 3 {
            if let primary = try header(device, at: 1, sectorSize, &isThere) {
                return try table(primary, device, sectorSize, warnings: [])
            }
        }
        guard isAnnounced || isThere else { return nil }
        for sectorSize: UInt64 in [512, 4096] where size / sectorSize >= 3 {
            if let backup = try header(device, at: size / sectorSize - 1, sectorSize, &isThere) {
                let warning = "the partition table at the start of the disk is damaged; its backup at the end is used"
                return try table(backup, device, sectorSize, warnings: [warning])
            }
        }
        // Without an MBR that says so, what looks like a header may be anything.
        if !isAnnounced { return nil }
        throw BlockError(
            .corrupt,
            "reading the partition table of \(device.info.name): neither its GPT nor the backup at the disk's end is "
                + "intact; sgdisk --verify says more (a disk that was shortened has lost its backup)")
    }

    /// The copy whose header is at a sector, if it is intact. `isThere` becomes true where one was meant to be.
    private static func header(
        _ device: any BlockDevice, at sector: UInt64, _ sectorSize: UInt64, _ isThere: inout Bool
    ) throws(BlockError) -> Copy? {
        let size = device.info.size
        let block = Buffer(count: Int(sectorSize))
        try device.read(into: block.bytes, at: sector * sectorSize)
        let bytes = block.readable
        guard bytes.bigEndian(0, as: UInt64.self) == 0x4546_4920_5041_5254 else { return nil }  // "EFI PART"
        isThere = true
        let length = Int(bytes.littleEndian(12, as: UInt32.self))
        guard length >= 92, length <= bytes.count else { return nil }
        let sum: UInt32 = bytes.littleEndian(16)
        block.bytes.storeBytes(of: 0, toByteOffset: 16, as: UInt32.self)
        guard checksum(UnsafeRawBufferPointer(rebasing: bytes[..<length])) == sum,
            bytes.littleEndian(24, as: UInt64.self) == sector
        else { return nil }
        let entryCount = UInt64(bytes.littleEndian(80, as: UInt32.self))
        let entrySize = UInt64(bytes.littleEndian(84, as: UInt32.self))
        let (total, overflow) = entryCount.multipliedReportingOverflow(by: entrySize)
        guard entrySize >= 128, entrySize & 7 == 0, entryCount > 0, !overflow, total <= entriesBytesMax else {
            return nil
        }
        let start = bytes.littleEndian(72, as: UInt64.self).multipliedReportingOverflow(by: sectorSize)
        guard !start.overflow, start.partialValue < size, total <= size - start.partialValue else { return nil }
        let entries = Buffer(count: Int(total))
        try device.read(into: entries.bytes, at: start.partialValue)
        guard checksum(entries.readable) == bytes.littleEndian(88, as: UInt32.self) else { return nil }
        return Copy(
            diskIdentifier: identifier(bytes, 56), entrySize: Int(entrySize), entryCount: Int(entryCount),
            entries: entries)
    }

    private static func checksum(_ bytes: UnsafeRawBufferPointer) -> UInt32 {
        UInt32(truncatingIfNeeded: crc32(0, bytes.bindMemory(to: UInt8.self).baseAddress, UInt32(bytes.count)))
    }

    private static func table(
        _ copy: borrowing Copy, _ device: any BlockDevice, _ sectorSize: UInt64, warnings: [String]
    ) throws(BlockError) -> PartitionTable {
        var partitions: [Partition] = []
        for index in 0..<copy.entryCount {
            let from = index * copy.entrySize
            let entry = UnsafeRawBufferPointer(rebasing: copy.entries.readable[from..<(from + copy.entrySize)])
            if entry[..<16].allSatisfy({ $0 == 0 }) { continue }
            partitions.append(partition(index + 1, entry, sectorSize, device.info.size))
        }
        return PartitionTable(
            scheme: .gpt, sectorSize: sectorSize, identifier: copy.diskIdentifier, partitions: partitions,
            warnings: warnings)
    }

    private static func partition(_ number: Int, _ entry: UnsafeRawBufferPointer, _ sectorSize: UInt64, _ size: UInt64)
        -> Partition
    {
        let first: UInt64 = entry.littleEndian(32)
        let last: UInt64 = entry.littleEndian(40)
        // The last sector belongs to it.
        let count = last < first ? 0 : (last - first).addingReportingOverflow(1).partialValue
        let placed = partitionRange(first: first, count: count, sectorSize: sectorSize, size: size)
        let units = (0..<36).map { entry.littleEndian(56 + 2 * $0, as: UInt16.self) }
        let type = identifier(entry, 0)
        return Partition(
            number: number, range: placed.range, type: type, typeName: PartitionTypes.guidNames[type],
            name: String(decoding: units.prefix { $0 != 0 }, as: UTF16.self), identifier: identifier(entry, 16),
            isExtended: false, problem: placed.problem)
    }

    /// The text of a GUID: the first three groups are little-endian, the rest bytes in order.
    private static func identifier(_ bytes: UnsafeRawBufferPointer, _ offset: Int) -> String {
        let order = [3, 2, 1, 0, -1, 5, 4, -1, 7, 6, -1, 8, 9, -1, 10, 11, 12, 13, 14, 15]
        let digits = Array("0123456789ABCDEF")
        var text = ""
        for index in order {
            if index < 0 {
                text.append("-")
            } else {
                let byte = Int(bytes[offset + index])
                text.append(digits[byte >> 4])
                text.append(digits[byte & 15])
            }
        }
        return text
    }
}
