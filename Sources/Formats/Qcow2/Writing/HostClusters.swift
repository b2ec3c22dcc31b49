// Where a new image's clusters go: one after the other to the end of the file, each with its reference count.
import Block

/// Hands out the clusters of a file that only grows, and counts references to them. Used under the writer's lock.
///
/// Counts of parts of the file that nothing more is put into are written out, so memory does not grow with the file.
final class HostClusters {
    /// Clusters set aside at a time for compressed ones, which are packed byte by byte.
    private static let packedClusters: UInt64 = 64
    /// A packed region is given up when the file has grown by so many clusters since: it holds back the counts of
    /// everything behind it.
    private static let packedAgeMax: UInt64 = Qcow2Profile.countsPerBlock

    private let file: any ImageFile
    /// The first cluster that was never handed out. Cluster 0 is the header's.
    private(set) var next: UInt64 = 1
    /// Where each refcount block is in the file; 0 while it is in memory.
    private var blockOffsets: [UInt64] = []
    /// Counts of the blocks in memory, by block number.
    private var counts: [Int: [UInt16]] = [:]
    private var firstInMemory = 0
    /// Where the next compressed cluster goes, and the end of what is set aside for them.
    private var packed: Range<UInt64> = 0..<0

    init(_ file: any ImageFile) {
        self.file = file
        addReferences(0..<1)
    }

    /// Clusters of the file that have counts in memory.
    var blocksInMemory: Int { counts.count }

    private func addReferences(_ clusters: Range<UInt64>) {
        for cluster in clusters {
            let block = Int(cluster / Qcow2Profile.countsPerBlock)
            while blockOffsets.count <= block {
                counts[blockOffsets.count] = [UInt16](repeating: 0, count: Int(Qcow2Profile.countsPerBlock))
                blockOffsets.append(0)
            }
            // At most 4682 compressed clusters of 14 bytes, the shortest zstd frame of 64 KiB, share one.
            counts[block]?[Int(cluster % Qcow2Profile.countsPerBlock)] &+= 1
        }
    }

    /// Sets clusters aside in one piece.
    ///
    /// - Returns: the first one's offset.
    func allocate(_ count: UInt64) throws(BlockError) -> UInt64 {
        let first = next
        next += count
        guard next < 1 << (56 - Qcow2Profile.clusterBits) else {
            throw BlockError(.tooLarge, "writing \(file.name): a qcow2 image ends at 2^56 bytes")
        }
        addReferences(first..<next)
        return first << Qcow2Profile.clusterBits
    }

    /// Sets bytes aside for one compressed cluster.
    ///
    /// - Returns: their offset.
    func pack(_ length: Int) throws(BlockError) -> UInt64 {
        let length = UInt64(length)
        if packed.count64 < length {
            let isNext = !packed.isEmpty && packed.upperBound == next << Qcow2Profile.clusterBits
            let start = isNext ? packed.lowerBound : next << Qcow2Profile.clusterBits
            next += Self.packedClusters
            packed = start..<(next << Qcow2Profile.clusterBits)
        }
        let start = packed.lowerBound
        packed = (start + length)..<packed.upperBound
        addReferences((start >> Qcow2Profile.clusterBits)..<Qcow2Profile.clusters(start + length))
        return start
    }

    /// Writes counts that do not change any more, after clusters were set aside.
    func settle() throws(BlockError) {
        if next - packed.upperBound >> Qcow2Profile.clusterBits > Self.packedAgeMax { packed = 0..<0 }
        while true {
            let settled = packed.isEmpty ? next : packed.lowerBound >> Qcow2Profile.clusterBits
            guard UInt64(firstInMemory + 1) * Qcow2Profile.countsPerBlock <= settled else { return }
            let offset = try allocate(1)
            try write(block: firstInMemory, at: offset)
            firstInMemory += 1
        }
    }

    private func write(block: Int, at offset: UInt64) throws(BlockError) {
        guard let words = counts.removeValue(forKey: block) else { return }
        blockOffsets[block] = offset
        let buffer = Buffer(count: Int(Qcow2Profile.clusterSize))
        for (index, count) in words.enumerated() { buffer.bytes.storeBigEndian(count, at: index * 2) }
        try file.write(buffer.readable, at: offset)
    }

    /// Gives back what is left of the packed region at the end of the file: from here on only tables are added.
    func endPacking() {
        if packed.upperBound == next << Qcow2Profile.clusterBits { next = Qcow2Profile.clusters(packed.lowerBound) }
        packed = 0..<0
    }

    /// Writes the counts that are left and the table of all of them, as the last thing before the header.
    ///
    /// - Returns: where the refcount table is, and its clusters.
    func finish() throws(BlockError) -> (offset: UInt64, clusters: UInt64) {
        // Blocks count themselves and the table, so places are found for all of them before any is written.
        let first = firstInMemory
        var places: [UInt64] = []
        while first + places.count < blockOffsets.count { places.append(try allocate(1)) }
        // The table may need a block more for itself, which then needs its place.
        let table = Qcow2Profile.clusters(UInt64(blockOffsets.count + 2) * 8)
        let tableOffset = try allocate(table)
        while first + places.count < blockOffsets.count { places.append(try allocate(1)) }
        for (index, place) in places.enumerated() { try write(block: first + index, at: place) }
        let buffer = Buffer(count: Int(table << Qcow2Profile.clusterBits))
        buffer.bytes.initializeMemory(as: UInt8.self, repeating: 0)
        for (index, offset) in blockOffsets.enumerated() { buffer.bytes.storeBigEndian(offset, at: index * 8) }
        try file.write(buffer.readable, at: tableOffset)
        return (tableOffset, table)
    }
}
