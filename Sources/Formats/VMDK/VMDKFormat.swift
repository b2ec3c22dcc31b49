// What all kinds of VMDK share: sectors, the magic numbers at the start of their files, and the words of their errors.
import Block

/// How a VMDK is opened.
public struct VMDKOptions: Sendable {
    /// Whether a physical raw device mapping may be opened. No snapshot of a machine covers one: while the machine
    /// runs, what is read of it is of no one moment.
    public var allowsPhysicalMapping = false
    /// Memory for grain tables in bytes, for all sparse files of a chain together; 16 MiB map 128 GiB with grains of
    /// 64 KiB, 1 GiB with grains of 512 bytes.
    public var cacheBytes = 16 << 20
    /// The most memory for the grain directories of a chain, in bytes, and for its compressed extents.
    var metadataBytesMax: UInt64 = 256 << 20

    /// No physical mappings, 16 MiB of tables.
    public init() {}
}

/// Numbers and errors of the format.
enum VMDK {
    /// Bytes in the unit of all offsets and sizes.
    static let sectorBytes: UInt64 = 512
    /// The most sectors of a disk: 2^63-1 bytes.
    static let sectorsMax: UInt64 = UInt64(Int64.max) / 512
    /// The most bytes of a grain directory: maps 256 TiB of hosted sparse files, 64 TiB of seSparse ones.
    static let directoryBytesMax: UInt64 = 32 << 20

    /// "KDMV", hosted sparse files, little-endian.
    static let hostedMagic: UInt32 = 0x564D_444B
    /// "COWD", sparse files of VMFS 3 and 5.
    static let cowMagic: UInt32 = 0x4457_4F43
    /// The constant header of sparse files of VMFS 6.
    static let seSparseMagic: UInt64 = 0xCAFE_BABE
    /// The volatile header of these.
    static let seSparseVolatileMagic: UInt64 = 0xCAFE_CAFE

    /// Fields contradict the format or each other.
    static func corrupt(_ file: String, _ what: String) -> BlockError {
        BlockError(.corrupt, "opening \(file) as VMDK: \(what)")
    }

    /// A feature that is not known or not offered.
    static func unsupported(_ file: String, _ what: String) -> BlockError {
        BlockError(.unsupported, "opening \(file) as VMDK: \(what)")
    }

    /// Whether bytes are so many sectors from a sector on, in a file of a size.
    static func contains(_ fileSize: UInt64, sector: UInt64, bytes: UInt64) -> Bool {
        sector <= fileSize / sectorBytes && bytes <= fileSize - sector * sectorBytes
    }
}

/// What the first bytes of a VMDK's file say it is.
enum VMDKFileKind {
    case descriptor, hostedSparse, cow, seSparse

    /// The first line of every descriptor.
    static let firstLine = "# disk descriptorfile"

    /// The kind, or nil when it is none of them.
    ///
    /// - Parameter start: the first bytes of a file, at least 32 where it has so many.
    init?(_ start: UnsafeRawBufferPointer) {
        if start.count >= 8, start.littleEndian(0, as: UInt64.self) == VMDK.seSparseMagic {
            self = .seSparse
        } else if start.count >= 4, start.littleEndian(0, as: UInt32.self) == VMDK.hostedMagic {
            self = .hostedSparse
        } else if start.count >= 4, start.littleEndian(0, as: UInt32.self) == VMDK.cowMagic {
            self = .cow
        } else if start.count >= Self.firstLine.utf8.count,
            zip(start, Self.firstLine.utf8).allSatisfy({ $0 == $1 || ($0 &+ 32 == $1 && (65...90).contains($0)) })
        {
            self = .descriptor
        } else {
            return nil
        }
    }

    /// The kind of a file.
    ///
    /// - Throws: `.invalid` when it is none, or what reading it throws.
    static func of(_ device: any BlockDevice) throws(BlockError) -> VMDKFileKind {
        let file = device.info
        let count = Int(min(512, file.size))
        if count > 0 {
            let start = Buffer(count: count)
            try device.read(into: start.bytes, at: 0)
            if let kind = VMDKFileKind(start.readable) { return kind }
        }
        throw BlockError(
            .invalid, "opening \(file.name) as VMDK: it does not begin like one (use format=raw for a raw disk)")
    }
}
