// What L2 entries mean: turns one slice of an L2 table into runs of clusters that live alike.
import Block

/// How the bytes of a run of clusters are kept.
enum ClusterKind: UInt8 {
    /// Not in this image: in its backing file, or zeros.
    case unallocated
    /// Zeros without a cluster.
    case zeroPlain
    /// Zeros, with a cluster set aside.
    case zeroAllocated
    /// As they are, in the file that holds data.
    case data
    /// Compressed.
    case compressed
    /// Nowhere: the entry contradicts the format. The run's host field has an `EntryFault`.
    case corrupt
}

/// What can be wrong with an L2 entry.
enum EntryFault: UInt64 {
    case unaligned, zeroInVersion2, compressedInDataFile, subclusterBits, dataFileMismatch, pastEnd

    var text: String {
        switch self {
        case .unaligned: "its cluster does not start at a multiple of the cluster size"
        case .zeroInVersion2: "it is a zero cluster, which images of version 2 do not have"
        case .compressedInDataFile: "it is compressed, which images with an external data file cannot have"
        case .subclusterBits: "its subcluster bits contradict each other"
        case .dataFileMismatch: "it does not lie where a raw data file has it"
        case .pastEnd: "its cluster lies past the end of the file"
        }
    }
}

/// Guest bytes that are kept alike and in one piece.
struct ClusterRun: BitwiseCopyable {
    var kind: ClusterKind
    /// `.data`: the offset of the first byte in the file that holds data. `.compressed`: the L2 entry without its two
    /// flags. `.corrupt`: an `EntryFault`.
    var host: UInt64
    /// Bytes, at least 1.
    var length: UInt64
}

/// The numbers that L2 entries are read with; constant for an image.
struct Qcow2Geometry: BitwiseCopyable {
    static let compressedFlag: UInt64 = 1 << 62
    static let copiedFlag: UInt64 = 1 << 63
    /// Bits 9 to 55 of L1 and L2 entries: an offset.
    static let offsetMask: UInt64 = 0x00FF_FFFF_FFFF_FE00

    let clusterBits: UInt64
    let clusterMask: UInt64
    /// log2 of the 64-bit words of an L2 entry: 0, or 1 with subclusters.
    let entryShift: UInt64
    /// log2 of the guest bytes that a slice of L2 entries maps.
    let sliceShift: UInt64
    /// log2 of the guest bytes that an L2 table maps.
    let tableShift: UInt64
    /// L2 entries in a slice.
    let sliceEntries: UInt64
    let isVersion2: Bool
    let hasDataFile: Bool
    let isDataFileRaw: Bool

    /// Bytes of a slice of an L2 table: 4096, or a whole table where that is smaller.
    var sliceBytes: Int { Int(sliceEntries) << (3 + Int(entryShift)) }

    init(_ header: Qcow2Header) {
        clusterBits = UInt64(header.clusterBits)
        clusterMask = header.clusterSize - 1
        entryShift = header.hasSubclusters ? 1 : 0
        let sliceBits = UInt64(min(header.clusterBits, 12)) - 3 - entryShift
        sliceEntries = 1 << sliceBits
        sliceShift = sliceBits + clusterBits
        tableShift = UInt64(header.l2EntryBits) + clusterBits
        isVersion2 = header.version < 3
        hasDataFile = header.hasDataFile
        isDataFileRaw = header.isDataFileRaw
    }

    /// The run that starts at a guest offset, up to `limit` or the end of the slice, whichever comes first.
    ///
    /// - Parameters:
    ///   - words: the slice that maps the offset, in host byte order.
    ///   - limit: greater than `position`.
    @inline(__always)
    func run(_ words: UnsafePointer<UInt64>, at position: UInt64, limit: UInt64) -> ClusterRun {
        var index = (position >> clusterBits) & (sliceEntries - 1)
        var run = piece(words, index, at: position)
        // Whole clusters of the same kind that continue this one are one run.
        while position &+ run.length < limit {
            index &+= 1
            let start = position &+ run.length
            if index == sliceEntries || start & clusterMask != 0 { break }
            let next = piece(words, index, at: start)
            guard next.kind == run.kind else { break }
            switch run.kind {
            case .data: if next.host != run.host &+ run.length { return run }
            case .corrupt: return run
            default: break
            }
            run.length &+= next.length
        }
        run.length = min(run.length, limit &- position)
        return run
    }

