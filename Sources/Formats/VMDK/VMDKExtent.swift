// One extent of a VMDK: the file it is in, and where in it.
import Block

/// A part of a disk: one file, or none.
final class VMDKExtent: Sendable {
    /// How its bytes are kept.
    enum Content: Sendable {
        /// As they are in a disk, from an offset in bytes.
        case flat(any BlockDevice, offset: UInt64)
        /// In grains.
        case sparse(GrainTables)
        /// Nowhere.
        case zeros
        /// Nobody may read them.
        case noAccess
    }

    /// The bytes of the disk that it has.
    let range: Range<UInt64>
    let content: Content
    /// Sparse and compressed: what makes its grains whole.
    private let decompressor: SourceHandle?

    init(_ range: Range<UInt64>, _ content: Content) {
        self.range = range
        self.content = content
        if case .sparse(let tables) = content, tables.geometry.isCompressed {
            decompressor = SourceHandle(UnitDecompressor(tables))
        } else {
            decompressor = nil
        }
    }

    /// What the bytes lie in.
    var lower: (any BlockDevice)? {
        switch content {
        case .flat(let device, _): device
        case .sparse(let tables): tables.lower
        case .zeros, .noAccess: nil
        }
    }

    /// Where the compressed grains come from.
    var compressed: SourceRef? { decompressor?.reference }
}

/// One extent as the walk sees it. It owns nothing: the device keeps its extents alive.
struct VMDKPart: BitwiseCopyable {
    let end: UInt64
    private let unmanaged: Unmanaged<VMDKExtent>

    init(_ extent: VMDKExtent) {
        end = extent.range.upperBound
        unmanaged = .passUnretained(extent)
    }

    /// Runs the body with the extent, without counting references: every connection of an export comes by here, and
    /// they would all write to the same count.
    @inline(__always)
    func withExtent<R, E: Error>(_ body: (VMDKExtent) throws(E) -> R) throws(E) -> R {
        try unmanaged._withUnsafeGuaranteedRef { extent in
            Result { () throws(E) in try body(extent) }
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
        for index in 0..<count { version &+= parts[index].withExtent { $0.lower?.mapVersion ?? 0 } }
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
