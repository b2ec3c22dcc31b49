// A qcow2 image written once, from several threads, in whatever order: data first, tables behind it, the header last.
public import Block
import Glibc
import LinuxIO

/// The file below an image that has only the changes.
public struct Qcow2Backing: Sendable, Equatable {
    /// A format that a backing file may have.
    public enum Format: String, Sendable {
        case raw, qcow2
    }

    /// The file's name, beside the image or below its directory: relative, without "..", without a colon.
    public var name: String
    /// The file's format.
    public var format: Format

    /// A backing file; its name is checked when the image is created.
    public init(name: String, format: Format) {
        self.name = name
        self.format = format
    }

    func check() throws(BlockError) {
        let parts = name.split(separator: "/", omittingEmptySubsequences: false)
        guard !name.isEmpty, name.utf8.count <= 1023, !name.contains(":"), !name.utf8.contains(where: { $0 < 32 }),
            !parts.contains("") && !parts.contains("..")
        else {
            throw BlockError(
                .invalid,
                "recording the backing file \"\(name)\": it has to be a relative name of at most 1023 bytes, without "
                    + "\"..\", colons and control characters")
        }
    }
}

/// Whether and how an image's clusters are compressed.
public enum Qcow2WriterCompression: Sendable, Equatable {
    /// Not at all.
    case none
    /// By zstd, level 1 (fast) to 19; 1 to 3 keep up with disks. Clusters that shrink by less than an eighth stay as
    /// they are.
    case zstd(level: Int)
}

/// Writes a qcow2 image: version 3, clusters of 64 KiB, each written at most once.
///
/// The file has no valid header before `finish`, so it cannot be mistaken for an image. Memory is bounded whatever the
/// disk's size: 16 MiB of mapping tables, 8 bytes for each 512 MiB of disk, and with compression 1.5 MiB for each
/// thread. `write` and `zero` may come from several threads at once, for ranges that do not overlap.
public final class Qcow2Writer: @unchecked Sendable {
    // Sendable because tables and host clusters are only touched under the lock.

    /// Slices of mapping tables in memory: 16 MiB, which map 128 GiB.
    static let slicesMax = 4096
    /// Clusters that are compressed and placed in one go.
    private static let batchClusters = 16

    /// Bytes of one write that suit the image. What is compressed goes through the processor's cache; storage likes
    /// larger pieces.
    public var pieceBytes: Int { compression == .none ? 512 << 10 : 256 << 10 }
    /// Whether a write waits for the storage, and not for a processor.
    public var waitsForStorage: Bool { compression == .none && file.isDirect }
    /// Bytes of the file from one write-back to the next, when its cached pages are dropped.
    private static let writeBackBytes: UInt64 = 32 << 20

    /// The disk's size in bytes.
    public let size: UInt64
    /// The file's path.
    public let path: String
    private let file: DiskImageFile
    private let backing: Qcow2Backing?
    private let compression: Qcow2WriterCompression
    private let keepsCache: Bool
    private let lock = Lock()
    private let clusters: HostClusters
    private let tables: MappingTables
    private var state = State.open
    private var counts = Counts()
    private var writtenBack: UInt64 = 0
    private let idle = Locked<[Workspace]>([])

    private enum State {
        case open, finished, abandoned
        case failed(BlockError)
    }

    /// What was written so far.
    public struct Counts: Sendable, Equatable {
        /// Clusters stored as they are.
        public var plain: UInt64 = 0
        /// Clusters stored compressed.
        public var compressed: UInt64 = 0
        /// Bytes that the compressed ones take.
        public var compressedBytes: UInt64 = 0
        /// Clusters stored as zeros, or, without a backing file, not at all.
        public var zero: UInt64 = 0
        /// Bytes of the file so far, holes included.
        public var fileBytes: UInt64 = 0
    }

    private init(
        _ file: DiskImageFile, path: String, size: UInt64, backing: Qcow2Backing?, compression: Qcow2WriterCompression,
        keepsCache: Bool
    ) {
        self.file = file
        self.path = path
        self.size = size
        self.backing = backing
        self.compression = compression
        self.keepsCache = keepsCache
        clusters = HostClusters(file)
        tables = MappingTables(size: size, capacity: Self.slicesMax, file: file, clusters: clusters)
    }

