// The memory for the metadata of one disk, however many files a chain of descriptors makes of it.
import Block

/// What the sparse files of a chain share: the room for their grain directories, and one cache for their tables.
///
/// A chain may have 64 disks of 4096 extents each, and descriptors are not to be trusted: what each file may take alone
/// must not add up.
struct VMDKMemory {
    /// A file's part of the cache.
    struct Share {
        let cache: SliceCache
        /// The cache's number of the file's first slice.
        let firstSlice: UInt64
    }

    /// Words of a slice in the cache, the most that one has.
    private static let sliceWords = Int(GrainGeometry.sliceEntriesMax)

    private let disk: String
    private let options: VMDKOptions
    private var taken: UInt64 = 0
    private var cache: SliceCache?
    private var slices: UInt64 = 0

    /// Nothing is taken yet.
    ///
    /// - Parameter disk: the name of the disk that is opened, for errors.
    init(for disk: String, _ options: VMDKOptions) {
        self.disk = disk
        self.options = options
    }

    /// Room for one more file.
    ///
    /// - Throws: `.tooLarge` when there is none.
    mutating func take(for layout: SparseLayout) throws(BlockError) -> Share {
        let geometry = layout.geometry
        taken += UInt64(layout.directoryCount) * UInt64(MemoryLayout<UInt32>.stride)
        // Grains that are kept decompressed, and what decompresses them.
        if geometry.isCompressed { taken += (4 << 20) + 20 * (geometry.grainMask + 1) }
        if taken > options.metadataBytesMax {
            throw BlockError(
                .tooLarge,
                "opening \(disk) as VMDK: to find its grains takes more than \(options.metadataBytesMax >> 20) MiB of "
                    + "memory, with all its extents and parents; consolidate its snapshots")
        }
        let cache = cache ?? SliceCache(sliceWords: Self.sliceWords, sliceCount: .max, bytes: options.cacheBytes)
        self.cache = cache
        defer { slices += UInt64(layout.directoryCount) << (geometry.tableShift - geometry.sliceShift) }
        return Share(cache: cache, firstSlice: slices)
    }
}
