// Takes a qcow2 header apart: fixed fields first, then the header extensions, then what they mean together.
import Block

/// Parses the first cluster of an image (or all of the file, where that is shorter).
struct Qcow2HeaderParser {
    let bytes: UnsafeRawBufferPointer
    let fileName: String
    let fileSize: UInt64
    var header: Qcow2Header
    private var headerLength = 72
    private var hasEncryptionExtension = false
    private var incompatibleNames: [Int: String] = [:]

    init(bytes: UnsafeRawBufferPointer, fileName: String, fileSize: UInt64, header: Qcow2Header) {
        self.bytes = bytes
        self.fileName = fileName
        self.fileSize = fileSize
        self.header = header
    }

    private func corrupt(_ what: String) -> BlockError { Qcow2Header.corrupt(fileName, what) }
    private func unsupported(_ what: String) -> BlockError {
        BlockError(.unsupported, "opening \(fileName) as qcow2: \(what)")
    }
    private func field32(_ offset: Int) -> UInt32 { bytes.bigEndian(offset) }
    private func field64(_ offset: Int) -> UInt64 { bytes.bigEndian(offset) }

    mutating func parse(allowCorrupt: Bool) throws(BlockError) -> Qcow2Header {
        header.size = field64(24)
        header.snapshotCount = field32(60)
        if header.version >= 3 { try parseVersion3() }
        try parseExtensions()
        try checkFeatures(allowCorrupt: allowCorrupt)
        try parseBackingName()
        try checkTables()
        return header
    }

    private mutating func parseVersion3() throws(BlockError) {
        guard bytes.count >= 104 else { throw corrupt("the file ends inside the header") }
        headerLength = Int(field32(100))
        guard headerLength >= 104, headerLength <= bytes.count else {
            throw corrupt("its header claims a length of \(headerLength) bytes")
        }
        header.incompatible = Qcow2Header.Incompatible(rawValue: field64(72))
        header.compatible = field64(80)
        header.autoclear = field64(88)
        header.refcountOrder = field32(96)
        guard header.refcountOrder <= 6 else {
            throw corrupt("reference counts of 2^\(header.refcountOrder) bits are not allowed (2^6 at most)")
        }
        let type = headerLength > 104 ? bytes[104] : 0
        let isMarked = header.incompatible.contains(.compressionType)
        guard (type != 0) == isMarked else {
            throw corrupt("compression type \(type) contradicts its feature bit")
        }
        guard let compression = Qcow2Header.Compression(rawValue: type) else {
            throw unsupported("compression type \(type) is not known (0, zlib, and 1, zstd, are)")
        }
        header.compression = compression
    }

    /// Extensions lie between the header and the backing file's name, or the end of the cluster.
    private mutating func parseExtensions() throws(BlockError) {
        let backingOffset = field64(8)
        let end = backingOffset == 0 ? bytes.count : Int(min(backingOffset, UInt64(bytes.count)))
        var position = headerLength
        while position <= end - 8 {
            let type = field32(position)
            let length = Int(field32(position + 4))
            position += 8
            if type == 0 { return }
            guard length <= end - position else {
                throw corrupt("header extension 0x\(String(type, radix: 16)) of \(length) bytes does not fit")
            }
            try parseExtension(type, UnsafeRawBufferPointer(rebasing: bytes[position..<(position + length)]))
            position += (length + 7) & ~7
        }
    }

    private mutating func parseExtension(_ type: UInt32, _ data: UnsafeRawBufferPointer) throws(BlockError) {
        switch type {
        case 0xE279_2ACA: header.backingFormat = try text(data, "the backing file's format")
        case 0x4441_5441: header.dataFileName = try text(data, "the external data file's name")
        case 0x0537_BE77: hasEncryptionExtension = true
        case 0x6803_F857:
            for entry in 0..<(data.count / 48) where data[entry * 48] == 0 {
                let name = data[(entry * 48 + 2)..<(entry * 48 + 48)].prefix { $0 != 0 }
                incompatibleNames[Int(data[entry * 48 + 1])] = String(decoding: name, as: UTF8.self)
            }
        case 0x2385_2875:
            guard data.count >= 24 else { throw corrupt("its dirty bitmap extension is too short") }
            header.bitmapExtension = Qcow2Header.BitmapExtension(
                count: data.bigEndian(0), directorySize: data.bigEndian(8), directoryOffset: data.bigEndian(16))
        default: break  // Unknown extensions are for others.
        }
    }

