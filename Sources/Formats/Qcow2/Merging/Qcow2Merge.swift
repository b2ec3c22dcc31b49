// The merge of an incremental image into its base, in place: the crash-safe half of pruning restore points.
public import Block
import CZstd
import Glibc
import LinuxIO

/// What a merge has done so far.
public struct Qcow2MergeReport: Sendable, Equatable {
    /// Clusters copied as they are.
    public internal(set) var copied: UInt64 = 0
    /// Clusters copied compressed.
    public internal(set) var copiedCompressed: UInt64 = 0
    /// Clusters that the child holds as zeros.
    public internal(set) var zeroed: UInt64 = 0
    /// Bytes written to the base for the first two.
    public internal(set) var bytesWritten: UInt64 = 0
}

/// Copies everything that an image holds into the base below it, so that the base can take its place.
///
/// At every moment, also after a crash, the disk reads the same through the child: all that changes in the base lies
/// under clusters of the child. That, and nothing else, is why clusters of the base may be overwritten where they are.
/// The base by itself is neither the old nor the new point meanwhile; whoever merges marks it first.
///
/// In the base, counts of new clusters and their data are written, then synced, then mapped; counts of clusters that
/// are no longer mapped fall one sync later. A crash leaves clusters that nobody uses, at worst. A merge that was
/// interrupted is started again from the beginning.
public enum Qcow2Merge {
    /// Looks whether an image can be one of a merge, without changing it: its header, L1 table and the reference counts
    /// of its tables.
    ///
    /// - Throws: `.unsupported` for an image outside the profile of `Qcow2Writer`, `.corrupt` for one that contradicts
    ///   itself, or what reading throws.
    public static func check(_ path: String) throws(BlockError) {
        let image = try ProfileImage(DiskImageFile(try Descriptor.open(path, O_RDONLY), name: path))
        _ = try ReferenceCounts(image)
    }

    /// Merges a child into its base and waits until that is durable. Nobody else has the base open; the child is only
    /// read. Afterwards `rename(base, child)` is the caller's.
    ///
    /// - Parameters:
    ///   - child: the path of an image whose backing file is `base`.
    ///   - base: the path of an image, with or without a backing file of its own.
    ///   - progress: called now and then, when what was merged so far is durable; what it throws ends the merge.
    /// - Throws: `.unsupported` before anything is changed when one of them is no image like those that `Qcow2Writer`
    ///   makes, when the child has no backing file, or when its disk is smaller than the base's; `.corrupt` when the
    ///   tables of one contradict themselves; or what reading and writing throws. The merge can then be started again.
    @discardableResult
    public static func merge(
        child: String, into base: String, progress: (Qcow2MergeReport) throws(BlockError) -> Void = { _ in }
    ) throws(BlockError) -> Qcow2MergeReport {
        let lower = try Descriptor.open(base, O_RDWR)
        let upper = try Descriptor.open(child, O_RDONLY)
        let (a, b) = (try lower.status(), try upper.status())
        if a.st_dev == b.st_dev && a.st_ino == b.st_ino {
            throw BlockError(.invalid, "merging \(child) into \(base): they are the same file")
        }
        return try merge(
            child: DiskImageFile(upper, name: child), into: DiskImageFile(lower, name: base), progress: progress)
    }

    static func merge(
        child: any ImageFile, into base: any ImageFile, batchBytes: UInt64 = MergeRun.batchBytes,
        progress: (Qcow2MergeReport) throws(BlockError) -> Void = { _ in }
    ) throws(BlockError) -> Qcow2MergeReport {
        let upper = try ProfileImage(child)
        let lower = try ProfileImage(base)
        guard upper.header.backingName != nil else {
            throw BlockError(
                .unsupported, "merging \(child.name) into \(base.name): it has no backing file, so it needs no other")
        }
        guard upper.header.size >= lower.header.size else {
            throw BlockError(
                .unsupported,
                "merging \(child.name) into \(base.name): its disk is smaller than the base's, and disks are not cut")
        }
        let run = try MergeRun(child: upper, base: lower, batchBytes: batchBytes)
        try run.run(progress)
        return run.report
    }
}

/// One merge on its way.
final class MergeRun {
    /// Bytes written from one sync of the base to the next.
    static let batchBytes: UInt64 = 64 << 20
    /// L2 entries that wait for a sync, at most; 16 bytes each.
    private static let pendingMax = 65536
    /// Clusters copied in one piece.
    private static let copyClusters = 16

    private let child: ProfileImage
    private var base: ProfileImage
    let counts: ReferenceCounts
    private let batchBytes: UInt64
    private var packed = PackedSpace()
    /// Words of the base that are written after the next sync: entries of L1 and L2 tables.
    private var pending: [(offset: UInt64, word: UInt64)] = []
    /// Clusters that lose a reference with the pending words, and those that lost one with the words before.
    private var dropped: [UInt64] = []
    private var droppedBefore: [UInt64] = []
    private var unsynced: UInt64 = 0
    private let buffer = Buffer(count: copyClusters << Int(Qcow2Profile.clusterBits))
    private let whole = Buffer(count: Int(Qcow2Profile.clusterSize))
    private let inflater: Inflater
    private(set) var report = Qcow2MergeReport()

