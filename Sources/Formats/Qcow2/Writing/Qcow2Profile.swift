// The one kind of qcow2 image that is written, and changed by merges; and the bytes of its header.
import Block

/// The numbers of the profile: version 3, clusters of 64 KiB, reference counts of 16 bits.
enum Qcow2Profile {
    static let clusterBits: UInt64 = 16
    static let clusterSize: UInt64 = 1 << clusterBits
    static let clusterMask: UInt64 = clusterSize - 1
    /// L2 entries in a table, and 64-bit words in a cluster.
    static let tableEntries: UInt64 = clusterSize / 8
    /// log2 of the disk bytes that one L2 table maps: 512 MiB.
    static let tableShift: UInt64 = clusterBits + 13
    /// Clusters of the file that a refcount block counts: 2 GiB of it.
    static let countsPerBlock: UInt64 = clusterSize / 2
    /// The bit where the sector count of a compressed cluster's entry starts: 62 - (cluster bits - 8).
    static let compressedSplit: UInt64 = 62 - (clusterBits - 8)
    /// The most bytes of a compressed cluster: one that shrinks less is not worth decompressing for.
    static let payloadMax = Int(clusterSize) / 8 * 7

    /// Clusters that a disk of some bytes has.
    static func clusters(_ bytes: UInt64) -> UInt64 {
        (bytes >> clusterBits) + (bytes & clusterMask == 0 ? 0 : 1)
    }

    /// L2 tables that a disk of some bytes needs.
    static func tables(_ bytes: UInt64) -> UInt64 {
        (bytes >> tableShift) + (bytes & ((1 << tableShift) - 1) == 0 ? 0 : 1)
    }

    /// The L2 entry of a compressed cluster: where its bytes start, and how many sectors they touch besides the first.
    static func compressedEntry(host: UInt64, length: Int) -> UInt64 {
        let further = (host + UInt64(length) - 1) / 512 - host / 512
        return Qcow2Geometry.compressedFlag | further << compressedSplit | host
    }
}

/// What the header of an image in the profile says.
struct Qcow2HeaderFields {
    var size: UInt64
    var backing: Qcow2Backing?
    var isZstd: Bool
    var l1Offset: UInt64
    var l1Count: UInt64
    var refcountTableOffset: UInt64
    var refcountTableClusters: UInt64

    /// The header's cluster: fixed fields, the backing format, the end of the extensions, the backing name.
    var cluster: [UInt8] {
        let name = Array((backing?.name ?? "").utf8)
        let format = Array((backing?.format.rawValue ?? "").utf8)
        let extensionBytes = backing == nil ? 0 : 8 + (format.count + 7) & ~7
        let nameOffset = 112 + extensionBytes + 8
        var bytes: [UInt8] = []
        bytes.reserveCapacity(Int(Qcow2Profile.clusterSize))
        bytes.appendBigEndian(Qcow2Header.magic)
        bytes.appendBigEndian(UInt32(3))
        bytes.appendBigEndian(UInt64(backing == nil ? 0 : nameOffset))
        bytes.appendBigEndian(UInt32(name.count))
        bytes.appendBigEndian(UInt32(Qcow2Profile.clusterBits))
        bytes.appendBigEndian(size)
        bytes.appendBigEndian(UInt32(0))  // not encrypted
        bytes.appendBigEndian(UInt32(truncatingIfNeeded: l1Count))
        bytes.appendBigEndian(l1Offset)
        bytes.appendBigEndian(refcountTableOffset)
        bytes.appendBigEndian(UInt32(truncatingIfNeeded: refcountTableClusters))
        bytes.appendBigEndian(UInt32(0))  // internal snapshots
        bytes.appendBigEndian(UInt64(0))
        bytes.appendBigEndian(isZstd ? Qcow2Header.Incompatible.compressionType.rawValue : 0)
        bytes.appendBigEndian(UInt64(0))  // compatible features
        bytes.appendBigEndian(UInt64(0))  // autoclear features
        bytes.appendBigEndian(UInt32(4))  // reference counts of 2^4 bits
        bytes.appendBigEndian(UInt32(112))  // the length of the fixed fields
        bytes += [isZstd ? Qcow2Header.Compression.zstd.rawValue : 0, 0, 0, 0, 0, 0, 0, 0]
        if backing != nil {
            bytes.appendBigEndian(UInt32(0xE279_2ACA))
            bytes.appendBigEndian(UInt32(format.count))
            bytes += format
            while bytes.count & 7 != 0 { bytes.append(0) }
        }
        bytes.appendBigEndian(UInt64(0))
        bytes += name
        bytes += [UInt8](repeating: 0, count: Int(Qcow2Profile.clusterSize) - bytes.count)
        return bytes
    }
}
