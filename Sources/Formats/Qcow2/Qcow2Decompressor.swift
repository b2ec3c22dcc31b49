// The source of compressed clusters: numbered like the disk, with the last few clusters kept decompressed.
import Block

/// Produces the bytes of an image's compressed clusters by their guest offset.
final class Qcow2Decompressor: ByteSource, @unchecked Sendable {
    // Sendable because a slot's memory is only touched under the slot's lock, and inflaters are handed out one by one.

    /// Memory for decompressed clusters, in bytes; at least 4 clusters are kept whatever their size, at most 64.
    private static let cacheBytes: UInt64 = 4 << 20
    /// Idle inflaters that are kept; more exist only while more threads read at once.
    private static let idleMax = 8

    let isPrompt = false
    private let image: Qcow2Image
    private let clusterSize: Int
    /// Each cluster has one slot where it may be, with a lock of its own.
    private let locks: [Lock]
    private let slots: UnsafeMutablePointer<Slot>
    private let idle = Locked<[Inflater]>([])

    private struct Slot {
        /// The guest cluster and the L2 entry that `bytes` hold decompressed.
        var cluster: UInt64 = .max
        var entry: UInt64 = .max
        var bytes: UnsafeMutableRawBufferPointer?
    }

    init(_ image: Qcow2Image) {
        self.image = image
        clusterSize = Int(image.header.clusterSize)
        let count = Int(min(max(Self.cacheBytes / image.header.clusterSize, 4), 64))
        locks = (0..<count).map { _ in Lock() }
        slots = .allocate(capacity: count)
        slots.initialize(repeating: Slot(), count: count)
    }

    deinit {
        for index in locks.indices { slots[index].bytes?.deallocate() }
        slots.deallocate()
    }

    func read(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(BlockError) {
        let geometry = image.geometry
        var done = 0
        while done < buffer.count {
            let position = offset + UInt64(done)
            let inside = Int(position & geometry.clusterMask)
            let part = min(buffer.count - done, clusterSize - inside)
            let target = UnsafeMutableRawBufferPointer(rebasing: buffer[done..<(done + part)])
            guard let run = try image.run(at: position, limit: position + 1, .blocking), run.kind == .compressed else {
                throw image.corrupt("the cluster at guest offset \(position) was compressed when it was mapped")
            }
            if part == clusterSize {
                try decompress(run.host, at: position, into: target)
            } else {
                try readPart(of: position >> geometry.clusterBits, entry: run.host, from: inside, into: target)
            }
            done += part
        }
    }

    /// Part of a cluster, by way of its slot. Others who want the same cluster wait rather than decompress it, too.
    private func readPart(of cluster: UInt64, entry: UInt64, from: Int, into target: UnsafeMutableRawBufferPointer)
        throws(BlockError)
    {
        let index = Int(cluster % UInt64(locks.count))
        try locks[index].withLock { () throws(BlockError) in
            let bytes =
                slots[index].bytes
                ?? .allocate(byteCount: clusterSize, alignment: Buffer.alignment)
            slots[index].bytes = bytes
            if slots[index].cluster != cluster || slots[index].entry != entry {
                slots[index].cluster = .max
                try decompress(entry, at: cluster << image.geometry.clusterBits, into: bytes)
                slots[index].cluster = cluster
                slots[index].entry = entry
            }
            target.copyMemory(from: UnsafeRawBufferPointer(rebasing: bytes[from..<(from + target.count)]))
        }
    }

    /// Decompresses a whole cluster.
    ///
    /// - Parameter entry: the L2 entry without its flags: below bit x the offset, from there the count of further
    ///   512-byte sectors that the compressed bytes touch, x being 62 - (cluster bits - 8).
    private func decompress(_ entry: UInt64, at position: UInt64, into target: UnsafeMutableRawBufferPointer)
        throws(BlockError)
    {
        let split = 62 - (image.geometry.clusterBits - 8)
        let host = entry & ((1 << split) - 1)
        let sectors = (entry >> split) + 1
        guard host < image.lowerSize else {
            throw image.corrupt("the compressed cluster for guest offset \(position) lies past the end of the file")
        }
        // The file may end inside the last sector.
        let count = Int(min(sectors * 512 - (host & 511), image.lowerSize - host))
        let inflater = idle.withLock { $0.popLast() } ?? Inflater(image.header.compression, inputMax: 2 * clusterSize)
        defer {
            idle.withLock { idle in
                if idle.count < Self.idleMax { idle.append(inflater) }
            }
        }
        do throws(BlockError) {
            let input = UnsafeMutableRawBufferPointer(rebasing: inflater.input.bytes[..<count])
            try image.lower.read(into: input, at: host)
        } catch { throw error.during("reading a compressed cluster of \(image.name)") }
        if let problem = try inflater.inflate(count, into: target) {
            throw image.corrupt("the compressed cluster for guest offset \(position) is damaged: \(problem)")
        }
    }
}
