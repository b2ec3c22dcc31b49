// Writes a disk of a restore point to another disk: whole, or only what differs; every chunk is checked on the way.
public import Block
import Glibc
import LinuxIO
import Synchronization

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

    fileprivate mutating func add(_ other: RestoreResult) {
        bytesRead += other.bytesRead
        bytesWritten += other.bytesWritten
        bytesZeroed += other.bytesZeroed
        bytesUnchanged += other.bytesUnchanged
        bytesVerified += other.bytesVerified
        damaged += other.damaged
    }
}

/// One restore of one disk, by several workers that take one piece of the disk after the other.
final class DiskRestore: Sendable {
    fileprivate static let windowSize: UInt64 = 1 << 20

    private let source: any BlockDevice
    private let chain: HashChain
    private let target: any BlockDevice
    private let isBlank: Bool
    private let options: RestoreOptions
    private let next = Atomic<UInt64>(0)
    private let done = Atomic<UInt64>(0)
    private let state = Locked(State())

    private struct State {
        var result = RestoreResult()
        var failure: BlockError?
        var working = 0
    }

    /// A chunk, the hash it is to have, and who says so.
    private struct Chunk {
        var range: Range<UInt64>
        var hash: ChunkHash
        var link: ChainLink?
        var isDamaged = false
        /// Whether nothing can be read there: it gets zeros.
        var isUnreadable = false
    }

    /// - Parameter isBlank: whether the target is new and reads as zeros.
    init(source: any BlockDevice, chain: HashChain, target: any BlockDevice, isBlank: Bool, _ options: RestoreOptions) {
        self.source = source
        self.chain = chain
        self.target = target
        self.isBlank = isBlank
        self.options = options
    }

    func run(_ progress: (_ done: UInt64, _ total: UInt64) -> Void) throws(BlockError) -> RestoreResult {
        let size = source.info.size
        if target.info.size < size {
            throw BlockError(
                .noSpace,
                "restoring \(source.info.name) to \(target.info.name): it has only \(target.info.size) of \(size) bytes"
            )
        }
        state.withLock { $0.result.size = size }
        let total = size * (options.verifies ? 2 : 1)
        try pass(total, progress) { (piece, result) throws(BlockError) in try self.restore(piece, &result) }
        try target.flush()
        if options.verifies {
            dropCache()
            next.store(0, ordering: .relaxed)
            try pass(total, progress) { (piece, result) throws(BlockError) in try self.verify(piece, &result) }
        }
        return state.withLock { state in
            state.result.damaged.sort()
            return state.result
        }
    }

    /// Lets the system forget what it keeps of the target, which is durable, so that reading it again tells what the
    /// storage has.
    private func dropCache() {
        var extents = ExtentList(capacity: 1)
        guard (try? target.map(0..<source.info.size, .blocking, into: &extents)) != nil, extents.count > 0,
            case .file(let file, _) = extents[0].place
        else { return }
        posix_fadvise(file.descriptor, 0, 0, POSIX_FADV_DONTNEED)
    }

    private typealias Work = @Sendable (borrowing Piece, inout RestoreResult) throws(BlockError) -> Void

    /// Lets the workers do something with every piece of the disk.
    private func pass(_ total: UInt64, _ progress: (UInt64, UInt64) -> Void, _ work: @escaping Work) throws(BlockError)
    {
        for _ in 0..<min(max(options.workers, 1), 16) {
            state.withLock { $0.working += 1 }
            do throws(BlockError) { try startThread(name: "restore") { self.worker(work) } } catch {
                // Those that run end with this failure.
                state.withLock { state in
                    state.failure = state.failure ?? error
                    state.working -= 1
                }
            }
        }
        while state.withLock({ $0.working }) > 0 {
            usleep(10_000)
            progress(done.load(ordering: .relaxed), total)
        }
        if let failure = state.withLock({ $0.failure }) { throw failure }
    }

    private func worker(_ work: Work) {
        var piece = Piece()
        var result = RestoreResult()
        let size = source.info.size
        while state.withLock({ $0.failure }) == nil {
            let start = next.wrappingAdd(Self.windowSize, ordering: .relaxed).oldValue
            if start >= size { break }
            piece.window = start..<min(start + Self.windowSize, size)
            do throws(BlockError) { try work(piece, &result) } catch {
                state.withLock { $0.failure = $0.failure ?? error }
                break
            }
            done.wrappingAdd(piece.window.count64, ordering: .relaxed)
        }
        state.withLock { state in
            state.result.add(result)
            state.working -= 1
        }
    }

    /// The chunks of a window with the hashes they are to have.
    private func expected(_ window: Range<UInt64>) throws(BlockError) -> [Chunk] {
        var chunks: [Chunk] = []
        var position = window.lowerBound
        while position < window.upperBound {
            let end = min(position + ChunkHashes.chunkSize, window.upperBound)
            let (hash, link) = try chain.expected(position / ChunkHashes.chunkSize)
            chunks.append(Chunk(range: position..<end, hash: hash, link: link))
            position = end
        }
        return chunks
    }

