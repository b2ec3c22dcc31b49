// An image that a merge reads or changes: only the profile that the writer makes, everything else is refused.
import Block

/// The header and L1 table of an image in the profile.
struct ProfileImage {
    let file: any ImageFile
    private(set) var header: Qcow2Header
    /// Bytes of the file when it was opened.
    let fileSize: UInt64
    /// The L1 table, all the entries it has room for.
    private(set) var l1: [UInt64]
    private(set) var l1Offset: UInt64
    let refcountTableOffset: UInt64
    let refcountTableClusters: UInt64

    /// Reads and checks an image.
    ///
    /// - Throws: `.unsupported` for an image outside the profile, saying what is different; `.corrupt` for one that
    ///   contradicts itself; or what reading throws.
    init(_ file: any ImageFile) throws(BlockError) {
        self.file = file
        fileSize = try file.size()
        let first = Buffer(count: Int(Qcow2Profile.clusterSize))
        try file.read(into: first.bytes, at: 0)
        let bytes = first.readable
        func refuse(_ what: String) -> BlockError {
            BlockError(
                .unsupported,
                "merging with \(file.name): \(what); only images like those that diskgate writes can be merged in "
                    + "place, others with qemu-img commit")
        }
        guard fileSize >= 112, bytes.bigEndian(0, as: UInt32.self) == Qcow2Header.magic,
            bytes.bigEndian(4, as: UInt32.self) == 3
        else { throw refuse("it is no qcow2 image of version 3") }
        guard bytes.bigEndian(20, as: UInt32.self) == UInt32(Qcow2Profile.clusterBits) else {
            throw refuse("its clusters do not have 64 KiB")
        }
        var parser = Qcow2HeaderParser(
            bytes: bytes, fileName: file.name, fileSize: fileSize,
            header: Qcow2Header(version: 3, clusterBits: Int(Qcow2Profile.clusterBits), size: 0))
        header = try parser.parse(allowCorrupt: false)
        if header.incompatible.contains(.dirty) {
            throw refuse("its reference counts may be stale; qemu-img check -r all repairs them")
        }
        if !header.incompatible.subtracting(.compressionType).isEmpty {
            throw refuse("it has subclusters or an external data file")
        }
        if header.refcountOrder != 4 { throw refuse("its reference counts do not have 16 bits") }
        if header.snapshotCount != 0 { throw refuse("it has internal snapshots") }
        if header.compatible != 0 || header.autoclear != 0 || header.bitmapExtension?.count ?? 0 != 0 {
            throw refuse("it has lazy reference counts, dirty bitmaps or features that are not known")
        }
        l1Offset = header.l1Offset
        refcountTableOffset = bytes.bigEndian(48)
        refcountTableClusters = UInt64(bytes.bigEndian(56, as: UInt32.self))
        l1 = []
        let count = Int(bytes.bigEndian(36, as: UInt32.self))
        if count > 0 {
            let table = try WordTable(file, at: l1Offset, count: count)
            l1 = (0..<count).map { table[$0] }
        }
        for (index, entry) in l1.enumerated() {
            let offset = entry & Qcow2Geometry.offsetMask
            if offset & Qcow2Profile.clusterMask != 0 || offset >= fileSize {
                throw corrupt("L1 entry \(index) points at \(offset), where no table can be")
            }
        }
    }

    func corrupt(_ what: String) -> BlockError {
        BlockError(.corrupt, "merging with \(file.name): \(what); qemu-img check tells whether it can be repaired")
    }

    /// The offset of the L2 table with a number; 0 where there is none.
    func table(_ index: Int) -> UInt64 { index < l1.count ? l1[index] & Qcow2Geometry.offsetMask : 0 }

    mutating func setTable(_ index: Int, _ offset: UInt64) { l1[index] = offset | Qcow2Geometry.copiedFlag }

    mutating func moveL1(to offset: UInt64, count: Int) {
        l1 += [UInt64](repeating: 0, count: count - l1.count)
        l1Offset = offset
    }

    /// Changes fields of the header in one step: its first sector is written whole or not at all. Durable on return.
    func changeHeader(_ change: (UnsafeMutableRawBufferPointer) -> Void) throws(BlockError) {
        let sector = Buffer(count: 512)
        try file.read(into: sector.bytes, at: 0)
        change(sector.bytes)
        try file.write(sector.readable, at: 0)
        try file.flush()
    }
}

/// Big-endian 64-bit words of an image's table, as they are in the file.
final class WordTable {
    let buffer: Buffer

    /// Words of zero.
    init(count: Int) {
        buffer = Buffer(count: count * 8)
        buffer.bytes.initializeMemory(as: UInt8.self, repeating: 0)
    }

    /// Reads at least one word.
    init(_ file: any ImageFile, at offset: UInt64, count: Int) throws(BlockError) {
        buffer = Buffer(count: count * 8)
        try file.read(into: buffer.bytes, at: offset)
    }

    var count: Int { buffer.bytes.count / 8 }

    subscript(_ index: Int) -> UInt64 {
        get { buffer.readable.bigEndian(index * 8) }
        set { buffer.bytes.storeBigEndian(newValue, at: index * 8) }
    }

    /// Writes a part of the words.
    func write(_ range: Range<Int>, to file: any ImageFile, at offset: UInt64) throws(BlockError) {
        let bytes = buffer.readable[(range.lowerBound * 8)..<(range.upperBound * 8)]
        try file.write(UnsafeRawBufferPointer(rebasing: bytes), at: offset + UInt64(range.lowerBound) * 8)
    }
}

/// What an L2 entry of an image in the profile says.
enum ProfileEntry: Equatable {
    case absent
    /// Zeros, perhaps with a cluster set aside.
    case zero(host: UInt64)
    /// A cluster; `isOwn` when nobody else uses it.
    case data(host: UInt64, isOwn: Bool)
    /// Compressed bytes, at most so many from there on.
    case compressed(host: UInt64, length: UInt64)

    /// - Returns: nil for an entry that contradicts the format or points outside the file.
    init?(_ entry: UInt64, fileSize: UInt64) {
        if entry & Qcow2Geometry.compressedFlag != 0 {
            let split = Qcow2Profile.compressedSplit
            let host = entry & ((1 << split) - 1)
            let sectors = (entry & (Qcow2Geometry.compressedFlag - 1)) >> split + 1
            guard host != 0, host < fileSize else { return nil }
            self = .compressed(host: host, length: sectors * 512 - (host & 511))
            return
        }
        let host = entry & Qcow2Geometry.offsetMask
        guard host & Qcow2Profile.clusterMask == 0, host == 0 || host < fileSize else { return nil }
        if entry & 1 != 0 {
            self = .zero(host: host)
        } else if host == 0 {
            self = .absent
        } else {
            self = .data(host: host, isOwn: entry & Qcow2Geometry.copiedFlag != 0)
        }
    }

    /// The clusters of the file that it refers to.
    var clusters: Range<UInt64> {
        switch self {
        case .absent: 0..<0
        case .zero(let host) where host == 0: 0..<0
        case .zero(let host), .data(let host, _):
            (host >> Qcow2Profile.clusterBits)..<((host >> Qcow2Profile.clusterBits) + 1)
        case .compressed(let host, let length):
            (host >> Qcow2Profile.clusterBits)..<Qcow2Profile.clusters(host + length)
        }
    }
}
