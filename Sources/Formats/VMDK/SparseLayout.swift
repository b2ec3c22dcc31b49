// Where the tables of a sparse file are: what its header comes to, whichever of the three kinds it is.
import Block

/// A sparse file's header, checked against the format and the file's size.
struct SparseLayout: Sendable {
    /// Sectors of the extent, as the header has them.
    var capacity: UInt64
    var geometry: GrainGeometry
    /// Where the grain directory is, in bytes.
    var directoryStart: UInt64
    /// Entries of the directory that the extent needs; it has at least so many.
    var directoryCount: Int
    /// seSparse: where grain tables begin, in bytes, and how many there is room for.
    var tablesStart: UInt64 = 0
    var tablesMax: UInt64 = 0
    /// Whether each compressed grain has its place on the disk and its length before it.
    var hasMarkers = false
    /// Hosted sparse: where the descriptor is in the file; nil where it has none.
    var descriptorRange: Range<UInt64>?
    /// What to tell people, for example that the file was not closed.
    var remark: String?

    /// Bytes of a directory entry in the file.
    var directoryEntryBytes: UInt64 { geometry.entries == .seSparse ? 8 : 4 }

    /// Reads the header of a sparse file.
    ///
    /// - Throws: `.invalid` when it has none, `.unsupported` for features that are not known, `.corrupt` when fields
    ///   contradict the format or the file's size, or what reading throws.
    static func read(from device: any BlockDevice) throws(BlockError) -> SparseLayout {
        switch try VMDKFileKind.of(device) {
        case .hostedSparse: return try HostedSparseHeader.read(from: device)
        case .cow: return try COWDHeader.read(from: device)
        case .seSparse: return try SESparseHeader.read(from: device)
        case .descriptor:
            throw VMDK.corrupt(device.info.name, "it is the descriptor of a disk where grains are expected")
        }
    }

    /// The directory entries that an extent needs.
    ///
    /// - Throws: `.corrupt` for an impossible capacity, or a directory that is too large.
    static func directoryCount(_ capacity: UInt64, _ geometry: GrainGeometry, _ file: String) throws(BlockError) -> Int
    {
        guard capacity > 0, capacity <= VMDK.sectorsMax else {
            throw VMDK.corrupt(file, "a capacity of \(capacity) sectors is impossible")
        }
        let bytes = capacity * VMDK.sectorBytes
        let count = (bytes - 1) >> geometry.tableShift + 1
        let entryBytes: UInt64 = geometry.entries == .seSparse ? 8 : 4
        guard count <= VMDK.directoryBytesMax / entryBytes else {
            throw VMDK.corrupt(file, "a grain directory of \(count) entries is too large (32 MiB at most)")
        }
        return Int(count)
    }

    /// The grain size, checked: a power of two of sectors, 16 MiB at most.
    static func checkGrain(_ sectors: UInt64, _ file: String) throws(BlockError) {
        guard sectors.nonzeroBitCount == 1, sectors <= 32768 else {
            throw VMDK.corrupt(file, "grains of \(sectors) sectors are not allowed (powers of two up to 32768 are)")
        }
    }

    /// The first bytes of a file.
    ///
    /// - Throws: `.corrupt` when it has not so many, or what reading throws.
    static func start(of device: any BlockDevice, count: Int) throws(BlockError) -> Buffer {
        let file = device.info
        guard file.size >= UInt64(count) else {
            throw VMDK.corrupt(file.name, "the file ends inside the header")
        }
        let buffer = Buffer(count: count)
        try device.read(into: buffer.bytes, at: 0)
        return buffer
    }
}
