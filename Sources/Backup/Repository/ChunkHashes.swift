// The hashes of the chunks that a restore point holds, in a file beside its image: written with it, found by chunk.
import Block
import CXXHash
import Glibc
import LinuxIO

/// What is known of a chunk.
enum ChunkHash: Sendable, Equatable {
    /// The image does not hold it: it is in the image below, or zeros.
    case absent
    /// The image holds it as zeros.
    case zero
    /// The image holds it; the high and the low 64 bits of its hash.
    case data(UInt64, UInt64)

    /// What a whole chunk is.
    init(of bytes: UnsafeRawBufferPointer) {
        let isZero =
            if let start = bytes.baseAddress, let zeros = ZeroPage.bytes.baseAddress, bytes.count <= ZeroPage.count {
                memcmp(start, zeros, bytes.count) == 0
            } else { bytes.isEmpty }
        if isZero {
            self = .zero
        } else {
            let hash = XXH3_128bits(bytes.baseAddress, bytes.count)
            self = .data(hash.high64, hash.low64)
        }
    }
}

/// A hash file, open for looking up.
///
/// All numbers are little-endian. A header of 64 bytes:
///
///     0   8 bytes  "DGCHUNKS"
///     8   u32      version: 1
///     12  u32      algorithm: 1, XXH3 with 128 bits and seed 0
///     16  u64      bytes on the disk
///     24  u32      bytes of a chunk: 65536
///     28  u32      0
///     32  u64      number of runs
///     40  u64      number of hashes
///     48  16 bytes 0
///
/// Then the runs, 24 bytes each, in the order of their chunks, none touching another:
///
///     0   u64      first chunk
///     8   u64      number of chunks, at least 1
///     16  u64      index of the first chunk's hash, or 2^64-1: all chunks are zeros and have none
///
/// Then the hashes, 16 bytes each in canonical order (the high 64 bits, then the low ones, both big-endian), those of
/// each run after those of the run before. The file ends with them. A chunk in no run is not in the image. The last
/// chunk of a disk is hashed with zeros behind it, so a hash stays right when the disk grows.
///
/// Everything but the hashes is checked when the file is opened. Memory does not depend on its size. Calls may come
/// from several threads.
final class ChunkHashes: Sendable {
    /// Bytes of a chunk.
    static let chunkSize: UInt64 = 65536

    /// Chunks next to each other that are kept alike.
    struct Run: Equatable {
        var first: UInt64
        var count: UInt64
        /// The index of the first hash; nil for zeros.
        var hash: UInt64?
        var end: UInt64 { first + count }
    }

    static let headerBytes = 64
    static let runBytes = 24
    static let hashBytes = 16
    static let magic: [UInt8] = Array("DGCHUNKS".utf8)

    /// The file's path.
    let path: String
    /// Bytes on the disk.
    let diskSize: UInt64
    /// Chunks with a hash.
    let dataChunks: UInt64
    /// Chunks known to be zeros.
    let zeroChunks: UInt64
    let runCount: UInt64
    private let file: Descriptor
    private let cache = Locked(Cache())

    /// The run and the hashes that were used last: most callers go through a disk in order.
    private struct Cache {
        var runIndex: UInt64?
        var run = Run(first: 0, count: 0, hash: nil)
        /// Runs around the last ones that were looked at, and the index of the first of them.
        var runs: [Run] = []
        var runsStart: UInt64 = 0
        var hashStart: UInt64 = 0
        var hashes: [ChunkHash] = []
    }