    /// The part of one cluster that starts at a guest offset and is kept alike.
    @inline(__always)
    private func piece(_ words: UnsafePointer<UInt64>, _ index: UInt64, at position: UInt64) -> ClusterRun {
        let entry = words[Int(truncatingIfNeeded: index << entryShift)]
        let inside = position & clusterMask
        let rest = clusterMask &+ 1 &- inside
        if entry & Self.compressedFlag != 0 {
            if hasDataFile { return fault(.compressedInDataFile, rest) }
            return ClusterRun(kind: .compressed, host: entry & (Self.compressedFlag &- 1), length: rest)
        }
        let host = entry & Self.offsetMask
        if entryShift != 0 {
            let bitmap = words[Int(truncatingIfNeeded: index << 1 | 1)]
            return subclusters(entry, bitmap, at: position)
        }
        if entry & 1 != 0 {
            if isVersion2 { return fault(.zeroInVersion2, rest) }
            if host & clusterMask != 0 { return fault(.unaligned, rest) }
            return ClusterRun(kind: host == 0 ? .zeroPlain : .zeroAllocated, host: host &+ inside, length: rest)
        }
        if isUnallocated(entry) { return ClusterRun(kind: .unallocated, host: 0, length: rest) }
        return data(host &+ inside, at: position, length: rest)
    }

    /// Offset 0 holds the header, except in a data file, where the flag tells whether it is allocated.
    @inline(__always)
    private func isUnallocated(_ entry: UInt64) -> Bool {
        entry & Self.offsetMask == 0 && !(hasDataFile && entry & Self.copiedFlag != 0)
    }

    @inline(__always)
    private func data(_ host: UInt64, at position: UInt64, length: UInt64) -> ClusterRun {
        if (host ^ position) & clusterMask != 0 { return fault(.unaligned, length) }
        if isDataFileRaw && host != position { return fault(.dataFileMismatch, length) }
        return ClusterRun(kind: .data, host: host, length: length)
    }

    private func fault(_ fault: EntryFault, _ length: UInt64) -> ClusterRun {
        ClusterRun(kind: .corrupt, host: fault.rawValue, length: length)
    }

    /// A cluster of 32 subclusters: bits 0 to 31 of the bitmap say allocated, 32 to 63 zeros.
    private func subclusters(_ entry: UInt64, _ bitmap: UInt64, at position: UInt64) -> ClusterRun {
        let inside = position & clusterMask
        let subBits = clusterBits &- 5
        let sub = UInt32(truncatingIfNeeded: inside >> subBits)
        let allocated = UInt32(truncatingIfNeeded: bitmap)
        let zero = UInt32(truncatingIfNeeded: bitmap >> 32)
        let hasCluster = !isUnallocated(entry)
        if allocated & zero != 0 || (!hasCluster && allocated != 0) {
            return fault(.subclusterBits, clusterMask &+ 1 &- inside)
        }
        let alike: UInt32
        let kind: ClusterKind
        if zero & (1 << sub) != 0 {
            (alike, kind) = (zero, hasCluster ? .zeroAllocated : .zeroPlain)
        } else if allocated & (1 << sub) != 0 {
            (alike, kind) = (allocated, .data)
        } else {
            (alike, kind) = (~(allocated | zero), .unallocated)
        }
        // Subclusters of this kind from here: ones at the bottom after the shift, which brings in zeros at the top.
        let count = UInt64((~(alike >> sub)).trailingZeroBitCount)
        let length = ((UInt64(sub) &+ count) << subBits) &- inside
        let host = entry & Self.offsetMask
        if kind == .data { return data(host &+ inside, at: position, length: length) }
        return ClusterRun(kind: kind, host: host &+ inside, length: length)
    }
}