    private func text(_ data: UnsafeRawBufferPointer, _ what: String) throws(BlockError) -> String {
        guard data.count <= 1023, !data.contains(0), let text = String(validating: data, as: UTF8.self) else {
            throw unsupported("\(what) is no text of at most 1023 bytes in UTF-8")
        }
        return text
    }

    private func checkFeatures(allowCorrupt: Bool) throws(BlockError) {
        let unknown = header.incompatible.subtracting(.known).rawValue
        if unknown != 0 {
            let bits = (0..<64).filter { unknown & (1 << UInt64($0)) != 0 }.map { bit in
                incompatibleNames[bit].map { "\(bit) (\($0))" } ?? "\(bit)"
            }
            let list = bits.joined(separator: ", ")
            throw unsupported("it uses incompatible features that are not known here: bit \(list)")
        }
        if field32(32) != 0 || hasEncryptionExtension {
            throw unsupported("it is encrypted, which is not supported; decrypt a copy with qemu-img convert")
        }
        if header.incompatible.contains(.corrupt), !allowCorrupt {
            throw BlockError(
                .corrupt,
                "opening \(fileName) as qcow2: the image is marked corrupt; repair it with qemu-img check -r all, or "
                    + "allow it to be read as it is, wrong data possible")
        }
        if header.hasSubclusters, header.clusterBits < 14 {
            throw corrupt("clusters of \(header.clusterSize) bytes are too small for subclusters (16384 at least)")
        }
        if header.hasDataFile, header.dataFileName?.isEmpty ?? true {
            throw unsupported("its data is in another file that it does not name")
        }
    }

    private mutating func parseBackingName() throws(BlockError) {
        let offset = field64(8)
        let length = UInt64(field32(16))
        if offset == 0 || length == 0 { return }
        guard length <= 1023, offset <= header.clusterSize, length <= header.clusterSize - offset,
            offset + length <= UInt64(bytes.count)
        else {
            throw corrupt("the backing file's name, \(length) bytes at \(offset), does not lie in the first cluster")
        }
        let name = UnsafeRawBufferPointer(rebasing: bytes[Int(offset)..<Int(offset + length)])
        header.backingName = try text(name, "the backing file's name")
    }

    private mutating func checkTables() throws(BlockError) {
        guard header.size <= UInt64(Int64.max) else {
            throw corrupt("a disk of \(header.size) bytes is too large (2^63-1 at most)")
        }
        // One L1 entry maps a table of L2 entries, each of which maps a cluster.
        let reach = UInt64(header.l2EntryBits + header.clusterBits)
        let needed = (header.size >> reach) + (header.size & ((1 << reach) - 1) == 0 ? 0 : 1)
        let claimed = UInt64(field32(36))
        guard claimed * 8 <= Qcow2Header.l1BytesMax else {
            throw corrupt("an L1 table of \(claimed) entries is too large (32 MiB at most)")
        }
        guard needed <= claimed else {
            throw corrupt("its L1 table has \(claimed) entries, too few for \(header.size) bytes")
        }
        header.l1Offset = field64(40)
        header.l1Count = Int(needed)
        try checkTable("L1 table", offset: header.l1Offset, bytes: claimed * 8)
        let refcountBytes = UInt64(field32(56)) * header.clusterSize
        guard refcountBytes > 0, refcountBytes <= Qcow2Header.refcountTableBytesMax else {
            throw corrupt("a refcount table of \(refcountBytes) bytes is not allowed")
        }
        try checkTable("refcount table", offset: field64(48), bytes: refcountBytes)
        guard header.snapshotCount <= Qcow2Header.snapshotCountMax else {
            throw corrupt("\(header.snapshotCount) internal snapshots are too many (65536 at most)")
        }
        if header.snapshotCount > 0 { try checkTable("snapshot table", offset: field64(64), bytes: 40) }
    }

    private func checkTable(_ what: String, offset: UInt64, bytes: UInt64) throws(BlockError) {
        if bytes == 0 { return }
        guard offset & (header.clusterSize - 1) == 0, offset != 0 else {
            throw corrupt("its \(what) at \(offset) does not start on a cluster of its own")
        }
        guard offset <= fileSize, bytes <= fileSize - offset else {
            throw corrupt("its \(what), \(bytes) bytes at \(offset), lies outside the \(fileSize) bytes of the file")
        }
    }
}