    /// Opens a hash file and checks it.
    ///
    /// - Throws: `.corrupt` when it contradicts itself or the format; `.unsupported` for another version or algorithm;
    ///   or what reading throws.
    init(opening path: String) throws(BlockError) {
        self.path = path
        file = try Descriptor.open(path, O_RDONLY)
        let fileSize = UInt64(clamping: try file.status().st_size)
        let buffer = Buffer(count: Self.headerBytes)
        func corrupt(_ what: String) -> BlockError { Self.corrupt(path, what) }
        guard fileSize >= UInt64(Self.headerBytes) else { throw corrupt("it is too short") }
        try Self.read(file, path, buffer.bytes, at: 0)
        let bytes = buffer.readable
        guard bytes[..<8].elementsEqual(Self.magic) else { throw corrupt("it does not begin like a hash file") }
        let (version, algorithm) = (bytes.littleEndian(8, as: UInt32.self), bytes.littleEndian(12, as: UInt32.self))
        guard version == 1, algorithm == 1 else {
            throw BlockError(
                .unsupported, "opening the hashes \(path): version \(version), algorithm \(algorithm) are not known")
        }
        guard bytes.littleEndian(24, as: UInt32.self) == UInt32(truncatingIfNeeded: Self.chunkSize),
            bytes.littleEndian(28, as: UInt32.self) == 0, bytes[48...].allSatisfy({ $0 == 0 })
        else { throw corrupt("its header has fields that are not allowed") }
        diskSize = bytes.littleEndian(16)
        runCount = bytes.littleEndian(32)
        dataChunks = bytes.littleEndian(40)
        // Counts of a file that exists: both products stay far below 2^64 once the counts are known to be small.
        let body = fileSize - UInt64(Self.headerBytes)
        guard runCount <= body / UInt64(Self.runBytes), dataChunks <= body / UInt64(Self.hashBytes),
            runCount * UInt64(Self.runBytes) + dataChunks * UInt64(Self.hashBytes) == body
        else { throw corrupt("\(runCount) runs and \(dataChunks) hashes do not make a file of \(fileSize) bytes") }
        zeroChunks = try Self.checkRuns(file, path, runCount, chunks: Self.chunks(diskSize), hashes: dataChunks)
    }

    static func open(_ path: String) throws(BlockError) -> ChunkHashes { try ChunkHashes(opening: path) }

    static func corrupt(_ path: String, _ what: String) -> BlockError {
        BlockError(.corrupt, "reading the hashes \(path): \(what); diskgate verify tells which points are affected")
    }

    static func chunks(_ diskSize: UInt64) -> UInt64 {
        diskSize / chunkSize + (diskSize % chunkSize == 0 ? 0 : 1)
    }

    /// Goes through all runs once.
    ///
    /// - Returns: the chunks of zeros.
    private static func checkRuns(
        _ file: Descriptor, _ path: String, _ runCount: UInt64, chunks: UInt64, hashes: UInt64
    ) throws(BlockError) -> UInt64 {
        var cursor = RunCursor(file, path, runCount)
        var (position, hash, zeros) = (UInt64(0), UInt64(0), UInt64(0))
        while let run = try cursor.next() {
            guard run.count > 0, run.first >= position, run.first < chunks, run.count <= chunks - run.first else {
                throw corrupt(path, "the run at chunk \(run.first) overlaps another or does not lie on the disk")
            }
            if let first = run.hash {
                guard first == hash, run.count <= hashes - hash else {
                    throw corrupt(path, "the hashes of the run at chunk \(run.first) are not where they belong")
                }
                hash += run.count
            } else {
                zeros += run.count
            }
            position = run.end
        }
        guard hash == hashes else { throw corrupt(path, "\(hashes - hash) hashes belong to no chunk") }
        return zeros
    }

    static func read(
        _ file: Descriptor, _ path: String, _ bytes: UnsafeMutableRawBufferPointer, at offset: UInt64
    ) throws(BlockError) {
        var done = 0
        while done < bytes.count {
            let got = pread(
                file.number, bytes.baseAddress?.advanced(by: done), bytes.count - done,
                off_t(truncatingIfNeeded: offset + UInt64(done)))
            if got > 0 {
                done += got
            } else if got == 0 {
                throw corrupt(path, "it has become shorter")
            } else if errno != EINTR {
                throw BlockError(errno: errno, "reading the hashes \(path)")
            }
        }
    }

    /// All runs from the first.
    func runs() -> RunCursor { RunCursor(file, path, runCount) }

    /// Reads hashes as they are in the file.
    func readHashes(_ first: UInt64, into bytes: UnsafeMutableRawBufferPointer) throws(BlockError) {
        let start = UInt64(Self.headerBytes) + runCount * UInt64(Self.runBytes)
        try Self.read(file, path, bytes, at: start + first * UInt64(Self.hashBytes))
    }
}

// MARK: - Looking up

extension ChunkHashes {
    /// Hashes read at a time.
    private static let hashesAtOnce: UInt64 = 1024

