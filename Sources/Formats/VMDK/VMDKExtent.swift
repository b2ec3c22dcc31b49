// One extent of a VMDK: the file it is in, and where in it.
import Block

/// A part of a disk: one file, or none.
final class VMDKExtent: Sendable {
    /// What opening it has come to.
    enum Content {
        /// As they are in a disk, from an offset in bytes.
        case flat(any BlockDevice, offset: UInt64)
        /// In grains.
        case sparse(GrainTables)
        /// Nowhere.
        case zeros
        /// Nobody may read them.
        case noAccess
    }

    /// How its bytes are kept.
    enum Kind {
        case flat, sparse, zeros, noAccess
    }

    /// The bytes of the disk that it has.
    let range: Range<UInt64>
    let kind: Kind
    /// What its bytes lie in, or the tables that say where; of an extent without a file, what the descriptor lies in.
    let lower: any BlockDevice
    /// Flat: where its bytes begin.
    let offset: UInt64
    /// Sparse: the file's metadata.
    let tables: GrainTables?
    /// Sparse and compressed: what makes its grains whole.
    fileprivate let decompressor: SourceHandle?

    init(_ range: Range<UInt64>, _ content: Content, descriptorFile: any BlockDevice) {
        self.range = range
        switch content {
        case .flat(let device, let offset): (kind, lower, self.offset, tables) = (.flat, device, offset, nil)
        case .sparse(let tables): (kind, lower, offset, self.tables) = (.sparse, tables.lower, 0, tables)
        case .zeros: (kind, lower, offset, tables) = (.zeros, descriptorFile, 0, nil)
        case .noAccess: (kind, lower, offset, tables) = (.noAccess, descriptorFile, 0, nil)
        }
        decompressor =
            tables.flatMap { $0.geometry.isCompressed ? SourceHandle(UnitDecompressor($0)) : nil }
    }
}

/// One extent as the walk sees it. It owns nothing: the device keeps its extents alive.
struct VMDKPart: BitwiseCopyable {
    let start: UInt64
    let end: UInt64
    let kind: VMDKExtent.Kind
    /// Flat: where its bytes begin.
    let offset: UInt64
    /// Where the compressed grains come from.
    let compressed: SourceRef?
    private let extent: Unmanaged<VMDKExtent>
    private let tables: Unmanaged<GrainTables>?

    init(_ extent: VMDKExtent) {
        start = extent.range.lowerBound
        end = extent.range.upperBound
        kind = extent.kind
        offset = extent.offset
        compressed = extent.decompressor?.reference
        self.extent = .passUnretained(extent)
        tables = extent.tables.map { .passUnretained($0) }
    }

    /// A range of the disk as one of the extent's flat file.
    @inline(__always)
    func place(_ range: Range<UInt64>) -> Range<UInt64> {
        (range.lowerBound &- start &+ offset)..<(range.upperBound &- start &+ offset)
    }

    /// Runs the body with the extent, without counting references: every connection of an export comes by here, and
    /// they would all write to the same count.
    @inline(__always)
    func withExtent<R, E: Error>(_ body: (VMDKExtent) throws(E) -> R) throws(E) -> R {
        try extent._withUnsafeGuaranteedRef { extent in
            Result { () throws(E) in try body(extent) }
        }.get()
    }

    /// Runs the body with the tables of a sparse file, in the same way.
    ///
    /// - Returns: nil for an extent of another kind.
    @inline(__always)
    func withTables<R, E: Error>(_ body: (GrainTables) throws(E) -> R) throws(E) -> R? {
        try tables?._withUnsafeGuaranteedRef { tables in
            Result { () throws(E) in try body(tables) }
        }.get()
    }
}

/// The extents of a disk in order.
struct VMDKParts: ~Copyable, @unchecked Sendable {
    // Sendable because nothing of it changes after init.

    private let parts: UnsafeMutablePointer<VMDKPart>
    private let count: Int

    /// - Parameter extents: at least one.
    init(_ extents: [VMDKExtent]) {
        count = extents.count
        parts = .allocate(capacity: extents.count)
        for (index, extent) in extents.enumerated() { (parts + index).initialize(to: VMDKPart(extent)) }
    }

    deinit { parts.deallocate() }

    /// The versions of the maps of all files.
    var mapVersion: UInt64 {
        var version: UInt64 = 0
        for index in 0..<count { version &+= parts[index].withExtent { $0.lower.mapVersion } }
        return version
    }

    /// The first extent that ends behind an offset.
    @inline(__always)
    private func part(at position: UInt64) -> VMDKPart {
        var low = 0
        var high = count &- 1
        while low < high {
            let middle = (low &+ high) / 2
            if parts[middle].end <= position { low = middle &+ 1 } else { high = middle }
        }
        return parts[low]
    }

    /// Calls the body for each part of a range, in order.
    ///
    /// - Parameter body: returns the end of what it took; when that is less than the end of its range, the walk ends.
    @inline(__always)
    func forEach(
        in range: Range<UInt64>, _ body: (VMDKPart, Range<UInt64>) throws(BlockError) -> UInt64
    ) throws(BlockError) -> UInt64 {
        var position = range.lowerBound
        while position < range.upperBound {
            let part = part(at: position)
            let limit = min(range.upperBound, part.end)
            let end = try body(part, position..<limit)
            if end < limit { return end }
            position = end
        }
        return position
    }
}
