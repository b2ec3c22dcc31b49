// Restores a disk of a point to another disk by the copier: whole, or only what differs, and checked on the way.
public import Block
import LinuxIO

/// How a disk is restored.
public struct RestoreOptions: Sendable {
    /// Whether the destination is read first, and only chunks that differ are written.
    public var isDifferential = false
    /// Whether chunks that are not what was backed up are written all the same.
    public var isForced = false
    /// Whether the destination is read again at the end.
    public var verifies = false
    /// How many chunks' neighbourhoods are worked on at once, 1 to 16.
    public var workers = 4

    /// Whole, refusing damaged data, without reading again.
    public init() {}
}

/// What a restore has done.
public struct RestoreResult: Sendable {
    /// Bytes on the disk.
    public var size: UInt64 = 0
    /// Bytes of data read from the point.
    public var bytesRead: UInt64 = 0
    /// Bytes written to the destination, and bytes made zero there.
    public var bytesWritten: UInt64 = 0
    public var bytesZeroed: UInt64 = 0
    /// Bytes that the destination had already.
    public var bytesUnchanged: UInt64 = 0
    /// Bytes that were read again from the destination.
    public var bytesVerified: UInt64 = 0
    /// Offsets of chunks that are not what was backed up, and were written all the same.
    public var damaged: [UInt64] = []
}

/// One restore of one disk.
struct DiskRestore {
    private let source: any BlockDevice
    private let chain: HashChain
    private let disk: any BlockDevice
    private let isBlank: Bool
    private let options: RestoreOptions
    private let cancellation: Cancellation

    /// - Parameter isBlank: whether the disk is new and reads as zeros.
    init(
        source: any BlockDevice, chain: HashChain, to disk: any BlockDevice, isBlank: Bool, _ options: RestoreOptions,
        _ cancellation: Cancellation
    ) {
        self.source = source
        self.chain = chain
        self.disk = disk
        self.isBlank = isBlank
        self.options = options
        self.cancellation = cancellation
    }

    func run(_ progress: (_ done: UInt64, _ total: UInt64) -> Void) throws(BlockError) -> RestoreResult {
        let size = source.info.size
        if disk.info.size < size {
            throw BlockError(
                .noSpace,
                "restoring \(source.info.name) to \(disk.info.name): it has only \(disk.info.size) of \(size) bytes")
        }
        let total = size * (options.verifies ? 2 : 1)
        let hashed = try HashedDisk(
            source, size: size, chain: chain, options.isForced ? .keep : .refuse,
            present: options.isDifferential ? disk : nil)
        let target = RestoreTarget(disk, source: hashed, isBlank: isBlank, isDifferential: options.isDifferential)
        do throws(BlockError) {
            try copy(hashed, to: target, finished: target.head) { progress($0, total) }
            try target.writeHead()
        } catch {
            if !target.isTouched { throw error }
            throw BlockError(
                error.kind,
                "\(error.message); \(disk.info.name) is incomplete: its first MiB, with boot sector and partition "
                    + "table, comes last; restore again, and --differential goes on with what is there")
        }
        var result = RestoreResult()
        result.size = size
        result.bytesRead = hashed.bytesRead
        result.bytesWritten = target.bytesWritten
        result.bytesZeroed = target.bytesZeroed
        result.bytesUnchanged = target.bytesUnchanged
        result.damaged = hashed.damaged
        if options.verifies {
            target.dropCache()
            let written = try HashedDisk(
                disk, size: size, chain: chain, .refuseBut(result.damaged), trustsHoles: false)
            try copy(written, to: NoTarget(size: size)) { progress(size + $0, total) }
            result.bytesVerified = written.bytesRead
        }
        return result
    }

    private func copy(
        _ source: HashedDisk, to target: any CopyTarget, finished: Range<UInt64> = 0..<0, _ progress: (UInt64) -> Void
    ) throws(BlockError) {
        var copying = CopyOptions()
        copying.workers = min(max(options.workers, 1), 16)
        copying.finished.insert(finished)
        let copier = try Copier(
            source: CopySource(source), target: target, options: copying, cancellation: cancellation)
        _ = try copier.run(progress: { progress($0.doneBytes) })
    }
}

/// Takes everything and keeps nothing: what is copied to it is only read.
private final class NoTarget: CopyTarget {
    let name = "nowhere"
    let size: UInt64
    let granularity = ChunkHashes.chunkSize
    let isSequential = false

    init(size: UInt64) { self.size = size }

    func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws(BlockError) {}
    func zero(_ range: Range<UInt64>) throws(BlockError) {}
    func flush() throws(BlockError) {}
}

extension Repository {
    /// Writes a disk of a point to another disk, which is flushed at the end.
    ///
    /// - Parameters:
    ///   - disk: its id; nil for the only one.
    ///   - target: open for writing, at least as large; nobody else uses it.
    ///   - isBlank: whether the target is new and reads as zeros, so that zeros need no writing.
    ///   - progress: gets the bytes done and the bytes to do, many times a second.
    /// - Throws: `.corrupt`, naming the chunk, when data is not what was backed up, unless forced; what was written
    ///   until then stays.
    public func restore(
        _ point: RestorePoint, disk: String?, to target: any BlockDevice, isBlank: Bool,
        _ options: RestoreOptions = RestoreOptions(), cancellation: Cancellation = Cancellation(),
        progress: (_ done: UInt64, _ total: UInt64) -> Void = { _, _ in }
    ) throws(BlockError) -> RestoreResult {
        // The device holds the point's lock.
        let source = try open(point, disk: disk)
        let chain = try openHashes(point, disk: disk, isForced: options.isForced)
        return try DiskRestore(
            source: source, chain: chain, to: target, isBlank: isBlank, options, cancellation
        ).run(progress)
    }

    /// The hashes of a disk at a point that is locked.
    ///
    /// - Parameter isForced: whether a sidecar that is not the one that the manifest names is only warned of.
    /// - Throws: `.corrupt` when a sidecar is not the one that the manifest names.
    private func openHashes(_ point: RestorePoint, disk: String?, isForced: Bool) throws(BlockError) -> HashChain {
        let names = try lockNames(of: point.machine)
        defer { withExtendedLifetime(names) {} }
        let point = try self.point(inManifest: point.path, of: point.machine)
        let id: String
        if let disk { id = disk } else { id = try onlyDisk(of: point) }
        let links = try chain(of: id, at: point)
        for link in links {
            let found = try sha256(ofFile: link.hashes)
            if found.digest != link.disk.hashes.sha256 {
                if isForced {
                    warn("\(link.hashes) is not the file that the manifest of point \(link.manifest.sequence) names")
                    continue
                }
                throw BlockError(
                    .corrupt,
                    "restoring \(point.description): \(link.hashes) is not the file that the manifest of point "
                        + "\(link.manifest.sequence) names; run diskgate verify")
            }
        }
        return try HashChain(links)
    }
}
