// What a LUN says of itself: the LVM header of a VMFS extent, its volume entry and its table of physical extents.
public import Block

/// A run of a volume's bytes on one LUN.
struct VMFSSegment: Sendable, Equatable {
    /// Where it begins on the volume, in bytes.
    var logical: UInt64
    /// Where it begins on the LUN or partition, in bytes.
    var physical: UInt64
    /// Bytes.
    var length: UInt64
}

/// One LUN, or partition of a LUN, that is part of a VMFS volume.
public struct VMFSMember: Sendable {
    /// The LUN or partition.
    public let device: any BlockDevice
    /// The version of the volume manager's header, 3, 5 or 6; 0 for a volume that has none and starts with the LUN.
    public let lvmVersion: UInt32
    /// The LUN's own UUID.
    public let deviceUUID: VMFSUUID
    /// How the LUN was known to the host that made the header. A LUN with another identity is a copy of that one.
    public let diskID: VMFSDiskID?
    /// Bytes in a sector of the LUN, as the host saw it.
    public let sectorSize: UInt32
    /// The UUID of the logical volume that the LUN is part of; not that of the datastore.
    public let volumeUUID: VMFSUUID
    /// Tells copies of a volume that were given a new signature from the original.
    public let snapshotID: UInt32
    /// The number of the LUN's first physical extent on the volume; 0 on the volume's first LUN.
    public let firstExtent: UInt64
    /// The number of its last one.
    public let lastExtent: UInt64
    /// LUNs that the volume consists of.
    public let deviceCount: Int
    /// The names that ESXi has for the LUNs of the volume, in order; only the first LUN knows them.
    public let deviceNames: [String]
    /// The LUN's runs, in the order of the volume.
    let segments: [VMFSSegment]

    /// Finds what there is of VMFS volumes on a LUN: in its VMFS partitions, or on all of it.
    ///
    /// - Returns: nothing when there is none; more than one when several partitions have one.
    /// - Throws: `.corrupt` when there is a header that cannot be right, or what reading throws.
    public static func probe(_ lun: any BlockDevice) throws(BlockError) -> [VMFSMember] {
        var found: [VMFSMember] = []
        var tableError: BlockError?
        do throws(BlockError) {
            if let table = try PartitionTable.read(from: lun) {
                for partition in table.partitions where partition.isVMFS && partition.problem == nil {
                    found += try members(on: try table.open(partition.number, of: lun))
                }
            }
        } catch { tableError = error }
        // A stray table, or what looks like one, does not hide a volume on the whole LUN.
        if found.isEmpty { found = try members(on: lun) }
        if found.isEmpty, let tableError { throw tableError }
        return found
    }

    /// The volumes that begin, or go on, on a device that has no partitions.
    private static func members(on device: any BlockDevice) throws(BlockError) -> [VMFSMember] {
        let size = device.info.size
        let header = Buffer(count: 4096)
        if size >= LVMHeader.position + 4096 {
            try device.read(into: header.bytes, at: LVMHeader.position)
            if header.readable.littleEndian(0, as: UInt32.self) == LVMHeader.magic {
                do throws(BlockError) {
                    return try LVMHeader(header.readable).members(on: device)
                } catch { throw error.during("reading the volume manager's header of \(device.info.name)") }
            }
        }
        if size >= VMFSHeader.position + 4096 {
            try device.read(into: header.bytes, at: VMFSHeader.position)
            if VMFSHeader.magics.contains(header.readable.littleEndian(0)) { return [VMFSMember(bare: device)] }
        }
        return []
    }

    /// A volume without a volume manager's header.
    private init(bare device: any BlockDevice) {
        let zeros = UnsafeRawBufferPointer(rebasing: ZeroPage.bytes[..<16])
        self.device = device
        lvmVersion = 0
        deviceUUID = VMFSUUID(zeros, at: 0)
        diskID = nil
        sectorSize = max(device.info.minimumBlock, 512)
        volumeUUID = VMFSUUID(zeros, at: 0)
        snapshotID = 0
        firstExtent = 0
        lastExtent = 0
        deviceCount = 1
        deviceNames = []
        segments = [VMFSSegment(logical: 0, physical: 0, length: device.info.size)]
    }

