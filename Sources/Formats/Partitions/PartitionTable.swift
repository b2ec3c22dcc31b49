// Partition tables as the kernel would see them: which parts of a disk are disks of their own.
public import Block

/// A part of a disk that its partition table names.
public struct Partition: Sendable, Equatable {
    /// The kernel's number: of the entry in a GPT; 1 to 4 and, for logical partitions, from 5 on in an MBR.
    public let number: Int
    /// Where it lies, in bytes from the start of the disk. Not inside the disk when `problem` says so.
    public let range: Range<UInt64>
    /// The type as the table has it: a GUID in upper case, or two hexadecimal digits.
    public let type: String
    /// The type for people, nil when it is not known.
    public let typeName: String?
    /// The name that a GPT gives it, empty when it has none.
    public let name: String
    /// The partition's own GUID, nil in an MBR.
    public let identifier: String?
    /// Whether it only holds logical partitions.
    public let isExtended: Bool
    /// Why it cannot be used, nil when it can.
    public let problem: String?
}

/// The partitions of a disk.
public struct PartitionTable: Sendable {
    /// The kind of a partition table, as sfdisk names it.
    public enum Scheme: String, Sendable {
        /// GUID partition table.
        case gpt
        /// Master boot record.
        case dos
    }

    /// The kind of the table.
    public let scheme: Scheme
    /// Bytes in a sector, the unit of the table: 512 or 4096.
    public let sectorSize: UInt64
    /// The disk's GUID, or the MBR's signature as 0x and eight digits.
    public let identifier: String
    /// The partitions by number.
    public let partitions: [Partition]
    /// What is wrong with the table although it can be used, for example that only its backup is readable.
    public let warnings: [String]

    /// Reads the partition table of a disk.
    ///
    /// A GPT counts when the MBR announces it or there is no MBR; where its header is damaged, its backup at the end of
    /// the disk is used. Otherwise the MBR counts.
    ///
    /// - Returns: nil when the disk has no partition table.
    /// - Throws: `.corrupt` when the MBR announces a GPT and neither copy can be used, or what reading throws.
    public static func read(from device: any BlockDevice) throws(BlockError) -> PartitionTable? {
        guard device.info.size >= 512 else { return nil }
        let sector = Buffer(count: 512)
        try device.read(into: sector.bytes, at: 0)
        let record = MasterBootRecord(sector.readable)
        if record == nil || record?.announcesGPT == true {
            if let table = try GUIDPartitionTable.read(from: device, isAnnounced: record != nil) { return table }
        }
        return try record?.table(of: device)
    }

    /// A partition by its number.
    ///
    /// - Throws: `.notFound` when there is none, with the numbers that there are; `.outOfRange` when it cannot be used.
    public func partition(_ number: Int) throws(BlockError) -> Partition {
        guard let found = partitions.first(where: { $0.number == number }) else {
            let numbers = partitions.map { String($0.number) }.joined(separator: ", ")
            let known = numbers.isEmpty ? "none at all" : numbers
            throw BlockError(
                .notFound, "choosing partition \(number): there is no such partition (\(known))")
        }
        if let problem = found.problem {
            throw BlockError(.outOfRange, "choosing partition \(number): it cannot be used, because \(problem)")
        }
        return found
    }

    /// A partition as a disk.
    ///
    /// - Parameter device: the disk that the table was read from.
    /// - Throws: what `partition(_:)` throws.
    public func open(_ number: Int, of device: any BlockDevice) throws(BlockError) -> SliceDevice {
        do throws(BlockError) {
            return try SliceDevice(device, range: partition(number).range, label: "partition \(number)")
        } catch { throw error.during("opening a part of \(device.info.name)") }
    }
}

/// Sectors as a range of bytes, with what is wrong with it on a disk of `size` bytes. Saturates rather than overflows.
func partitionRange(first: UInt64, count: UInt64, sectorSize: UInt64, size: UInt64) -> (
    range: Range<UInt64>, problem: String?
) {
    let start = first.multipliedReportingOverflow(by: sectorSize)
    let length = count.multipliedReportingOverflow(by: sectorSize)
    let end = start.partialValue.addingReportingOverflow(length.partialValue)
    if start.overflow || length.overflow || end.overflow {
        return (0..<0, "its sectors, \(count) from \(first), are past any disk's end")
    }
    let range = start.partialValue..<end.partialValue
    if range.isEmpty { return (range, "it is empty") }
    if range.upperBound > size {
        return (range, "it ends at byte \(range.upperBound), but the disk has only \(size) bytes")
    }
    return (range, nil)
}
