// A disk whose chunks are compared with the hashes of a restore point while they are read: what a restore copies from.
import Block
import Synchronization

/// What becomes of chunks that are not what was backed up.
enum DamagePolicy: Sendable {
    /// The read fails, with advice about the point.
    case refuse
    /// They are read as they are, or as zeros where they cannot be read, and noted.
    case keep
    /// The read fails, unless the chunk was noted as damaged before: storage that was written gives back other bytes.
    case refuseBut([UInt64])
}

/// A disk over another one, read in whole chunks only. What it calls zeros are chunks of zeros by their hashes, too.
final class HashedDisk: BlockDevice {
    /// Bytes that are asked about at once: one question must not take long.
    private static let statusMax: UInt64 = 1 << 30

    let info: DeviceInfo
    private let disk: any BlockDevice
    private let chain: HashChain
    private let policy: DamagePolicy
    private let present: (disk: any BlockDevice, right: DirtyBitmap)?
    /// Whether what the disk says of holes is believed; if not, everything is read.
    private let trustsHoles: Bool
    private let bytes = Atomic<UInt64>(0)
    private let found = Locked<Set<UInt64>>([])
    // Made on first use: it points back to this disk, which must exist by then.
    private let handle = Locked<SourceHandle?>(nil)

    /// - Parameters:
    ///   - size: bytes of the disk that count.
    ///   - present: another disk, which is read first: where it has the right bytes, they are taken from there.
    init(
        _ disk: any BlockDevice, size: UInt64, chain: HashChain, _ policy: DamagePolicy,
        present: (any BlockDevice)? = nil, trustsHoles: Bool = true
    ) throws(BlockError) {
        var info = disk.info
        info.size = size
        info.isReadOnly = true
        info.dirtyBitmaps = []
        self.info = info
        self.disk = disk
        self.chain = chain
        self.policy = policy
        self.present = try present.map { (other) throws(BlockError) in
            (other, try DirtyBitmap(size: size, granularity: ChunkHashes.chunkSize))
        }
        self.trustsHoles = trustsHoles
    }

    /// Bytes read so far.
    var bytesRead: UInt64 { bytes.load(ordering: .relaxed) }

    /// Offsets of damaged chunks that were read all the same, in order.
    var damaged: [UInt64] { found.withLock { $0.sorted() } }

    /// Whether the other disk was found to have the right bytes of a range, in whole chunks.
    func isRight(_ range: Range<UInt64>) -> Bool {
        guard let right = present?.right, !range.isEmpty else { return false }
        return right.isAllSet(range)
    }

    /// A chunk and the hash that it is to have.
    private typealias Chunk = (range: Range<UInt64>, hash: ChunkHash)

    private func expected(_ range: Range<UInt64>) throws(BlockError) -> [Chunk] {
        var chunks: [Chunk] = []
        var position = range.lowerBound
        while position < range.upperBound {
            let end = min(position + ChunkHashes.chunkSize, range.upperBound)
            chunks.append((position..<end, try chain.expected(position / ChunkHashes.chunkSize).hash))
            position = end
        }
        return chunks
    }

    // MARK: - Reading

    private final class Checked: ByteSource {
        let isPrompt = false
        unowned let disk: HashedDisk
        init(_ disk: HashedDisk) { self.disk = disk }
        func read(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(BlockError) {
            try disk.readChecked(into: buffer, at: offset)
        }
    }

    func map(_ range: Range<UInt64>, _ patience: Patience, into extents: inout ExtentList) throws(BlockError) -> UInt64
    {
        if patience == .resident { return range.lowerBound }
        let source = handle.withLock { (handle) -> SourceRef in
            let made = handle ?? SourceHandle(Checked(self))
            handle = made
            return made.reference
        }
        return extents.append(range.count64, .source(source, offset: range.lowerBound))
            ? range.upperBound : range.lowerBound
    }