    fileprivate init(
        _ device: any BlockDevice, _ header: LVMHeader, _ volume: LVMVolumeEntry, names: [String],
        segments: [VMFSSegment]
    ) {
        self.device = device
        lvmVersion = header.major
        deviceUUID = header.deviceUUID
        diskID = header.diskID
        sectorSize = header.sectorSize
        volumeUUID = volume.uuid
        snapshotID = volume.snapshotID
        firstExtent = volume.firstExtent
        lastExtent = volume.lastExtent
        deviceCount = volume.deviceCount
        deviceNames = volume.firstExtent == 0 ? Array(names.prefix(volume.deviceCount)) : []
        self.segments = segments
    }
}

extension Partition {
    /// Whether its type is that of a VMFS extent.
    var isVMFS: Bool { type == "AA31E02A-400F-11DB-9590-000C2911D1B8" || type == "fb" }
}

/// An entry of the volume table.
private struct LVMVolumeEntry {
    static let length = 512

    let uuid: VMFSUUID
    let snapshotID: UInt32
    let number: UInt32
    let firstExtent: UInt64
    let lastExtent: UInt64
    let deviceCount: Int

    init(_ entry: UnsafeRawBufferPointer) throws(BlockError) {
        uuid = VMFSUUID(entry, at: 0x54)
        snapshotID = entry.littleEndian(0x64)
        number = entry.littleEndian(0x70)
        firstExtent = entry.littleEndian(0x78)
        lastExtent = entry.littleEndian(0x80)
        let count: UInt32 = entry.littleEndian(0x90)
        guard count <= LVMHeader.devicesMax, firstExtent <= lastExtent else {
            throw BlockError(
                .corrupt, "volume \(uuid) claims extents \(firstExtent) to \(lastExtent) and \(count) LUNs")
        }
        deviceCount = max(Int(count), 1)
    }
}

/// The header of the volume manager, 1 MiB into a LUN.
private struct LVMHeader {
    static let position: UInt64 = 0x10_0000
    static let magic: UInt32 = 0xC001_D00D
    /// The most LUNs of a volume, as many as the table of names takes.
    static let devicesMax = 32
    /// Physical extents that one pair of bitmap and table describes.
    private static let extentsPerMap = 8192
    private static let entryLength = 128
    /// Pairs of bitmap and table behind one header; more headers follow in a chain.
    private static let mapsMax = 8
    /// Headers in the chain: 8 describe 128 TiB in extents of 256 MiB, twice what a volume can have.
    private static let regionsMax = 8

    let major: UInt32
    let diskID: VMFSDiskID
    let sectorSize: UInt32
    let volumeCount: Int
    let extentCount: Int
    let deviceUUID: VMFSUUID
    let mapCount: UInt32
    let nextRegion: UInt64
    /// From the header to the volume table: a sector, or with version 6 the alignment of metadata.
    let alignment: UInt64

    init(_ bytes: UnsafeRawBufferPointer) throws(BlockError) {
        major = bytes.littleEndian(4)
        diskID = VMFSDiskID(bytes, at: 0x0C)
        sectorSize = bytes.littleEndian(0x5A)
        let volumes: UInt32 = bytes.littleEndian(0x66)
        let extents: UInt32 = bytes.littleEndian(0x6A)
        deviceUUID = VMFSUUID(bytes, at: 0x82)
        mapCount = max(bytes.littleEndian(0xBE), 1)
        nextRegion = bytes.littleEndian(0xC2)
        let aligned: UInt32 = bytes.littleEndian(0xCA)
        alignment = major >= 6 ? UInt64(aligned) : 512
        guard major >= 3, major <= 6 else {
            throw BlockError(.unsupported, "version \(major) is not known (3, 5 and 6 are)")
        }
        guard major < 6 || (4096...65536).contains(alignment) && alignment.nonzeroBitCount == 1 else {
            throw BlockError(.corrupt, "metadata aligned to \(alignment) bytes")
        }
        guard [512, 4096].contains(sectorSize) else { throw BlockError(.corrupt, "sectors of \(sectorSize) bytes") }
        volumeCount = Int(volumes)
        guard volumes <= (major >= 6 ? 1 : 512), mapCount <= Self.mapsMax else {
            throw BlockError(.corrupt, "\(volumes) volumes and \(mapCount) tables of extents")
        }
        extentCount = Int(extents)
        guard extentCount <= Self.regionsMax * Self.mapsMax * Self.extentsPerMap else {
            throw BlockError(.corrupt, "\(extents) physical extents")
        }
    }

