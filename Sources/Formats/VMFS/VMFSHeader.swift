// The file system's header, and the sizes and places that follow from it.
import Block

/// The header of a VMFS file system, 2 MiB into its volume.
struct VMFSHeader: Sendable {
    /// Where it lies on the volume.
    static let position: UInt64 = 0x20_0000
    /// The magic numbers of VMFS and of VMFS-L, which ESXi uses on its own boot disks.
    static let magics: Set<UInt32> = [0x2FAB_F15E, 0x2FAB_F15F]

    let major: UInt32
    let minor: UInt8
    let isLocal: Bool
    let uuid: VMFSUUID
    let label: String
    let createdSeconds: UInt32
    let volumeUUID: VMFSUUID
    let snapshotID: UInt32
    let geometry: VMFSGeometry

    /// Reads the header of a volume.
    ///
    /// - Throws: `.corrupt` when there is none or it cannot be right, `.unsupported` for an unknown version.
    init(of volume: VMFSSpan) throws(BlockError) {
        let name = volume.info.name
        guard volume.info.size >= Self.position + 4096 else {
            throw BlockError(.corrupt, "opening \(name): a volume of \(volume.info.size) bytes has no file system")
        }
        let buffer = Buffer(count: 4096)
        try volume.read(into: buffer.bytes, at: Self.position)
        let bytes = buffer.readable
        let magic: UInt32 = bytes.littleEndian(0)
        guard Self.magics.contains(magic) else {
            throw BlockError(.corrupt, "opening \(name): there is no VMFS file system on it")
        }
        isLocal = magic == 0x2FAB_F15F
        major = bytes.littleEndian(4)
        minor = bytes[8]
        uuid = VMFSUUID(bytes, at: 9)
        label = fieldText(bytes, 0x1D..<0x9D)
        createdSeconds = bytes.littleEndian(0xA9)
        volumeUUID = VMFSUUID(bytes, at: 0xB1)
        snapshotID = bytes.littleEndian(0xC1)
        do throws(BlockError) {
            geometry = try VMFSGeometry(bytes, volumeSize: volume.info.size)
        } catch { throw error.during("reading the file system's header of \(name)") }
    }

    /// As people know it: "VMFS 6.82", "VMFS-L 5.81". File systems count their versions differently.
    var versionText: String {
        let generation = major >= 24 ? 6 : major >= 14 ? 5 : 3
        return "\(isLocal ? "VMFS-L" : "VMFS") \(generation).\(minor)"
    }
}

/// Sizes and places of everything that is not data. VMFS 3 and 5 have addresses of 32 bits, VMFS 6 of 64.
struct VMFSGeometry: Sendable {
    let isVMFS6: Bool
    let volumeSize: UInt64
    /// Bytes in a file block, a power of two.
    let blockSize: UInt64
    let blockShift: UInt64
    /// Bytes in a sub-block.
    let subBlockSize: UInt64
    /// Whether sub-blocks have two more bits for their item (VMFS 5 as it is formatted, not upgraded).
    let isDense: Bool
    /// What metadata is aligned to: a lock block has this many bytes.
    let alignment: UInt64
    /// Bytes in a large file block are 1 << this.
    let largeShift: UInt64
    /// File blocks in a cluster (VMFS 6).
    let blocksPerCluster: UInt64
    /// To so many bytes the bits that say "to be zeroed" apply.
    let zeroGranularity: UInt64
    /// Where the first file descriptor of the first cluster lies on the volume.
    let firstDescriptor: UInt64
    /// Where the descriptor of .pb2.sf lies on the volume; 0 where there is none.
    let secondPointerDescriptor: UInt64

    // File descriptors. Byte offsets are from their start.

