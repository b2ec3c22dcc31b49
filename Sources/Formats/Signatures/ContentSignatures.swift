// What a disk or a part of it holds, as its first bytes tell: for people who look for the right disk.
public import Block

/// Recognises what lies on a disk, without reading further than its beginning and a few well-known places.
public enum ContentSignatures {
    /// What a disk holds.
    public struct Content: Sendable, Equatable, Codable {
        /// The kernel's or the maker's name: gpt, dos, ext4, LVM2_member, VMFS.
        public var type: String
        /// What more there is to say: the number of partitions, a UUID.
        public var detail: String?
    }

    /// What a disk holds, the outermost first; empty for nothing that is known.
    ///
    /// - Throws: `BlockError` when the disk cannot be read.
    public static func recognised(on device: any BlockDevice) throws(BlockError) -> [Content] {
        var found: [Content] = []
        let table: PartitionTable?
        do throws(BlockError) { table = try PartitionTable.read(from: device) } catch {
            if error.kind != .corrupt { throw error }
            table = nil
            found.append(Content(type: "damaged partition table"))
        }
        // Some file systems have a boot sector that looks like a table without partitions.
        if let table, !table.partitions.isEmpty {
            let count = table.partitions.count
            found.append(
                Content(type: table.scheme.rawValue, detail: count == 1 ? "1 partition" : "\(count) partitions"))
        }
        if let container = try container(on: device) { found.append(container) }
        if let fileSystem = try FileSystemType.recognised(on: device) { found.append(Content(type: fileSystem.name)) }
        return found
    }

    /// A magic number, where it is, and what has it.
    private static let magics: [(offset: UInt64, bytes: [UInt8], type: String)] = [
        (0, Array("LUKS".utf8) + [0xBA, 0xBE], "crypto_LUKS"),
        (4086, Array("SWAPSPACE2".utf8), "swap"),
        (4096, [0xFC, 0x4E, 0x2B, 0xA9], "linux_raid_member"),
        (0, [0xFC, 0x4E, 0x2B, 0xA9], "linux_raid_member"),
        (0x10_0000, [0x0D, 0xD0, 0x01, 0xC0], "VMFS_volume_member"),
        (0x20_0000, [0x5E, 0xF1, 0xAB, 0x2F], "VMFS"),
    ]

    private static func container(on device: any BlockDevice) throws(BlockError) -> Content? {
        if let identifier = try physicalVolume(on: device) { return Content(type: "LVM2_member", detail: identifier) }
        let buffer = Buffer(count: 16)
        for magic in magics where magic.offset + UInt64(magic.bytes.count) <= device.info.size {
            let part = UnsafeMutableRawBufferPointer(rebasing: buffer.bytes[..<magic.bytes.count])
            try device.read(into: part, at: magic.offset)
            if part.elementsEqual(magic.bytes) { return Content(type: magic.type) }
        }
        return nil
    }

    /// The UUID of an LVM2 physical volume: a label in one of the first four sectors.
    private static func physicalVolume(on device: any BlockDevice) throws(BlockError) -> String? {
        guard device.info.size >= 2048 else { return nil }
        let buffer = Buffer(count: 2048)
        try device.read(into: buffer.bytes, at: 0)
        for sector in 0..<4 {
            let label = buffer.readable[(sector * 512)..<(sector * 512 + 512)]
            guard label.prefix(8).elementsEqual("LABELONE".utf8),
                label.dropFirst(24).prefix(8).elementsEqual("LVM2 001".utf8)
            else { continue }
            let identifier = label.dropFirst(32).prefix(32)
            guard identifier.allSatisfy({ (33...126).contains($0) }) else { return "" }
            return String(decoding: identifier, as: UTF8.self)
        }
        return nil
    }
}