    private func readChecked(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(BlockError) {
        let range = offset..<(offset + UInt64(buffer.count))
        guard offset % ChunkHashes.chunkSize == 0,
            range.upperBound == info.size || range.upperBound % ChunkHashes.chunkSize == 0
        else { throw BlockError(.invalid, "reading \(info.name) at \(offset): not in whole chunks") }
        let hasher = ChunkHasher()
        var wanted = try expected(range)
        if let (other, right) = present {
            try other.read(into: buffer, at: offset)
            wanted.removeAll { chunk in
                let part = UnsafeRawBufferPointer(Self.part(buffer, chunk.range, at: offset))
                guard hasher.hash(of: part) == chunk.hash else { return false }
                right.set(chunk.range)
                return true
            }
        }
        var index = 0
        while index < wanted.count {
            // Neighbours at once.
            var end = index + 1
            while end < wanted.count, wanted[end].range.lowerBound == wanted[end - 1].range.upperBound { end += 1 }
            try read(Array(wanted[index..<end]), into: buffer, at: offset, hasher)
            index = end
        }
    }

    /// Reads chunks that lie beside each other into their parts of a buffer.
    private func read(
        _ chunks: [Chunk], into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64,
        _ hasher: borrowing ChunkHasher
    ) throws(BlockError) {
        guard let first = chunks.first, let last = chunks.last else { return }
        let range = first.range.lowerBound..<last.range.upperBound
        var unreadable: Set<UInt64> = []
        do throws(BlockError) {
            try disk.read(into: Self.part(buffer, range, at: offset), at: range.lowerBound)
        } catch {
            guard case .keep = policy else { throw error }
            // Chunk by chunk; what cannot be read is zeros.
            for chunk in chunks {
                let part = Self.part(buffer, chunk.range, at: offset)
                do throws(BlockError) { try disk.read(into: part, at: chunk.range.lowerBound) } catch {
                    part.initializeMemory(as: UInt8.self, repeating: 0)
                    unreadable.insert(chunk.range.lowerBound)
                }
            }
        }
        bytes.wrappingAdd(range.count64, ordering: .relaxed)
        for chunk in chunks {
            // Also where zeros are what belongs there: nobody has read them.
            let part = UnsafeRawBufferPointer(Self.part(buffer, chunk.range, at: offset))
            if !unreadable.contains(chunk.range.lowerBound), hasher.hash(of: part) == chunk.hash { continue }
            try judge(chunk.range.lowerBound)
        }
    }

    private static func part(_ buffer: UnsafeMutableRawBufferPointer, _ range: Range<UInt64>, at offset: UInt64)
        -> UnsafeMutableRawBufferPointer
    {
        let start = Int(range.lowerBound - offset)
        return UnsafeMutableRawBufferPointer(rebasing: buffer[start..<(start + Int(range.count64))])
    }

    /// A chunk is not what was backed up.
    private func judge(_ offset: UInt64) throws(BlockError) {
        switch policy {
        case .keep: found.withLock { _ = $0.insert(offset) }
        case .refuse:
            let link = try chain.expected(offset / ChunkHashes.chunkSize).link
            let place = link.map { " (point \($0.manifest.sequence), \($0.data ?? $0.disk.file))" } ?? ""
            throw BlockError(
                .corrupt,
                "restoring \(info.name): the chunk at offset \(offset)\(place) is not what was backed up; take another "
                    + "point, or add --force to restore it as it is")
        case .refuseBut(let known):
            if known.contains(offset) { return }
            throw BlockError(
                .corrupt,
                "verifying \(info.name): the chunk at offset \(offset) reads otherwise than it was written; the "
                    + "storage is not to be trusted")
        }
    }

    // MARK: - What is zeros

    func status(_ context: StatusContext, of range: Range<UInt64>, into list: inout StatusList) throws(BlockError)
        -> UInt64
    {
        guard context == .allocation, trustsHoles else {
            return list.append(range.count64, AllocationFlags.data) ? range.upperBound : range.lowerBound
        }
        let asked = range.lowerBound..<min(range.upperBound, range.lowerBound + Self.statusMax)
        var known = StatusList(capacity: list.capacity)
        do throws(BlockError) { _ = try disk.status(.allocation, of: asked, into: &known) } catch {
            guard case .keep = policy else { throw error }
            // Reading tells which chunks it is about.
            return list.append(asked.count64, AllocationFlags.data) ? asked.upperBound : asked.lowerBound
        }
        var position = asked.lowerBound
        for extent in known.extents {
            let end = position + extent.length
            if extent.value & AllocationFlags.zero == 0 {
                if !list.append(extent.length, AllocationFlags.data) { return position }
                position = end
                continue
            }
            while position < end {
                let index = position / ChunkHashes.chunkSize
                let next = min((index + 1) * ChunkHashes.chunkSize, end)
                let isZero = try chain.expected(index).hash == .zero
                if !list.append(next - position, isZero ? extent.value : AllocationFlags.data) { return position }
                position = next
            }
        }
        return position
    }

    func prefetch(_ range: Range<UInt64>) { (present?.disk ?? disk).prefetch(range) }
}