    /// What is known of a chunk; `.absent` past the disk's end.
    ///
    /// - Throws: what reading the file throws.
    func hash(of index: UInt64) throws(BlockError) -> ChunkHash {
        try cache.withLock { (cache) throws(BlockError) in
            guard let run = try run(holding: index, &cache) else { return .absent }
            guard let first = run.hash else { return .zero }
            let wanted = first + (index - run.first)
            if wanted < cache.hashStart || wanted - cache.hashStart >= UInt64(cache.hashes.count) {
                let count = min(Self.hashesAtOnce, dataChunks - wanted)
                let buffer = Buffer(count: Int(count) * Self.hashBytes)
                try readHashes(wanted, into: buffer.bytes)
                cache.hashes = (0..<Int(count)).map {
                    .data(
                        buffer.readable.bigEndian($0 * Self.hashBytes),
                        buffer.readable.bigEndian($0 * Self.hashBytes + 8))
                }
                cache.hashStart = wanted
            }
            return cache.hashes[Int(wanted - cache.hashStart)]
        }
    }

    private func run(holding index: UInt64, _ cache: inout Cache) throws(BlockError) -> Run? {
        if cache.runIndex != nil, cache.run.first <= index, index < cache.run.end { return cache.run }
        // The first run that ends behind the chunk.
        var (low, high) = (UInt64(0), runCount)
        if let known = cache.runIndex {
            if index >= cache.run.end { low = known + 1 } else { high = known }
        }
        // What is in memory says without reading whether it has to be looked for elsewhere.
        if let first = cache.runs.first, let last = cache.runs.last, first.first <= index, last.first > index {
            low = max(low, cache.runsStart)
            high = min(high, cache.runsStart + UInt64(cache.runs.count))
        }
        while low < high {
            // Near the last one first, for callers that go on from there.
            let middle = low == (cache.runIndex ?? .max) &+ 1 ? low : low + (high - low) / 2
            let run = try readRun(middle, &cache)
            if run.end <= index {
                low = middle + 1
                if cache.run.end <= run.end { (cache.runIndex, cache.run) = (middle, run) }
            } else if run.first <= index {
                (cache.runIndex, cache.run) = (middle, run)
                return run
            } else {
                high = middle
            }
        }
        return nil
    }

    /// Runs read at a time when one is looked for.
    private static let runsAtOnce: UInt64 = 128

    private func readRun(_ index: UInt64, _ cache: inout Cache) throws(BlockError) -> Run {
        if index < cache.runsStart || index - cache.runsStart >= UInt64(cache.runs.count) {
            let start = index - index % Self.runsAtOnce
            let count = Int(min(Self.runsAtOnce, runCount - start))
            let buffer = Buffer(count: count * Self.runBytes)
            try Self.read(
                file, path, buffer.bytes, at: UInt64(Self.headerBytes) + start * UInt64(Self.runBytes))
            cache.runs = (0..<count).map { RunCursor.run(buffer.readable, $0 * Self.runBytes) }
            cache.runsStart = start
        }
        let run = cache.runs[Int(index - cache.runsStart)]
        // Checked when it was opened; somebody may have written to it since.
        guard run.count > 0, run.first < Self.chunks(diskSize), run.count <= Self.chunks(diskSize) - run.first,
            run.hash.map({ $0 < dataChunks && run.count <= dataChunks - $0 }) ?? true
        else { throw Self.corrupt(path, "it was changed while it was open") }
        return run
    }
}

/// Reads the runs of a hash file in order.
struct RunCursor {
    private static let runsAtOnce: UInt64 = 2048
    private let file: Descriptor
    private let path: String
    private let count: UInt64
    private var index: UInt64 = 0
    private var runs: [ChunkHashes.Run] = []
    private var position = 0

    init(_ file: Descriptor, _ path: String, _ count: UInt64) {
        self.file = file
        self.path = path
        self.count = count
    }

    static func run(_ bytes: UnsafeRawBufferPointer, _ offset: Int) -> ChunkHashes.Run {
        let hash = bytes.littleEndian(offset + 16, as: UInt64.self)
        return ChunkHashes.Run(
            first: bytes.littleEndian(offset), count: bytes.littleEndian(offset + 8), hash: hash == .max ? nil : hash)
    }

    /// The next run; nil after the last one.
    mutating func next() throws(BlockError) -> ChunkHashes.Run? {
        if position == runs.count {
            if index == count { return nil }
            let part = min(Self.runsAtOnce, count - index)
            let size = ChunkHashes.runBytes
            let buffer = Buffer(count: Int(part) * size)
            try ChunkHashes.read(
                file, path, buffer.bytes, at: UInt64(ChunkHashes.headerBytes) + index * UInt64(size))
            runs = (0..<Int(part)).map { Self.run(buffer.readable, $0 * size) }
            position = 0
            index += part
        }
        position += 1
        return runs[position - 1]
    }
}
