// The source of compressed clusters and grains: numbered like the disk, with the last few of them kept decompressed.
import Block

/// An image that has compressed units: clusters, grains.
protocol CompressedUnits: AnyObject, Sendable {
    /// Bytes of a unit, a power of two.
    var unitSize: UInt64 { get }
    /// A new decompressor with working memory for what a unit's compressed bytes take at most.
    func makeInflater() -> Inflater
    /// The entry of the compressed unit that begins at an offset, which says where its bytes are.
    ///
    /// - Throws: `.corrupt` when there is none, or what reading the tables throws.
    func compressedEntry(at position: UInt64) throws(BlockError) -> UInt64
    /// Decompresses a whole unit by its entry.
    func decompress(
        _ entry: UInt64, at position: UInt64, with inflater: Inflater, into target: UnsafeMutableRawBufferPointer
    ) throws(BlockError)
}

/// Produces the bytes of an image's compressed units by their offset.
final class UnitDecompressor: ByteSource, @unchecked Sendable {
    // Sendable because a slot's memory is only touched under the slot's lock, and inflaters are handed out one by one.

    /// Memory for decompressed units, in bytes; at least 4 units are kept whatever their size, at most 64.
    private static let cacheBytes: UInt64 = 4 << 20
    /// Idle inflaters that are kept; more exist only while more threads read at once.
    private static let idleMax = 8

    let isPrompt = false
    private let image: any CompressedUnits
    private let unitSize: Int
    /// Each unit has one slot where it may be, with a lock of its own.
    private let locks: [Lock]
    private let slots: UnsafeMutablePointer<Slot>
    private let idle = Locked<[Inflater]>([])

    private struct Slot {
        /// The unit and its entry that `bytes` hold decompressed.
        var unit: UInt64 = .max
        var entry: UInt64 = .max
        var bytes: UnsafeMutableRawBufferPointer?
    }

    init(_ image: any CompressedUnits) {
        self.image = image
        unitSize = Int(image.unitSize)
        let count = Int(min(max(Self.cacheBytes / image.unitSize, 4), 64))
        locks = (0..<count).map { _ in Lock() }
        slots = .allocate(capacity: count)
        slots.initialize(repeating: Slot(), count: count)
    }

    deinit {
        for index in locks.indices { slots[index].bytes?.deallocate() }
        slots.deallocate()
    }

    func read(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(BlockError) {
        var done = 0
        while done < buffer.count {
            let position = offset + UInt64(done)
            let inside = Int(position & UInt64(unitSize - 1))
            let part = min(buffer.count - done, unitSize - inside)
            let target = UnsafeMutableRawBufferPointer(rebasing: buffer[done..<(done + part)])
            let start = position - UInt64(inside)
            let entry = try image.compressedEntry(at: start)
            if part == unitSize {
                try decompress(entry, at: start, into: target)
            } else {
                try readPart(of: start, entry: entry, from: inside, into: target)
            }
            done += part
        }
    }

    /// Part of a unit, by way of its slot. Others who want the same unit wait rather than decompress it, too.
    private func readPart(of start: UInt64, entry: UInt64, from: Int, into target: UnsafeMutableRawBufferPointer)
        throws(BlockError)
    {
        let unit = start / UInt64(unitSize)
        let index = Int(unit % UInt64(locks.count))
        try locks[index].withLock { () throws(BlockError) in
            let bytes =
                slots[index].bytes
                ?? .allocate(byteCount: unitSize, alignment: Buffer.alignment)
            slots[index].bytes = bytes
            if slots[index].unit != unit || slots[index].entry != entry {
                slots[index].unit = .max
                try decompress(entry, at: start, into: bytes)
                slots[index].unit = unit
                slots[index].entry = entry
            }
            target.copyMemory(from: UnsafeRawBufferPointer(rebasing: bytes[from..<(from + target.count)]))
        }
    }

    private func decompress(_ entry: UInt64, at position: UInt64, into target: UnsafeMutableRawBufferPointer)
        throws(BlockError)
    {
        let inflater = idle.withLock { $0.popLast() } ?? image.makeInflater()
        defer {
            idle.withLock { idle in
                if idle.count < Self.idleMax { idle.append(inflater) }
            }
        }
        try image.decompress(entry, at: position, with: inflater, into: target)
    }
}