    /// Creates the file of an image, which must not be there yet.
    ///
    /// - Parameters:
    ///   - path: where; a name that nobody takes for a finished image, to be renamed after `finish`.
    ///   - size: the disk's size in bytes. The image has whole sectors: qemu reads no parts of them.
    ///   - backing: the image below, for one that has only changes.
    ///   - keepsCache: whether written pages may stay in the page cache; false writes back behind the writer and drops
    ///     them, so that a large backup does not push out what the host needs.
    /// - Throws: `.tooLarge` for a disk of more than 2 PiB, `.invalid` for a backing name or level that cannot be, or
    ///   the system's reason for not creating the file.
    public static func create(
        _ path: String, size: UInt64, backing: Qcow2Backing? = nil, compression: Qcow2WriterCompression = .none,
        keepsCache: Bool = true
    ) throws(BlockError) -> Qcow2Writer {
        guard Qcow2Profile.tables(size) * 8 <= Qcow2Header.l1BytesMax else {
            throw BlockError(.tooLarge, "creating \(path): a disk of \(size) bytes is larger than 2 PiB")
        }
        try backing?.check()
        if case .zstd(let level) = compression, !(1...19).contains(level) {
            throw BlockError(.invalid, "creating \(path): zstd has no level \(level) (1 to 19 are offered)")
        }
        let descriptor = try Descriptor.open(path, O_RDWR | O_CREAT | O_EXCL)
        Step.reached("qcow2.created")
        return Qcow2Writer(
            DiskImageFile(descriptor, name: path, isNew: true), path: path, size: size, backing: backing,
            compression: compression, keepsCache: keepsCache)
    }

    /// What was written so far.
    public var written: Counts {
        lock.withLock {
            var counts = counts
            counts.fileBytes = clusters.next << Qcow2Profile.clusterBits
            return counts
        }
    }

    /// Slices of L2 tables and blocks of reference counts that are in memory, for tests of their bounds.
    var metadataInMemory: (slices: Int, blocks: Int) {
        lock.withLock { (tables.slicesInMemory, clusters.blocksInMemory) }
    }

    /// The clusters of a range that `write` or `zero` was asked for.
    private func clusterRange(_ offset: UInt64, _ length: UInt64) throws(BlockError) -> Range<UInt64> {
        guard offset <= size, length <= size - offset else {
            throw BlockError(.outOfRange, "writing \(path): \(length) bytes at \(offset) lie outside its \(size) bytes")
        }
        let end = offset + length
        guard offset & Qcow2Profile.clusterMask == 0, end & Qcow2Profile.clusterMask == 0 || end == size else {
            throw BlockError(
                .invalid, "writing \(path): \(length) bytes at \(offset) are not whole clusters of 64 KiB")
        }
        return (offset >> Qcow2Profile.clusterBits)..<Qcow2Profile.clusters(end)
    }

    /// Runs a step under the lock, unless the image is finished or broken. A failure breaks the image: what the file
    /// holds is not known then.
    private func changing<R>(_ body: () throws(BlockError) -> R) throws(BlockError) -> R {
        try lock.withLock { () throws(BlockError) in
            switch state {
            case .open: break
            case .failed(let error): throw error
            case .finished, .abandoned: throw BlockError(.invalid, "writing \(path): its writer has ended")
            }
            return try body()
        }
    }

    private func failing<R>(_ body: () throws(BlockError) -> R) throws(BlockError) -> R {
        do throws(BlockError) {
            return try body()
        } catch {
            lock.withLock { if case .open = state { state = .failed(error) } }
            throw error
        }
    }

    private func checkNotWritten(_ range: Range<UInt64>) throws(BlockError) {
        guard let cluster = try tables.firstEntry(in: range) else { return }
        throw BlockError(
            .invalid,
            "writing \(path): the cluster at \(cluster << Qcow2Profile.clusterBits) was written before, and each is "
                + "written once")
    }
}

// MARK: - Writing

extension Qcow2Writer {
    /// What a batch of clusters needs while it is written.
    private final class Workspace {
        struct Piece {
            var kind: ClusterKind
            /// Where the bytes start: in the caller's buffer, or compressed in `scratch`.
            var start: Int
            var length: Int
            var host: UInt64 = 0
            var entry: UInt64 = 0
        }

        var pieces: [Piece] = []
        let compressor: ClusterCompressor?
        /// Compressed clusters one after the other, then room for one more that turns out not to shrink.
        let scratch: Buffer
        /// The last cluster of the disk with zeros behind it.
        let tail = Buffer(count: Int(Qcow2Profile.clusterSize))

        init(_ compression: Qcow2WriterCompression) throws(BlockError) {
            pieces.reserveCapacity(Qcow2Writer.batchClusters)
            switch compression {
            case .none:
                compressor = nil
                scratch = Buffer(count: 1)
            case .zstd(let level):
                compressor = try ClusterCompressor(level: level)
                scratch = Buffer(count: Qcow2Writer.batchClusters * Qcow2Profile.payloadMax)
            }
        }
    }

