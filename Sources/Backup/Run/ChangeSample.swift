// Reads chunks again that are said to be unchanged, and compares them with the points before: lost changes show.
import Block

/// What a check has found.
struct SampleResult: Sendable {
    /// Chunks that were read.
    var chunks: UInt64 = 0
    /// Chunks that are said to be unchanged.
    var clean: UInt64 = 0
    /// Those of them that had changed all the same, in order; after a few nobody goes on looking.
    var mismatches: [UInt64] = []
    /// The places of the disk's rotation that were looked at, or whose chunks have changed; nil where none were.
    var places: Range<UInt64>?
}

/// A check of a disk against the newest point. It looks at chunks beside those that have changed, where a tracker that
/// counts wrongly would lose them, and at a share of the others, so that all are looked at in the course of many runs.
///
/// Of N chunks that are said to be unchanged, of which k have changed, n that are looked at find one with a probability
/// of at least 1 - (1 - k/N)^n.
struct ChangeSample {
    /// Looking ends with so many chunks that had changed: one is enough to know.
    private static let mismatchMax = 16
    /// Chunks that are read at once.
    private static let batchMax = 16

    private let device: any BlockDevice
    private let dirty: DirtyBitmap
    private let point: RestorePoint
    private let repository: Repository
    private let links: [ChainLink]
    private let chain: HashChain
    private let count: UInt64
    private let rotation: ChunkRotation
    private let disk: String

    /// A check of an open disk against a point.
    ///
    /// - Throws: `BlockError` when the hashes of the points cannot be read.
    init(device: any BlockDevice, dirty: DirtyBitmap, disk: String, point: RestorePoint, repository: Repository)
        throws(BlockError)
    {
        self.device = device
        self.dirty = dirty
        self.point = point
        self.repository = repository
        self.disk = disk
        links = try repository.chain(of: disk, at: point)
        chain = try HashChain(links)
        count = (device.info.size - 1) / ChunkHashes.chunkSize + 1
        rotation = Self.rotation(count, machine: point.machine.id, disk: disk)
    }

    /// The same for all runs of a disk, so that they look at one share after the other.
    private static func rotation(_ count: UInt64, machine: String, disk: String) -> ChunkRotation {
        // FNV-1a: all that matters is that it stays the same.
        var seed: UInt64 = 0xcbf2_9ce4_8422_2325
        for byte in "\(machine)/\(disk)".utf8 { seed = (seed ^ UInt64(byte)) &* 0x0000_0100_0000_01b3 }
        return ChunkRotation(count: count, seed: seed)
    }

    /// Looks at as many chunks as a number of bytes allows.
    ///
    /// - Throws: `BlockError` when the disk or the hashes cannot be read, or `.shutdown` when the run is to end.
    func take(budget: UInt64, _ cancellation: Cancellation) throws(BlockError) -> SampleResult {
        var result = SampleResult()
        result.clean = count - UInt64(dirty.setCount)
        let wanted = min(budget / ChunkHashes.chunkSize, result.clean)
        let start = (lastPlaces?.upperBound ?? 0) % count
        result.places = start..<start
        if wanted == result.clean {
            result.places = start..<(start + count)
            try readAllClean(into: &result, cancellation)
        } else if wanted > 0 {
            var chosen = neighbours(atMost: wanted / 4)
            result.places = start..<addRotating(to: &chosen, from: start, wanted: Int(wanted))
            chosen.sort()
            try read(chosen, into: &result, cancellation)
        }
        return result
    }

    /// The places that were looked at when the point before was made.
    private var lastPlaces: Range<UInt64>? { links.first?.disk.checked }

    private func isDirty(_ chunk: UInt64) -> Bool { dirty.isSet(Int(chunk)) }

    /// Chunks beside changed ones, evenly chosen where they are too many.
    private func neighbours(atMost limit: UInt64) -> [UInt64] {
        var all: [UInt64] = []
        var stride: UInt64 = 1
        var seen: UInt64 = 0
        forEachDirtyRun { first, end in
            for chunk in [first > 0 ? first - 1 : count, end] where chunk < count && !isDirty(chunk) {
                seen += 1
                if seen % stride == 0 && all.last != chunk { all.append(chunk) }
            }
            // Every other one of those there are, and of those to come.
            if UInt64(all.count) > 2 * limit {
                all = all.enumerated().filter { $0.offset % 2 == 1 }.map(\.element)
                stride *= 2
            }
        }
        return Array(all.prefix(Int(limit)))
    }