    var descriptorSize: Int { isVMFS6 ? 2 * Int(alignment) : 2048 }
    /// Where the metadata begins behind the lock block.
    var metadataOffset: Int { Int(alignment) }
    var addressCount: Int { isVMFS6 ? (alignment <= 4096 ? 320 : Int(alignment) >> 4) : 256 }
    var addressSize: Int { isVMFS6 ? 8 : 4 }
    var addressOffset: Int {
        descriptorSize - (isVMFS6 && alignment > 4096 ? Int(alignment) >> 1 : addressCount * addressSize)
    }
    var residentOffset: Int { isVMFS6 ? Int(alignment) + 512 : 1024 }
    var residentSize: Int { descriptorSize - residentOffset }

    // Pointer blocks.

    /// Addresses in a pointer block are 1 << this.
    var pointersShift: UInt64 { isVMFS6 ? 13 : 10 }
    var pointerBlockSize: Int { addressSize << Int(pointersShift) }

    /// Bytes of lock and metadata for each cluster of a resource file.
    var clusterHeaderSize: UInt64 { isVMFS6 ? 2 * alignment : 1024 }

    init(_ bytes: UnsafeRawBufferPointer, volumeSize: UInt64) throws(BlockError) {
        let major: UInt32 = bytes.littleEndian(4)
        guard (3...63).contains(major) else {
            throw BlockError(.unsupported, "version \(major) of the file system is not known")
        }
        self.volumeSize = volumeSize
        isVMFS6 = major >= 24
        blockSize = bytes.littleEndian(0xA1)
        subBlockSize = UInt64(bytes.littleEndian(0xD9, as: UInt32.self))
        guard blockSize.nonzeroBitCount == 1, (65536...(8 << 20)).contains(blockSize) else {
            throw BlockError(.corrupt, "file blocks of \(blockSize) bytes")
        }
        guard subBlockSize.nonzeroBitCount == 1, (1024...(1 << 20)).contains(subBlockSize) else {
            throw BlockError(.corrupt, "sub-blocks of \(subBlockSize) bytes")
        }
        blockShift = UInt64(blockSize.trailingZeroBitCount)
        let config: UInt32 = bytes.littleEndian(0x19)
        isDense = config & 4 != 0
        let aligned: UInt32 = bytes.littleEndian(0x134)
        alignment = isVMFS6 ? UInt64(aligned) : 512
        guard !isVMFS6 || alignment.nonzeroBitCount == 1 && (4096...65536).contains(alignment) else {
            throw BlockError(.corrupt, "metadata aligned to \(aligned) bytes")
        }
        let larger: UInt16 = bytes.littleEndian(0x138)
        guard larger <= 20 else { throw BlockError(.corrupt, "large file blocks of 2^\(larger) file blocks") }
        largeShift = blockShift + UInt64(larger)
        blocksPerCluster = min(0x2000, max((512 << 20) / blockSize, 1))
        zeroGranularity = isVMFS6 ? UInt64(bytes.littleEndian(0x144, as: UInt32.self)) : blockSize
        let groupOffset: UInt32 = bytes.littleEndian(0xD1)
        let clustersPerGroup: UInt32 = bytes.littleEndian(0xD5)
        guard clustersPerGroup > 0, clustersPerGroup <= 65536 else {
            throw BlockError(.corrupt, "\(clustersPerGroup) clusters in a group of file descriptors")
        }
        // Behind the header, 1 MiB of nothing and the heartbeats.
        let heartbeats = ((alignment << 10) + 0x3F_FFFF) & ~0xF_FFFF
        let base = isVMFS6 ? heartbeats : blockSize <= 4 << 20 ? 4 << 20 : blockSize
        // Both fields have 32 bits, so nothing overflows.
        let headers = UInt64(clustersPerGroup) * (isVMFS6 ? 2 * alignment : 1024)
        firstDescriptor = base + UInt64(groupOffset) + headers
        let second: UInt64 = bytes.littleEndian(0xE1)
        secondPointerDescriptor = major >= 14 && second < volumeSize ? second : 0
        guard firstDescriptor < volumeSize, 64 << 10 <= volumeSize - firstDescriptor else {
            throw BlockError(.corrupt, "its file descriptors lie past its end")
        }
    }
}