    /// Writes clusters, each for the first time. Those of zeros only are stored as such.
    ///
    /// - Parameters:
    ///   - bytes: whole clusters; the last one of the disk ends where the disk ends.
    ///   - offset: on the disk, a multiple of 64 KiB.
    /// - Throws: `.invalid` for what is not aligned or was written before, with the image unharmed; `.outOfRange`; or
    ///   what writing the file throws, after which the image can only be abandoned.
    public func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws(BlockError) {
        let range = try clusterRange(offset, UInt64(bytes.count))
        if range.isEmpty { return }
        let kept = idle.withLock { $0.popLast() }
        let space = if let kept { kept } else { try Workspace(compression) }
        defer { idle.withLock { $0.append(space) } }
        var first = range.lowerBound
        while first < range.upperBound {
            let end = min(first + UInt64(Self.batchClusters), range.upperBound)
            let start = Int((first - range.lowerBound) << Qcow2Profile.clusterBits)
            let stop = min(Int((end - range.lowerBound) << Qcow2Profile.clusterBits), bytes.count)
            try writeBatch(UnsafeRawBufferPointer(rebasing: bytes[start..<stop]), first..<end, space)
            first = end
        }
    }

    private func writeBatch(_ bytes: UnsafeRawBufferPointer, _ range: Range<UInt64>, _ space: Workspace)
        throws(BlockError)
    {
        plan(bytes, space)
        let end = try changing { () throws(BlockError) in
            try checkNotWritten(range)
            return try failingLocked { () throws(BlockError) in try place(range, space) }
        }
        try failing { () throws(BlockError) in try store(bytes, space) }
        Step.reached("qcow2.data-written")
        if !keepsCache { writeBack(upTo: end) }
    }

    /// Decides for each cluster how it is stored, and compresses it.
    private func plan(_ bytes: UnsafeRawBufferPointer, _ space: Workspace) {
        let clusterSize = Int(Qcow2Profile.clusterSize)
        space.pieces.removeAll(keepingCapacity: true)
        var used = 0
        for start in stride(from: 0, to: bytes.count, by: clusterSize) {
            var cluster = UnsafeRawBufferPointer(rebasing: bytes[start..<min(start + clusterSize, bytes.count)])
            let length = cluster.count
            if cluster.isZero {
                space.pieces.append(.init(kind: .zeroPlain, start: start, length: length))
                continue
            }
            if let compressor = space.compressor {
                if length < clusterSize {
                    space.tail.bytes.copyMemory(from: cluster)
                    UnsafeMutableRawBufferPointer(rebasing: space.tail.bytes[length...])
                        .initializeMemory(as: UInt8.self, repeating: 0)
                    cluster = space.tail.readable
                }
                let rest = UnsafeMutableRawBufferPointer(rebasing: space.scratch.bytes[used...])
                if let packed = compressor.compress(cluster, into: rest) {
                    space.pieces.append(.init(kind: .compressed, start: used, length: packed))
                    used += packed
                    continue
                }
            }
            space.pieces.append(.init(kind: .data, start: start, length: length))
        }
    }

    /// Finds places in the file and enters them into the tables. Under the lock.
    ///
    /// - Returns: the end of the file.
    private func place(_ range: Range<UInt64>, _ space: Workspace) throws(BlockError) -> UInt64 {
        let plain = space.pieces.reduce(0) { $0 + ($1.kind == .data ? 1 : 0) }
        var host = plain == 0 ? 0 : try clusters.allocate(UInt64(plain))
        var hasEntries = plain > 0
        for index in space.pieces.indices {
            let piece = space.pieces[index]
            switch piece.kind {
            case .data:
                space.pieces[index].host = host
                space.pieces[index].entry = host | Qcow2Geometry.copiedFlag
                host += Qcow2Profile.clusterSize
                counts.plain += 1
            case .compressed:
                let packed = try clusters.pack(piece.length)
                space.pieces[index].host = packed
                space.pieces[index].entry = Qcow2Profile.compressedEntry(host: packed, length: piece.length)
                hasEntries = true
                counts.compressed += 1
                counts.compressedBytes += UInt64(piece.length)
            default:
                space.pieces[index].entry = backing == nil ? 0 : 1
                hasEntries = hasEntries || backing != nil
                counts.zero += 1
            }
        }
        // Zeros alone need no table where nothing is below.
        if hasEntries { try tables.set(range) { space.pieces[Int($0 - range.lowerBound)].entry } }
        try clusters.settle()
        return clusters.next << Qcow2Profile.clusterBits
    }

    /// Writes the planned pieces, neighbours together.
    private func store(_ bytes: UnsafeRawBufferPointer, _ space: Workspace) throws(BlockError) {
        for kind in [ClusterKind.data, .compressed] {
            let source = kind == .data ? bytes : space.scratch.readable
            var run: (start: Int, length: Int, host: UInt64)?
            for piece in space.pieces where piece.kind == kind {
                if let known = run, known.start + known.length == piece.start,
                    known.host + UInt64(known.length) == piece.host
                {
                    run?.length += piece.length
                    continue
                }
                if let run { try store(run.start, run.length, of: source, at: run.host) }
                run = (piece.start, piece.length, piece.host)
            }
            if let run { try store(run.start, run.length, of: source, at: run.host) }
        }
    }