    private func forEachDirtyRun(_ body: (_ first: UInt64, _ end: UInt64) -> Void) {
        var list = StatusList(capacity: 4096)
        var position: UInt64 = 0
        while position < device.info.size {
            list.removeAll()
            let end = dirty.status(of: position..<device.info.size, into: &list)
            for extent in list.extents {
                let next = position + extent.length
                if extent.value != 0 {
                    body(position / ChunkHashes.chunkSize, (next - 1) / ChunkHashes.chunkSize + 1)
                }
                position = next
            }
            position = end
        }
    }

    /// Adds chunks in the order of the rotation until there are enough.
    ///
    /// - Returns: the place to go on from next time.
    private func addRotating(to chosen: inout [UInt64], from start: UInt64, wanted: Int) -> UInt64 {
        let known = Set(chosen)
        var place = start
        while chosen.count < wanted && place - start < count {
            let chunk = rotation.chunk(at: place)
            if !isDirty(chunk) && !known.contains(chunk) { chosen.append(chunk) }
            place += 1
        }
        return place
    }

    // MARK: - Reading

    private func read(_ chunks: [UInt64], into result: inout SampleResult, _ cancellation: Cancellation)
        throws(BlockError)
    {
        var index = 0
        while index < chunks.count {
            var end = index + 1
            while end < chunks.count && end - index < Self.batchMax && chunks[end] == chunks[end - 1] + 1 { end += 1 }
            try compare(chunks[index]..<(chunks[end - 1] + 1), into: &result, cancellation)
            if result.mismatches.count >= Self.mismatchMax { return }
            index = end
        }
    }

    private func readAllClean(into result: inout SampleResult, _ cancellation: Cancellation) throws(BlockError) {
        var chunk: UInt64 = 0
        while chunk < count {
            if isDirty(chunk) {
                chunk += 1
                continue
            }
            var end = chunk + 1
            while end < count && end - chunk < UInt64(Self.batchMax) && !isDirty(end) { end += 1 }
            try compare(chunk..<end, into: &result, cancellation)
            if result.mismatches.count >= Self.mismatchMax { return }
            chunk = end
        }
    }

    private func compare(_ chunks: Range<UInt64>, into result: inout SampleResult, _ cancellation: Cancellation)
        throws(BlockError)
    {
        try cancellation.check("checking the disk \(disk)")
        let hasher = ChunkHasher()
        let buffer = Buffer(count: Int(chunks.count64 * ChunkHashes.chunkSize))
        let start = chunks.lowerBound * ChunkHashes.chunkSize
        let bytes = Int(min(UInt64(buffer.bytes.count), device.info.size - start))
        try device.read(into: UnsafeMutableRawBufferPointer(rebasing: buffer.bytes[..<bytes]), at: start)
        for chunk in chunks {
            let from = Int((chunk - chunks.lowerBound) * ChunkHashes.chunkSize)
            let part = UnsafeRawBufferPointer(
                rebasing: buffer.readable[from..<min(from + Int(ChunkHashes.chunkSize), bytes)])
            if hasher.hash(of: part) != (try chain.expected(chunk).hash) { result.mismatches.append(chunk) }
            result.chunks += 1
        }
    }

    // MARK: - What follows from a mismatch

    /// The points that may miss the changes that were found: those made since each of the chunks was last known to be
    /// right, because it was stored or looked at.
    ///
    /// - Throws: `BlockError` when points or hashes cannot be read.
    func suspects(of result: SampleResult) throws(BlockError) -> [(point: RestorePoint, reason: String)] {
        var oldest: [Int: UInt64] = [:]
        for chunk in result.mismatches {
            for (index, link) in links.enumerated() {
                // A point that others were merged into holds what they held, too: which of them is not known.
                if !link.manifest.merged.isEmpty { oldest[link.manifest.sequence] = chunk }
                // A full point has read the chunk, whatever it holds of it.
                if link.disk.base == nil { break }
                if try chain.own(chunk, at: index) != .absent { break }
                if let places = link.disk.checked, isIn(places, chunk) { break }
                oldest[link.manifest.sequence] = chunk
            }
        }
        var suspects: [(point: RestorePoint, reason: String)] = []
        for point in try repository.points(of: point.machine) {
            guard let chunk = oldest[point.sequence] else { continue }
            suspects.append(
                (
                    point,
                    "a later run has found that changes of disk \(disk) at \(chunk * ChunkHashes.chunkSize) "
                        + "were not told"
                ))
        }
        return suspects
    }

    /// Whether a chunk is among those of some places of the rotation.
    private func isIn(_ places: Range<UInt64>, _ chunk: UInt64) -> Bool {
        if places.count64 >= count { return true }
        return places.contains { rotation.chunk(at: $0) == chunk }
    }
}