    /// The L2 table of the base that the merge is at, as it will be.
    private var table = WordTable(count: 1)
    private var tableOffset: UInt64 = 0
    private var tableIndex = 0

    init(child: ProfileImage, base: ProfileImage, batchBytes: UInt64) throws(BlockError) {
        self.child = child
        self.base = base
        self.batchBytes = batchBytes
        counts = try ReferenceCounts(base)
        inflater = Inflater(child.header.compression.unitCompression, inputMax: 2 * Int(Qcow2Profile.clusterSize))
    }

    func run(_ progress: (Qcow2MergeReport) throws(BlockError) -> Void) throws(BlockError) {
        Step.reached("merge.started")
        try growL1()
        for index in 0..<Int(Qcow2Profile.tables(child.header.size)) where child.table(index) != 0 {
            try mergeTable(index, progress)
        }
        try packed.giveBack(counts)
        // The second sync is for the words of the first, the third for the counts of what these words dropped.
        try sync()
        try sync()
        try sync()
        if child.header.size > base.header.size {
            let size = child.header.size
            try base.changeHeader { $0.storeBigEndian(size, at: 24) }
        }
        Step.reached("merge.done")
        try progress(report)
    }

    /// Makes everything so far durable, then writes what may only be written after it.
    private func sync() throws(BlockError) {
        try counts.writeChanged()
        Step.reached("merge.data-written")
        try base.file.flush()
        Step.reached("merge.data-durable")
        // Nothing in the file refers to these any more.
        for cluster in droppedBefore where try counts.release(cluster) {
            let start = cluster << Qcow2Profile.clusterBits
            try base.file.discard(start..<(start + Qcow2Profile.clusterSize))
        }
        droppedBefore = dropped
        dropped = []
        var first = 0
        while first < pending.count {
            var end = first + 1
            while end < pending.count, end - first < 8192,
                pending[end].offset == pending[end - 1].offset + 8
            { end += 1 }
            let words = WordTable(count: end - first)
            for index in first..<end { words[index - first] = pending[index].word }
            try words.write(0..<words.count, to: base.file, at: pending[first].offset)
            first = end
        }
        pending.removeAll(keepingCapacity: true)
        unsynced = 0
        Step.reached("merge.mapped")
    }

    /// Gives the base an L1 table as long as the child's disk needs.
    private func growL1() throws(BlockError) {
        let needed = Int(Qcow2Profile.tables(child.header.size))
        guard needed > base.l1.count else { return }
        let old = base.l1Offset >> Qcow2Profile.clusterBits
        let oldClusters = Qcow2Profile.clusters(UInt64(base.l1.count) * 8)
        let clusterCount = Qcow2Profile.clusters(UInt64(needed) * 8)
        let place = try counts.allocateInOnePiece(Int(clusterCount))
        let offset = place.lowerBound << Qcow2Profile.clusterBits
        base.moveL1(to: offset, count: needed)
        let table = WordTable(count: Int(clusterCount * Qcow2Profile.tableEntries))
        for (index, entry) in base.l1.enumerated() { table[index] = entry }
        try table.write(0..<table.count, to: base.file, at: offset)
        try counts.writeChanged()
        try base.file.flush()
        Step.reached("merge.l1-written")
        try base.changeHeader { header in
            header.storeBigEndian(UInt32(truncatingIfNeeded: needed), at: 36)
            header.storeBigEndian(offset, at: 40)
        }
        Step.reached("merge.l1-moved")
        for cluster in 0..<oldClusters { try counts.release(old + cluster) }
    }
}

// MARK: - Tables

extension MergeRun {
    private func mergeTable(_ index: Int, _ progress: (Qcow2MergeReport) throws(BlockError) -> Void) throws(BlockError)
    {
        let entries = try WordTable(child.file, at: child.table(index), count: Int(Qcow2Profile.tableEntries))
        tableIndex = index
        tableOffset = base.table(index)
        table =
            if tableOffset == 0 { WordTable(count: entries.count) } else {
                try WordTable(base.file, at: tableOffset, count: entries.count)
            }
        let first = UInt64(index) * Qcow2Profile.tableEntries
        let count = Int(min(Qcow2Profile.clusters(child.header.size) - first, Qcow2Profile.tableEntries))
        var position = 0
        while position < count {
            switch try childEntry(entries, position) {
            case .absent: position += 1
            case .zero:
                try set(position, base.header.backingName == nil ? 0 : 1)
                report.zeroed += 1
                position += 1
            case .compressed(let host, let length):
                try copyCompressed(position, host, length)
                position += 1
            case .data(let host, _):
                var end = position + 1
                while end < count, end - position < Self.copyClusters,
                    case .data(let next, _) = try childEntry(entries, end),
                    next == host + UInt64(end - position) << Qcow2Profile.clusterBits
                { end += 1 }
                try copyPlain(position..<end, host)
                position = end
            }
            if unsynced >= batchBytes || pending.count >= Self.pendingMax {
                try sync()
                try progress(report)
            }
        }
    }