    private func store(_ start: Int, _ length: Int, of source: UnsafeRawBufferPointer, at host: UInt64)
        throws(BlockError)
    {
        try file.write(UnsafeRawBufferPointer(rebasing: source[start..<(start + length)]), at: host)
    }

    /// As `failing`, by a caller who holds the lock.
    private func failingLocked<R>(_ body: () throws(BlockError) -> R) throws(BlockError) -> R {
        do throws(BlockError) {
            return try body()
        } catch {
            state = .failed(error)
            throw error
        }
    }

    /// Makes clusters read as zeros, each for the first time: zero clusters, or none where nothing is below.
    ///
    /// - Parameter range: of the disk, whole clusters up to its end.
    /// - Throws: as `write`.
    public func zero(_ range: Range<UInt64>) throws(BlockError) {
        let clusterRange = try clusterRange(range.lowerBound, range.count64)
        // In pieces of 512 MiB, so that others get the lock in between.
        var first = clusterRange.lowerBound
        while first < clusterRange.upperBound {
            let step = backing == nil ? clusterRange.upperBound - first : Qcow2Profile.tableEntries
            let part = first..<min(first + step, clusterRange.upperBound)
            try changing { () throws(BlockError) in
                try checkNotWritten(part)
                counts.zero += part.count64
                if backing == nil { return }
                try failingLocked { () throws(BlockError) in
                    try tables.set(part) { _ in 1 }
                    try clusters.settle()
                }
            }
            first = part.upperBound
        }
    }

    /// Writes back what was written a while ago and drops it from the page cache.
    private func writeBack(upTo end: UInt64) {
        let step = Self.writeBackBytes
        let started = lock.withLock { () -> UInt64? in
            guard end >= writtenBack + 2 * step else { return nil }
            writtenBack += step
            return writtenBack
        }
        guard let started else { return }
        file.startWriteBack(started..<(started + step))
        file.dropCache((started - step)..<started)
    }
}

// MARK: - Ending

extension Qcow2Writer {
    /// Puts what was written on stable storage. It is no image before `finish`.
    ///
    /// - Throws: the system's reason; the image can then only be abandoned.
    public func flush() throws(BlockError) {
        try changing {}
        try failing { () throws(BlockError) in try file.flush() }
    }

    /// Makes the file an image, durably: tables, then, after a sync, the header, then another sync. All other calls
    /// have returned before. The file's name is the caller's to change.
    ///
    /// - Throws: what writing throws; the file is then no image, or a whole one, and can only be abandoned.
    public func finish() throws(BlockError) {
        try changing { () throws(BlockError) in
            try failingLocked { () throws(BlockError) in try writeTables() }
            state = .finished
        }
    }

    private func writeTables() throws(BlockError) {
        clusters.endPacking()
        let l1 = try tables.finish()
        Step.reached("qcow2.l2-written")
        let refcounts = try clusters.finish()
        let isZstd = compression != .none
        let header = Qcow2HeaderFields(
            size: (size + 511) & ~511, backing: backing, isZstd: isZstd, l1Offset: l1.offset, l1Count: l1.entries,
            refcountTableOffset: refcounts.offset, refcountTableClusters: refcounts.clusters
        ).cluster
        let buffer = Buffer(count: header.count)
        buffer.bytes.copyBytes(from: header)
        // Without the first sector, which makes it an image in one step: sectors are written whole or not at all.
        try file.write(UnsafeRawBufferPointer(rebasing: buffer.readable[512...]), at: 512)
        Step.reached("qcow2.tables-written")
        try file.flush()
        Step.reached("qcow2.tables-durable")
        try file.write(UnsafeRawBufferPointer(rebasing: buffer.readable[..<512]), at: 0)
        Step.reached("qcow2.header-written")
        try file.flush()
        Step.reached("qcow2.finished")
    }

    /// Gives the image up and removes its file, unless it is finished. Calls that are on their way may fail.
    public func abandon() {
        let isLeft = lock.withLock { () -> Bool in
            if case .finished = state { return false }
            state = .abandoned
            return true
        }
        if isLeft { unlink(path) }
    }
}

extension UnsafeRawBufferPointer {
    /// Whether all bytes, at most 64 KiB, are zeros.
    var isZero: Bool {
        guard let baseAddress, let zeros = ZeroPage.bytes.baseAddress else { return true }
        return memcmp(baseAddress, zeros, Swift.min(count, ZeroPage.count)) == 0
    }
}
