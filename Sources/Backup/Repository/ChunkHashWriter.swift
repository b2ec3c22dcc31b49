// Hashes chunks while they are copied, from several threads in whatever order, and writes them in order at the end.
import Block
import Glibc
import LinuxIO

/// Collects the hashes of the chunks that an image gets.
///
/// They wait in a file without a name, 24 bytes for each chunk of the disk that was recorded, so memory does not depend
/// on the disk's size. Calls may come from several threads, for ranges that do not overlap; what is recorded twice has
/// the later value.
final class ChunkHashWriter: Sendable {
    /// Bytes of a record: the hash, its kind, padding.
    private static let recordBytes = 24
    private static let dataKind: UInt8 = 1
    private static let zeroKind: UInt8 = 2
    /// Records read or written at a time.
    private static let recordsAtOnce = 32768

    /// Bytes on the disk.
    let diskSize: UInt64
    private let path: String
    private let file: Descriptor

    /// Starts to record the chunks of a disk.
    ///
    /// - Parameter path: where the hash file will be; until then a file without a name in its directory is used.
    /// - Throws: the system's reason for not creating that.
    init(path: String, diskSize: UInt64) throws(BlockError) {
        self.path = path
        self.diskSize = diskSize
        let spill = "\(path).spill"
        unlink(spill)
        file = try Descriptor.open(spill, O_RDWR | O_CREAT | O_EXCL)
        unlink(spill)
    }

    private func check(_ chunks: Range<UInt64>) throws(BlockError) {
        guard chunks.upperBound <= ChunkHashes.chunks(diskSize) else {
            throw BlockError(
                .outOfRange, "hashing for \(path): chunks \(chunks) do not lie on a disk of \(diskSize) bytes")
        }
    }

    /// Records chunks by their bytes; those of zeros only are recorded as such.
    ///
    /// - Parameters:
    ///   - first: the first one's number on the disk.
    ///   - bytes: whole chunks; the disk's last one ends where the disk ends, and is hashed with zeros behind it.
    /// - Throws: `.outOfRange`, or what writing throws.
    func record(_ first: UInt64, _ bytes: UnsafeRawBufferPointer) throws(BlockError) {
        let size = Int(ChunkHashes.chunkSize)
        let count = bytes.count / size + (bytes.count % size == 0 ? 0 : 1)
        if count == 0 { return }
        let (end, overflow) = first.addingReportingOverflow(UInt64(count))
        try check(first..<(overflow ? .max : end))
        let records = Buffer(count: count * Self.recordBytes)
        records.bytes.initializeMemory(as: UInt8.self, repeating: 0)
        for index in 0..<count {
            let part = bytes[(index * size)..<min((index + 1) * size, bytes.count)]
            let place = index * Self.recordBytes
            switch hash(UnsafeRawBufferPointer(rebasing: part)) {
            case .data(let high, let low):
                records.bytes.storeBigEndian(high, at: place)
                records.bytes.storeBigEndian(low, at: place + 8)
                records.bytes[place + 16] = Self.dataKind
            case .zero, .absent: records.bytes[place + 16] = Self.zeroKind
            }
        }
        try store(records.readable, at: first)
    }

    private func hash(_ bytes: UnsafeRawBufferPointer) -> ChunkHash {
        bytes.count == Int(ChunkHashes.chunkSize) ? ChunkHash(of: bytes) : ChunkHasher().hash(of: bytes)
    }

    /// Records chunks of zeros.
    ///
    /// - Parameter chunks: their numbers on the disk.
    /// - Throws: as `record`.
    func recordZeros(_ chunks: Range<UInt64>) throws(BlockError) {
        try check(chunks)
        if chunks.isEmpty { return }
        let count = Int(min(chunks.count64, UInt64(Self.recordsAtOnce)))
        let records = Buffer(count: count * Self.recordBytes)
        records.bytes.initializeMemory(as: UInt8.self, repeating: 0)
        for index in 0..<count { records.bytes[index * Self.recordBytes + 16] = Self.zeroKind }
        var first = chunks.lowerBound
        while first < chunks.upperBound {
            let part = Int(min(UInt64(count), chunks.upperBound - first))
            try store(UnsafeRawBufferPointer(rebasing: records.readable[..<(part * Self.recordBytes)]), at: first)
            first += UInt64(part)
        }
    }

    private func store(_ records: UnsafeRawBufferPointer, at chunk: UInt64) throws(BlockError) {
        do throws(BlockError) {
            try writeFully(file.number, records, at: chunk * UInt64(Self.recordBytes), flags: 0)
        } catch { throw error.during("keeping the hashes for \(path)") }
    }

    /// Writes the hash file, durably. All other calls have returned before; its name is the caller's to change.
    ///
    /// - Throws: what writing throws; the file may then be there in part.
    func finish() throws(BlockError) {
        var output = try ChunkHashFile(creating: path, diskSize: diskSize)
        let hashes = Buffer(count: Self.recordsAtOnce * ChunkHashes.hashBytes)
        try forEachRecord { (records, first, count) throws(BlockError) in
            for index in 0..<count {
                let kind = records[index * Self.recordBytes + 16]
                if kind != 0 { try output.add(first: first + UInt64(index), count: 1, isZero: kind == Self.zeroKind) }
            }
        }
        try output.endRuns()
        try forEachRecord { (records, first, count) throws(BlockError) in
            var used = 0
            for index in 0..<count where records[index * Self.recordBytes + 16] == Self.dataKind {
                let place = index * Self.recordBytes
                UnsafeMutableRawBufferPointer(rebasing: hashes.bytes[used..<(used + ChunkHashes.hashBytes)])
                    .copyMemory(
                        from: UnsafeRawBufferPointer(rebasing: records[place..<(place + ChunkHashes.hashBytes)]))
                used += ChunkHashes.hashBytes
            }
            try output.add(hashes: UnsafeRawBufferPointer(rebasing: hashes.readable[..<used]))
        }
        try output.finish()
    }

    /// Goes through what was recorded, in order, past holes.
    private func forEachRecord(
        _ body: (UnsafeRawBufferPointer, _ first: UInt64, _ count: Int) throws(BlockError) -> Void
    ) throws(BlockError) {
        let end = UInt64(clamping: try file.status().st_size)
        let buffer = Buffer(count: Self.recordsAtOnce * Self.recordBytes)
        var first: UInt64 = 0
        while first * UInt64(Self.recordBytes) < end {
            let found = lseek(file.number, off_t(truncatingIfNeeded: first * UInt64(Self.recordBytes)), SEEK_DATA)
            if found < 0, errno == ENXIO { return }
            if found > 0 { first = max(first, UInt64(found) / UInt64(Self.recordBytes)) }
            let start = first * UInt64(Self.recordBytes)
            let count = Int(min(UInt64(Self.recordsAtOnce), (end - start) / UInt64(Self.recordBytes)))
            let bytes = UnsafeMutableRawBufferPointer(rebasing: buffer.bytes[..<(count * Self.recordBytes)])
            try ChunkHashes.read(file, path, bytes, at: start)
            try body(UnsafeRawBufferPointer(bytes), first, count)
            first += UInt64(count)
        }
    }
}
