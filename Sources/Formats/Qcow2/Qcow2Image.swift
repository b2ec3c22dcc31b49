// One qcow2 file by itself, without its backing chain: L1 in memory, L2 in slices, and the way from a guest offset to
// a run of clusters.
import Block

/// The metadata of one image.
final class Qcow2Image: @unchecked Sendable {
    // Sendable because the L1 table is not changed after init, and the cache locks.

    let header: Qcow2Header
    let geometry: Qcow2Geometry
    let name: String
    /// The file with the metadata and, without an external data file, the data.
    let lower: any BlockDevice
    let lowerSize: UInt64
    /// The file with the data.
    let data: any BlockDevice
    let dataSize: UInt64
    private let l1: UnsafeMutablePointer<UInt64>
    private let l1Count: Int
    private let cache: SliceCache

    init(_ lower: any BlockDevice, _ header: Qcow2Header, dataFile: (any BlockDevice)?, cacheBytes: Int)
        throws(BlockError)
    {
        let file = lower.info
        let data = dataFile ?? lower
        self.header = header
        self.lower = lower
        self.data = data
        name = file.name
        lowerSize = file.size
        dataSize = data.info.size
        let geometry = Qcow2Geometry(header)
        self.geometry = geometry
        l1Count = header.l1Count
        l1 = .allocate(capacity: max(header.l1Count, 1))
        l1.initialize(repeating: 0, count: max(header.l1Count, 1))
        cache = SliceCache(
            sliceWords: geometry.sliceBytes / 8,
            sliceCount: UInt64(header.l1Count) << (geometry.tableShift - geometry.sliceShift), bytes: cacheBytes)
        if header.l1Count > 0 {
            let bytes = UnsafeMutableRawBufferPointer(start: l1, count: header.l1Count * 8)
            do throws(BlockError) {
                try lower.read(into: bytes, at: header.l1Offset)
            } catch { throw error.during("reading the L1 table of \(name)") }
            for index in 0..<header.l1Count { l1[index] = UInt64(bigEndian: l1[index]) }
        }
    }

    deinit { l1.deallocate() }

    /// The version of the maps of the files below.
    var mapVersion: UInt64 { header.hasDataFile ? lower.mapVersion &+ data.mapVersion : lower.mapVersion }

    /// The run of clusters that starts at a guest offset; at least one byte, at most up to `limit`.
    ///
    /// - Parameter limit: greater than `position`, at most the disk's size.
    /// - Returns: nil, with `.resident`, when the tables for it are not in memory. Never a run of kind `.corrupt`.
    /// - Throws: `.corrupt` when the tables are wrong at `position`, or what reading them throws.
    @inline(__always)
    func run(at position: UInt64, limit: UInt64, _ patience: Patience) throws(BlockError) -> ClusterRun? {
        let geometry = geometry
        let cached = cache.withSlice(position >> geometry.sliceShift) { words in
            geometry.run(words, at: position, limit: limit)
        }
        guard let run = cached else { return try uncachedRun(at: position, limit: limit, patience) }
        return try checked(run, at: position)
    }

    @inline(never)
    private func uncachedRun(at position: UInt64, limit: UInt64, _ patience: Patience) throws(BlockError) -> ClusterRun?
    {
        var index = Int(position >> geometry.tableShift)
        guard index < l1Count else { throw corrupt("its L1 table does not map guest offset \(position)") }
        let table = l1[index] & Qcow2Geometry.offsetMask
        if table == 0 {
            // A whole L2 table is missing, and perhaps the next ones.
            var end = limit
            while index + 1 < l1Count, UInt64(index + 1) << geometry.tableShift < limit {
                index += 1
                if l1[index] & Qcow2Geometry.offsetMask != 0 {
                    end = UInt64(index) << geometry.tableShift
                    break
                }
            }
            return ClusterRun(kind: .unallocated, host: 0, length: end - position)
        }
        guard table & geometry.clusterMask == 0 else {
            throw corrupt("the L2 table at \(table) for guest offset \(position) is not aligned to a cluster")
        }
        guard table < lowerSize, geometry.clusterMask < lowerSize - table else {
            throw corrupt("the L2 table at \(table) for guest offset \(position) lies outside the file")
        }
        let slice = position >> geometry.sliceShift
        let sliceInTable = slice & ((1 << (geometry.tableShift - geometry.sliceShift)) - 1)
        let offset = table + sliceInTable * UInt64(geometry.sliceBytes)
        let buffer = Buffer(count: geometry.sliceBytes)
        do throws(BlockError) {
            switch patience {
            case .blocking: try lower.read(into: buffer.bytes, at: offset)
            case .resident: if try !lower.readResident(into: buffer.bytes, at: offset) { return nil }
            }
        } catch { throw error.during("reading the L2 table of \(name)") }
        // Decoded from here: another thread may push the slice out of the cache at once.
        let words = buffer.bytes.baseAddress.map { $0.bindMemory(to: UInt64.self, capacity: buffer.bytes.count / 8) }
        guard let words else { throw BlockError(.noMemory, "reading the L2 table of \(name)") }
        for index in 0..<(buffer.bytes.count / 8) { words[index] = UInt64(bigEndian: words[index]) }
        cache.insert(slice, words)
        return try checked(geometry.run(words, at: position, limit: limit), at: position)
    }

    /// A run that can be used, or the reason why it cannot.
    @inline(__always)
    private func checked(_ run: ClusterRun, at position: UInt64) throws(BlockError) -> ClusterRun {
        switch run.kind {
        case .corrupt: throw entryError(run, at: position)
        case .data where run.host &+ run.length > dataSize: return try clipped(run, at: position)
        default: return run
        }
    }

    /// A run of data that reaches past the end of its file, cut there. The part of the file's last cluster that is
    /// missing reads as zeros, since a file need not end with a whole cluster.
    private func clipped(_ run: ClusterRun, at position: UInt64) throws(BlockError) -> ClusterRun {
        if run.host < dataSize { return ClusterRun(kind: .data, host: run.host, length: dataSize - run.host) }
        let end = (dataSize | geometry.clusterMask) &+ 1
        if dataSize & geometry.clusterMask != 0, run.host < end {
            return ClusterRun(kind: .zeroAllocated, host: run.host, length: min(run.length, end - run.host))
        }
        throw entryError(
            ClusterRun(kind: .corrupt, host: EntryFault.pastEnd.rawValue, length: run.length), at: position)
    }

    /// Starts reading the table that maps a guest offset, as advice.
    func prefetchTable(at position: UInt64) {
        let index = Int(position >> geometry.tableShift)
        guard index < l1Count else { return }
        let table = l1[index] & Qcow2Geometry.offsetMask
        if table == 0 || table >= lowerSize || lowerSize - table <= geometry.clusterMask { return }
        lower.prefetch(table..<(table + geometry.clusterMask + 1))
    }

    func corrupt(_ what: String) -> BlockError {
        BlockError(.corrupt, "reading the image \(name): \(what); qemu-img check tells whether it can be repaired")
    }

    private func entryError(_ run: ClusterRun, at position: UInt64) -> BlockError {
        let what = EntryFault(rawValue: run.host)?.text ?? "it is wrong"
        return corrupt("the L2 entry for guest offset \(position) cannot be followed: \(what)")
    }
}