    func members(on device: any BlockDevice) throws(BlockError) -> [VMFSMember] {
        var found: [VMFSMember] = []
        var names: [String] = []
        let entry = Buffer(count: LVMVolumeEntry.length)
        for index in 0..<volumeCount {
            let offset = Self.position + alignment + UInt64(index * LVMVolumeEntry.length)
            try device.read(into: entry.bytes, at: offset)
            if VMFSUUID(entry.readable, at: 0x54).isZero { continue }
            let volume = try LVMVolumeEntry(entry.readable)
            if names.isEmpty { names = try deviceNames(device) }
            let segments = try segments(of: volume, on: device)
            found.append(VMFSMember(device, self, volume, names: names, segments: segments))
        }
        return found
    }

    private func deviceNames(_ device: any BlockDevice) throws(BlockError) -> [String] {
        let table = Buffer(count: Self.devicesMax * 256)
        try device.read(into: table.bytes, at: 0x17_E000 + alignment)
        return (0..<Self.devicesMax).map { fieldText(table.readable, ($0 * 256)..<($0 * 256 + 256)) }
    }

    /// The extents of a volume on this LUN, joined where one continues the other.
    private func segments(of volume: LVMVolumeEntry, on device: any BlockDevice) throws(BlockError) -> [VMFSSegment] {
        var segments: [VMFSSegment] = []
        var left = extentCount
        var region = Self.position
        var maps = mapCount
        var next = nextRegion
        var regions = 1
        while left > 0 {
            for index in 0..<UInt64(maps) where left > 0 {
                let bitmapLength = max(alignment, 1024)
                let tableLength = UInt64(Self.extentsPerMap * Self.entryLength)
                // The header lies inside the LUN and everything else is less than 10 MiB, so nothing overflows.
                let table = region + 0x8_0000 + alignment + index * (bitmapLength + tableLength) + bitmapLength
                let count = min(left, Self.extentsPerMap)
                try readTable(at: table, count, volume, device, into: &segments)
                left -= count
            }
            if left == 0 { break }
            guard next > 0, next < device.info.size, regions < Self.regionsMax else {
                throw BlockError(.corrupt, "\(left) of its \(extentCount) physical extents are in no table")
            }
            regions += 1
            region = next
            let header = Buffer(count: 512)
            try device.read(into: header.bytes, at: region)
            maps = header.readable.littleEndian(4)
            next = header.readable.littleEndian(16)
            guard header.readable.littleEndian(0, as: UInt32.self) == Self.magic, maps > 0, maps <= Self.mapsMax else {
                throw BlockError(.corrupt, "the table of physical extents at \(region) has no header")
            }
        }
        return try joined(segments)
    }

    private func readTable(
        at table: UInt64, _ count: Int, _ volume: LVMVolumeEntry, _ device: any BlockDevice,
        into segments: inout [VMFSSegment]
    ) throws(BlockError) {
        let size = device.info.size
        let entries = Buffer(count: count * Self.entryLength)
        try device.read(into: entries.bytes, at: table)
        for index in 0..<count {
            let entry = UnsafeRawBufferPointer(
                rebasing: entries.readable[(index * Self.entryLength)..<((index + 1) * Self.entryLength)])
            guard entry[0] != 0, entry.littleEndian(5, as: UInt32.self) == volume.number else { continue }
            let segment = VMFSSegment(
                logical: entry.littleEndian(0x11), physical: entry.littleEndian(0x09),
                length: entry.littleEndian(0x19))
            let text = "physical extent \(index), \(segment.length) bytes at \(segment.physical),"
            guard segment.length > 0, (segment.logical | segment.physical | segment.length) & 511 == 0,
                segment.logical < 1 << 62, segment.length < 1 << 62
            else { throw BlockError(.corrupt, "\(text) cannot be right") }
            guard segment.physical < size, segment.length <= size - segment.physical else {
                throw BlockError(.corrupt, "\(text) lies past the end of the LUN, which has \(size) bytes")
            }
            if let last = segments.last, last.logical + last.length == segment.logical,
                last.physical + last.length == segment.physical
            {
                segments[segments.count - 1].length += segment.length
            } else {
                segments.append(segment)
            }
        }
    }

    private func joined(_ segments: [VMFSSegment]) throws(BlockError) -> [VMFSSegment] {
        var joined: [VMFSSegment] = []
        for segment in segments.sorted(by: { $0.logical < $1.logical }) {
            guard let last = joined.last else {
                joined.append(segment)
                continue
            }
            let end = last.logical + last.length
            guard end <= segment.logical else {
                throw BlockError(.corrupt, "two physical extents are both at \(segment.logical) of the volume")
            }
            if end == segment.logical, last.physical + last.length == segment.physical {
                joined[joined.count - 1].length += segment.length
            } else {
                joined.append(segment)
            }
        }
        return joined
    }
}