    private func guestOffset(_ position: Int) -> UInt64 {
        (UInt64(tableIndex) * Qcow2Profile.tableEntries + UInt64(position)) << Qcow2Profile.clusterBits
    }

    private func childEntry(_ entries: WordTable, _ position: Int) throws(BlockError) -> ProfileEntry {
        if let entry = ProfileEntry(entries[position], fileSize: child.fileSize) { return entry }
        throw child.corrupt("its L2 entry for guest offset \(guestOffset(position)) is wrong")
    }

    /// The base's entry. What this merge has placed lies past the end that the file had when it was opened.
    private func baseEntry(_ position: Int) throws(BlockError) -> ProfileEntry {
        if let entry = ProfileEntry(table[position], fileSize: 1 << 56) { return entry }
        throw base.corrupt("its L2 entry for guest offset \(guestOffset(position)) is wrong")
    }

    /// Changes an entry after the next sync; what it referred to loses a reference after the one that follows.
    private func set(_ position: Int, _ word: UInt64) throws(BlockError) {
        if table[position] == word { return }
        let old = try baseEntry(position)
        if tableOffset == 0 { try addTable() }
        dropped += old.clusters
        table[position] = word
        pending.append((tableOffset + UInt64(position) * 8, word))
    }

    /// Adds an empty L2 table, which the L1 table names after the next sync.
    private func addTable() throws(BlockError) {
        tableOffset = try counts.allocate(1).lowerBound << Qcow2Profile.clusterBits
        try base.file.write(ZeroPage.bytes, at: tableOffset)
        base.setTable(tableIndex, tableOffset)
        pending.append((base.l1Offset + UInt64(tableIndex) * 8, base.l1[tableIndex]))
    }

    /// Copies clusters that lie in one piece in the child.
    private func copyPlain(_ range: Range<Int>, _ host: UInt64) throws(BlockError) {
        let bytes = UnsafeMutableRawBufferPointer(
            rebasing: buffer.bytes[..<(range.count << Int(Qcow2Profile.clusterBits))])
        try child.file.read(into: bytes, at: host)
        try write(UnsafeRawBufferPointer(bytes), range)
        report.copied += UInt64(range.count)
    }

    /// Writes clusters over the base's own, or into new ones; neighbours together.
    private func write(_ bytes: UnsafeRawBufferPointer, _ range: Range<Int>) throws(BlockError) {
        var hosts: [UInt64] = []
        var missing = 0
        for position in range {
            if case .data(let host, true) = try baseEntry(position) {
                // Nobody reads it as long as the child is there: the child's cluster shadows it.
                hosts.append(host)
            } else {
                hosts.append(0)
                missing += 1
            }
        }
        var free: Range<UInt64> = 0..<0
        for index in hosts.indices where hosts[index] == 0 {
            if free.isEmpty { free = try counts.allocate(missing) }
            hosts[index] = free.lowerBound << Qcow2Profile.clusterBits
            free = (free.lowerBound + 1)..<free.upperBound
            missing -= 1
            try set(range.lowerBound + index, hosts[index] | Qcow2Geometry.copiedFlag)
        }
        var first = 0
        while first < hosts.count {
            var end = first + 1
            while end < hosts.count, hosts[end] == hosts[end - 1] + Qcow2Profile.clusterSize { end += 1 }
            let part = (first << Int(Qcow2Profile.clusterBits))..<(end << Int(Qcow2Profile.clusterBits))
            try base.file.write(UnsafeRawBufferPointer(rebasing: bytes[part]), at: hosts[first])
            first = end
        }
        unsynced += UInt64(bytes.count)
        report.bytesWritten += UInt64(bytes.count)
    }

    /// Copies a compressed cluster: its zstd frame where the base may have such, else what is in it.
    private func copyCompressed(_ position: Int, _ host: UInt64, _ longest: UInt64) throws(BlockError) {
        let length = Int(min(longest, child.fileSize - host, UInt64(inflater.input.bytes.count)))
        let input = UnsafeMutableRawBufferPointer(rebasing: inflater.input.bytes[..<length])
        try child.file.read(into: input, at: host)
        if child.header.compression == .zstd && base.header.compression == .zstd {
            // The entry knows the length in sectors only. Copying what follows too would make it longer each time.
            let frame = ZSTD_findFrameCompressedSize(input.baseAddress, length)
            if ZSTD_isError(frame) == 0, frame <= Qcow2Profile.payloadMax {
                let place = try packed.take(frame, counts)
                try base.file.write(UnsafeRawBufferPointer(rebasing: input[..<frame]), at: place)
                try set(position, Qcow2Profile.compressedEntry(host: place, length: frame))
                unsynced += UInt64(frame)
                report.bytesWritten += UInt64(frame)
                report.copiedCompressed += 1
                return
            }
        }
        if let problem = try inflater.inflate(0..<length, into: whole.bytes) {
            throw child.corrupt(
                "the compressed cluster for guest offset \(guestOffset(position)) is damaged: \(problem)")
        }
        try write(whole.readable, position..<(position + 1))
        report.copied += 1
    }
}