    private func restore(_ piece: borrowing Piece, _ result: inout RestoreResult) throws(BlockError) {
        var chunks = try expected(piece.window)
        if options.isDifferential {
            try target.read(into: piece.target(piece.window), at: piece.window.lowerBound)
            var differing: [Chunk] = []
            for chunk in chunks {
                if piece.hasher.hash(of: UnsafeRawBufferPointer(piece.target(chunk.range))) == chunk.hash {
                    result.bytesUnchanged += chunk.range.count64
                } else {
                    differing.append(chunk)
                }
            }
            chunks = differing
        }
        if chunks.isEmpty { return }
        // What is to be zeros is read all the same, unless the image has nothing there: it may not be zeros any more.
        var isHole = chunks.allSatisfy { $0.hash == .zero }
        if isHole {
            do throws(BlockError) { isHole = try source.readsAsHole(piece.window) } catch {
                if !options.isForced { throw error }
                isHole = false
            }
        }
        if !isHole {
            do throws(BlockError) {
                try source.read(into: piece.source(piece.window), at: piece.window.lowerBound)
            } catch {
                if !options.isForced { throw error }
                readSingly(&chunks, piece)
            }
            result.bytesRead += piece.window.count64
            for index in chunks.indices { try check(&chunks[index], piece, &result) }
        }
        var run = chunks[0].range
        var isZero = Self.isZero(chunks[0])
        for chunk in chunks.dropFirst() {
            if run.upperBound == chunk.range.lowerBound && isZero == Self.isZero(chunk) {
                run = run.lowerBound..<chunk.range.upperBound
            } else {
                try write(run, isZero: isZero, piece, &result)
                (run, isZero) = (chunk.range, Self.isZero(chunk))
            }
        }
        try write(run, isZero: isZero, piece, &result)
    }

    /// Reads chunk by chunk; what cannot be read is zeros.
    private func readSingly(_ chunks: inout [Chunk], _ piece: borrowing Piece) {
        for index in chunks.indices {
            let bytes = piece.source(chunks[index].range)
            do throws(BlockError) { try source.read(into: bytes, at: chunks[index].range.lowerBound) } catch {
                bytes.initializeMemory(as: UInt8.self, repeating: 0)
                chunks[index].isUnreadable = true
            }
        }
    }

    private static func isZero(_ chunk: Chunk) -> Bool { chunk.hash == .zero && !chunk.isDamaged }

    private func check(_ chunk: inout Chunk, _ piece: borrowing Piece, _ result: inout RestoreResult)
        throws(BlockError)
    {
        // Also where zeros are what belongs there: nobody has read them.
        if !chunk.isUnreadable,
            piece.hasher.hash(of: UnsafeRawBufferPointer(piece.source(chunk.range))) == chunk.hash
        {
            return
        }
        if !options.isForced {
            let place = chunk.link.map { " (point \($0.manifest.sequence), \($0.data ?? $0.disk.file))" } ?? ""
            throw BlockError(
                .corrupt,
                "restoring \(source.info.name): the chunk at offset \(chunk.range.lowerBound)\(place) is not what was "
                    + "backed up; take another point, or add --force to restore it as it is")
        }
        chunk.isDamaged = true
        result.damaged.append(chunk.range.lowerBound)
    }

    private func write(_ range: Range<UInt64>, isZero: Bool, _ piece: borrowing Piece, _ result: inout RestoreResult)
        throws(BlockError)
    {
        if !isZero {
            try target.write(UnsafeRawBufferPointer(piece.source(range)), at: range.lowerBound, durable: false)
            result.bytesWritten += range.count64
        } else if !isBlank {
            try target.zero(range, .mayPunch)
            result.bytesZeroed += range.count64
        }
    }

    private func verify(_ piece: borrowing Piece, _ result: inout RestoreResult) throws(BlockError) {
        let damaged = state.withLock { $0.result.damaged }
        try target.read(into: piece.target(piece.window), at: piece.window.lowerBound)
        for chunk in try expected(piece.window) where !damaged.contains(chunk.range.lowerBound) {
            if piece.hasher.hash(of: UnsafeRawBufferPointer(piece.target(chunk.range))) == chunk.hash { continue }
            throw BlockError(
                .inputOutput,
                "verifying \(target.info.name): the chunk at offset \(chunk.range.lowerBound) reads otherwise than it "
                    + "was written; the storage is not to be trusted")
        }
        result.bytesVerified += piece.window.count64
    }
}

/// A worker's place on the disk, with memory for what the source and the target have there.
private struct Piece: ~Copyable {
    var window: Range<UInt64> = 0..<0
    let hasher = ChunkHasher()
    private let fromSource = Buffer(count: Int(DiskRestore.windowSize))
    private let fromTarget = Buffer(count: Int(DiskRestore.windowSize))

    func source(_ range: Range<UInt64>) -> UnsafeMutableRawBufferPointer { part(fromSource.bytes, range) }
    func target(_ range: Range<UInt64>) -> UnsafeMutableRawBufferPointer { part(fromTarget.bytes, range) }

    private func part(_ bytes: UnsafeMutableRawBufferPointer, _ range: Range<UInt64>) -> UnsafeMutableRawBufferPointer {
        let start = Int(range.lowerBound - window.lowerBound)
        return UnsafeMutableRawBufferPointer(rebasing: bytes[start..<(start + Int(range.count64))])
    }
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
        _ options: RestoreOptions = RestoreOptions(), progress: (_ done: UInt64, _ total: UInt64) -> Void = { _, _ in }
    ) throws(BlockError) -> RestoreResult {
        // The device holds the point's lock.
        let source = try open(point, disk: disk)
        let chain = try openHashes(point, disk: disk, isForced: options.isForced)
        return try DiskRestore(source: source, chain: chain, target: target, isBlank: isBlank, options).run(progress)
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

extension BlockDevice {
    /// Whether a range reads as zeros without anything being read.
    func readsAsHole(_ range: Range<UInt64>) throws(BlockError) -> Bool {
        var extents = ExtentList(capacity: 64)
        guard try map(range, .blocking, into: &extents) == range.upperBound else { return false }
        for index in 0..<extents.count {
            guard case .zeros = extents[index].place else { return false }
        }
        return true
    }
}
