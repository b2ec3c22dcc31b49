// The first cluster of a qcow2 image: every field read, checked against the format and the file's size.
public import Block

/// A qcow2 header whose fields are known to make sense: opening an image goes on from here.
public struct Qcow2Header: Sendable {
    /// "QFI" and 0xFB, big-endian.
    static let magic: UInt32 = 0x5146_49FB
    /// The most bytes an L1 table may have: qemu's limit, too. At 64 KiB clusters this maps 2 PiB.
    static let l1BytesMax: UInt64 = 32 << 20
    /// The most bytes a refcount table may have: qemu's limit.
    static let refcountTableBytesMax: UInt64 = 8 << 20
    /// The most internal snapshots: qemu's limit.
    static let snapshotCountMax: UInt32 = 65536

    /// Features a reader must know, or refuse the image.
    public struct Incompatible: OptionSet, Sendable {
        /// The bits as they stand in the header.
        public let rawValue: UInt64
        /// Features from bits.
        public init(rawValue: UInt64) { self.rawValue = rawValue }
        /// Reference counts may be stale; of no importance to readers.
        public static let dirty = Incompatible(rawValue: 1)
        /// Somebody found the image's metadata to be wrong.
        public static let corrupt = Incompatible(rawValue: 2)
        /// Data clusters live in another file.
        public static let dataFile = Incompatible(rawValue: 4)
        /// The compression type is not zlib.
        public static let compressionType = Incompatible(rawValue: 8)
        /// L2 entries have 16 bytes and say which 32nds of a cluster are allocated.
        public static let extendedL2 = Incompatible(rawValue: 16)
        static let known: Incompatible = [.dirty, .corrupt, .dataFile, .compressionType, .extendedL2]
    }

    /// How compressed clusters are compressed.
    public enum Compression: UInt8, Sendable {
        /// Raw deflate.
        case zlib = 0
        /// One zstd frame per cluster.
        case zstd = 1
    }

    /// 2 or 3.
    public internal(set) var version: UInt32
    /// log2 of the cluster size in bytes: 9 to 21.
    public internal(set) var clusterBits: Int
    /// Bytes on the disk, at most 2^63-1.
    public internal(set) var size: UInt64
    /// The name of the backing file as the image has it.
    public internal(set) var backingName: String?
    /// The format of the backing file as the image names it; nil when it does not say.
    public internal(set) var backingFormat: String?
    /// The name of the external data file as the image has it.
    public internal(set) var dataFileName: String?
    /// Features that readers must know.
    public internal(set) var incompatible: Incompatible = []
    /// Features that readers may ignore.
    public internal(set) var compatible: UInt64 = 0
    /// Features that a writer who does not know them switches off.
    public internal(set) var autoclear: UInt64 = 0
    /// How compressed clusters are compressed.
    public internal(set) var compression: Compression = .zlib
    /// Internal snapshots in the image, which are not looked at.
    public internal(set) var snapshotCount: UInt32 = 0
    /// log2 of the bits of one reference count.
    public internal(set) var refcountOrder: UInt32 = 4
    /// The host offset of the L1 table, a multiple of the cluster size.
    var l1Offset: UInt64 = 0
    /// Entries of the L1 table that the disk's size needs; the table has at least so many.
    var l1Count: Int = 0
    var bitmapExtension: BitmapExtension?

    /// Where the directory of dirty bitmaps is; not checked yet.
    struct BitmapExtension: Sendable {
        var count: UInt32
        var directorySize: UInt64
        var directoryOffset: UInt64
    }

    /// Bytes in a cluster.
    public var clusterSize: UInt64 { 1 << UInt64(clusterBits) }
    /// Whether L2 entries describe 32 subclusters each.
    public var hasSubclusters: Bool { incompatible.contains(.extendedL2) }
    /// Whether data clusters live in another file.
    public var hasDataFile: Bool { incompatible.contains(.dataFile) }
    /// Whether the external data file is a raw image of the disk by itself.
    public var isDataFileRaw: Bool { hasDataFile && autoclear & 2 != 0 }
    /// Whether the image vouches for its dirty bitmaps (autoclear bit 0).
    var bitmapsAreValid: Bool { autoclear & 1 != 0 }
    /// log2 of the L2 entries in a table.
    var l2EntryBits: Int { clusterBits - (hasSubclusters ? 4 : 3) }

    /// Reads and checks the header of an image.
    ///
    /// - Parameter allowCorrupt: whether to accept an image that is marked corrupt.
    /// - Throws: `.invalid` when the device holds no qcow2 image, `.unsupported` for features that are not known or not
    ///   offered (encryption), `.corrupt` when fields contradict the format or each other, or what reading throws.
    public static func read(from device: any BlockDevice, allowCorrupt: Bool = false) throws(BlockError) -> Qcow2Header
    {
        let file = device.info
        let start = Buffer(count: 72)
        guard file.size >= 72 else {
            throw BlockError(.invalid, "opening \(file.name) as qcow2: with \(file.size) bytes it is too short for one")
        }
        try device.read(into: start.bytes, at: 0)
        guard start.readable.bigEndian(0, as: UInt32.self) == magic else {
            throw BlockError(
                .invalid, "opening \(file.name) as qcow2: it does not begin like one (use format=raw for a raw disk)")
        }
        let version = start.readable.bigEndian(4, as: UInt32.self)
        guard version == 2 || version == 3 else {
            throw BlockError(.unsupported, "opening \(file.name) as qcow2: version \(version) is not 2 or 3")
        }
        let clusterBits = start.readable.bigEndian(20, as: UInt32.self)
        guard clusterBits >= 9, clusterBits <= 21 else {
            throw corrupt(file.name, "clusters of 2^\(clusterBits) bytes are not allowed (2^9 to 2^21 are)")
        }
        let first = Buffer(count: Int(min(1 << UInt64(clusterBits), file.size)))
        try device.read(into: first.bytes, at: 0)
        var parser = Qcow2HeaderParser(
            bytes: first.readable, fileName: file.name, fileSize: file.size,
            header: Qcow2Header(version: version, clusterBits: Int(clusterBits), size: 0))
        return try parser.parse(allowCorrupt: allowCorrupt)
    }

    static func corrupt(_ name: String, _ what: String) -> BlockError {
        BlockError(
            .corrupt, "opening \(name) as qcow2: \(what); qemu-img check tells whether the image can be repaired")
    }
}
