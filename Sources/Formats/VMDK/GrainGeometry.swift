// What the entries of grain tables mean: turns a slice of a table into runs of grains that are kept alike.

/// How the bytes of a run of grains are kept.
enum GrainKind: UInt8 {
    /// Not in this file: in the parent, or zeros.
    case absent
    /// Zeros without a grain.
    case zero
    /// As they are.
    case data
    /// Compressed.
    case compressed
    /// Nowhere: the entry contradicts the format. The run's host field has a `GrainFault`.
    case corrupt
}

/// What can be wrong with an entry of a grain table.
enum GrainFault: UInt64 {
    case reserved, inHeader, pastEnd

    var text: String {
        switch self {
        case .reserved: "its entry has no meaning"
        case .inHeader: "its grain lies in the file's header"
        case .pastEnd: "its grain lies past the end of the file"
        }
    }
}

/// Bytes of an extent that are kept alike and in one piece.
struct GrainRun: BitwiseCopyable {
    var kind: GrainKind
    /// `.data`: the offset of the first byte in the file. `.compressed`: that of the first grain. `.corrupt`: a
    /// `GrainFault`.
    var host: UInt64
    /// Bytes, at least 1.
    var length: UInt64
}

/// The numbers that grain tables are read with; constant for a file.
struct GrainGeometry: BitwiseCopyable {
    /// What entries look like.
    enum Entries: UInt8 {
        /// 32-bit sectors; 0 is absent, and 1 zeros where the header says so.
        case hosted
        /// 32-bit sectors; 0 is absent.
        case cow
        /// 64 bits; the highest four say what, the others which grain.
        case seSparse
    }

    /// Entries that are kept in memory together.
    static let sliceEntriesMax: UInt64 = 512

    let entries: Entries
    /// log2 of the bytes of a grain.
    let grainBits: UInt64
    /// log2 of the bytes that a table maps.
    let tableShift: UInt64
    /// log2 of the bytes that a slice of a table maps.
    let sliceShift: UInt64
    let isCompressed: Bool
    let hasZeroGrains: Bool
    /// Sectors at the start of the file where no grain can be.
    let headerSectors: UInt64
    /// seSparse: where grains begin, in bytes.
    let grainsStart: UInt64

    /// - Parameters:
    ///   - grainSectors: a power of two.
    ///   - tableEntries: a power of two.
    init(
        _ entries: Entries, grainSectors: UInt64, tableEntries: UInt64, headerSectors: UInt64,
        isCompressed: Bool = false, hasZeroGrains: Bool = false, grainsStart: UInt64 = 0
    ) {
        self.entries = entries
        grainBits = UInt64(grainSectors.trailingZeroBitCount) + 9
        tableShift = grainBits + UInt64(tableEntries.trailingZeroBitCount)
        sliceShift = grainBits + UInt64(min(tableEntries, Self.sliceEntriesMax).trailingZeroBitCount)
        self.isCompressed = isCompressed
        self.hasZeroGrains = hasZeroGrains
        self.headerSectors = headerSectors
        self.grainsStart = grainsStart
    }

    var grainMask: UInt64 { (1 << grainBits) - 1 }
    /// Entries of a slice.
    var sliceEntries: UInt64 { 1 << (sliceShift - grainBits) }
    /// Bytes of an entry.
    var entryBytes: UInt64 { entries == .seSparse ? 8 : 4 }
    /// Bytes of a slice in the file.
    var sliceBytes: UInt64 { sliceEntries * entryBytes }
    /// Bytes of a table in the file.
    var tableBytes: UInt64 { (1 << (tableShift - grainBits)) * entryBytes }

    /// The run that starts at an offset, up to `limit` or the end of the slice, whichever comes first.
    ///
    /// - Parameters:
    ///   - words: the slice that maps the offset, in host byte order.
    ///   - limit: greater than `position`.
    @inline(__always)
    func run(_ words: UnsafePointer<UInt64>, at position: UInt64, limit: UInt64) -> GrainRun {
        var index = (position >> grainBits) & (sliceEntries &- 1)
        let inside = position & grainMask
        var run = grain(words[Int(truncatingIfNeeded: index)])
        run.length = grainMask &+ 1 &- inside
        if run.kind == .data { run.host = run.host &+ inside }
        while position &+ run.length < limit && run.kind != .corrupt {
            index &+= 1
            if index == sliceEntries { break }
            let next = grain(words[Int(truncatingIfNeeded: index)])
            if next.kind != run.kind || (run.kind == .data && next.host != run.host &+ run.length) { break }
            run.length = run.length &+ next.length
        }
        run.length = min(run.length, limit &- position)
        return run
    }

    /// What an entry says of its whole grain.
    @inline(__always)
    private func grain(_ entry: UInt64) -> GrainRun {
        if entry == 0 { return GrainRun(kind: .absent, host: 0, length: grainMask &+ 1) }
        if entries == .seSparse { return seSparseGrain(entry) }
        if entry == 1 && hasZeroGrains { return GrainRun(kind: .zero, host: 0, length: grainMask &+ 1) }
        if entry < headerSectors { return fault(.inHeader) }
        return GrainRun(kind: isCompressed ? .compressed : .data, host: entry &* 512, length: grainMask &+ 1)
    }

    /// The highest four bits: 0 absent, 1 unmapped by the guest, 2 zeros, 3 data. The grain's number is in two parts:
    /// its 12 lowest bits above the others.
    private func seSparseGrain(_ entry: UInt64) -> GrainRun {
        switch entry >> 60 {
        // Unmapped grains read as zeros: what the guest has given up is not to come back from the parent.
        case 1, 2: return GrainRun(kind: .zero, host: 0, length: grainMask &+ 1)
        case 3:
            let number = ((entry >> 48) & 0xFFF) | ((entry & 0xFFFF_FFFF_FFFF) << 12)
            let (offset, overflow) = number.multipliedReportingOverflow(by: grainMask &+ 1)
            let (host, isPast) = grainsStart.addingReportingOverflow(offset)
            if overflow || isPast || host > UInt64(Int64.max) { return fault(.pastEnd) }
            return GrainRun(kind: .data, host: host, length: grainMask &+ 1)
        default: return fault(.reserved)
        }
    }

    private func fault(_ fault: GrainFault) -> GrainRun {
        GrainRun(kind: .corrupt, host: fault.rawValue, length: grainMask &+ 1)
    }
}
