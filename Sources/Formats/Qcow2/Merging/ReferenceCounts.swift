// Reference counts of an image that is changed in place: which clusters are free, and how they stay right in a crash.
import Block

/// Counts references to the clusters of an existing file, and finds free ones.
///
/// Counts in the file are never lower than the references that the file can have after a crash: a count is raised
/// before the reference is written and synced, and lowered after its removal is. So blocks may be written any time.
final class ReferenceCounts {
    /// Blocks in memory, 64 KiB each; they count 128 GiB of the file.
    static let blocksMax = 64

    /// A refcount block as it is in the file: big-endian counts.
    private final class Block {
        let buffer = Buffer(count: Int(Qcow2Profile.clusterSize))
        var isChanged = false
        var lastUse: UInt64 = 0
        let count = Int(Qcow2Profile.countsPerBlock)

        /// Counts of zero.
        init() { buffer.bytes.initializeMemory(as: UInt8.self, repeating: 0) }

        init(_ file: any ImageFile, at offset: UInt64) throws(BlockError) {
            try file.read(into: buffer.bytes, at: offset)
        }

        subscript(_ index: Int) -> UInt16 {
            get { buffer.readable.bigEndian(index * 2) }
            set {
                buffer.bytes.storeBigEndian(newValue, at: index * 2)
                isChanged = true
            }
        }
    }

    private let file: any ImageFile
    private var table: WordTable
    private var tableOffset: UInt64
    private var blocks: [Int: Block] = [:]
    private var clock: UInt64 = 0
    /// Every cluster before it is in use.
    var search: UInt64 = 1
    private let image: ProfileImage

    init(_ image: ProfileImage) throws(BlockError) {
        self.image = image
        file = image.file
        tableOffset = image.refcountTableOffset
        let count = Int(image.refcountTableClusters * Qcow2Profile.tableEntries)
        table = try WordTable(file, at: tableOffset, count: count)
        for offset in offsets where offset & Qcow2Profile.clusterMask != 0 || offset >= image.fileSize {
            throw image.corrupt("its refcount table points at \(offset), where no block can be")
        }
        try checkTables()
    }

    /// Where the blocks are.
    private var offsets: [UInt64] { (0..<table.count).map { table[$0] }.filter { $0 != 0 } }

    /// Metadata without a count would be taken for free and written over.
    private func checkTables() throws(BlockError) {
        func check(_ offset: UInt64, _ bytes: UInt64) throws(BlockError) {
            for cluster in (offset >> Qcow2Profile.clusterBits)..<Qcow2Profile.clusters(offset + bytes)
            where try self.count(cluster) == 0 {
                throw image.corrupt("the table in cluster \(cluster) has no reference count")
            }
        }
        try check(0, 1)
        try check(image.l1Offset, UInt64(image.l1.count) * 8)
        try check(tableOffset, UInt64(table.count) * 8)
        for offset in offsets { try check(offset, 1) }
        for index in image.l1.indices where image.table(index) != 0 { try check(image.table(index), 1) }
    }

    /// The block that counts a cluster; nil where there is none yet.
    private func block(_ index: Int) throws(BlockError) -> Block? {
        clock += 1
        if let block = blocks[index] {
            block.lastUse = clock
            return block
        }
        guard index < table.count, table[index] != 0 else { return nil }
        return try keep(Block(file, at: table[index]), index)
    }

    private func keep(_ block: Block, _ index: Int) throws(BlockError) -> Block {
        if blocks.count >= Self.blocksMax, let oldest = blocks.min(by: { $0.value.lastUse < $1.value.lastUse }) {
            try write(oldest.key, oldest.value)
            blocks[oldest.key] = nil
        }
        block.lastUse = clock
        blocks[index] = block
        return block
    }

    private func write(_ index: Int, _ block: Block) throws(BlockError) {
        if !block.isChanged { return }
        try file.write(block.buffer.readable, at: table[index])
        block.isChanged = false
    }

    private func place(_ cluster: UInt64) -> (block: Int, index: Int) {
        (Int(cluster / Qcow2Profile.countsPerBlock), Int(cluster % Qcow2Profile.countsPerBlock))
    }

    /// The references to a cluster.
    func count(_ cluster: UInt64) throws(BlockError) -> UInt16 {
        let place = place(cluster)
        return try block(place.block)?[place.index] ?? 0
    }

    /// Adds a reference to a cluster that is in use already.
    func add(_ cluster: UInt64) throws(BlockError) {
        let place = place(cluster)
        guard let block = try block(place.block), block[place.index] > 0, block[place.index] < .max else {
            throw image.corrupt("the reference count of cluster \(cluster) cannot be raised")
        }
        block[place.index] += 1
    }

    /// Removes a reference to a cluster, which is free after the last one.
    ///
    /// - Returns: whether it is free now.
    @discardableResult
    func release(_ cluster: UInt64) throws(BlockError) -> Bool {
        let place = place(cluster)
        guard let block = try block(place.block), block[place.index] > 0 else {
            throw image.corrupt("cluster \(cluster) is used but has no reference count")
        }
        block[place.index] -= 1
        if block[place.index] > 0 { return false }
        search = min(search, cluster)
        return true
    }

    /// Takes the first free clusters that lie in one piece, with a count of 1 each.
    ///
    /// - Parameter most: as many as that at most, at least 1.
    func allocate(_ most: Int) throws(BlockError) -> Range<UInt64> {
        while true {
            let place = place(search)
            if place.block >= table.count { try growTable() }
            guard let block = try block(place.block) else {
                try addBlock(place.block, at: search)
                search += 1
                continue
            }
            var first = place.index
            while first < block.count, block[first] != 0 { first += 1 }
            if first == block.count {
                search = UInt64(place.block + 1) * Qcow2Profile.countsPerBlock
                continue
            }
            var end = first
            while end < block.count, end - first < most, block[end] == 0 {
                block[end] = 1
                end += 1
            }
            let start = UInt64(place.block) * Qcow2Profile.countsPerBlock
            search = start + UInt64(end)
            return (start + UInt64(first))..<search
        }
    }

    /// Takes free clusters in one piece, at most as many as a block counts.
    func allocateInOnePiece(_ count: Int) throws(BlockError) -> Range<UInt64> {
        var tooShort: [UInt64] = []
        while true {
            let run = try allocate(count)
            if run.count == count {
                for cluster in tooShort { try release(cluster) }
                return run
            }
            tooShort += run
        }
    }

    /// Adds the block that counts a free cluster, in that cluster. The table names it once it is durable.
    private func addBlock(_ index: Int, at cluster: UInt64) throws(BlockError) {
        let block = Block()
        block[place(cluster).index] = 1
        table[index] = cluster << Qcow2Profile.clusterBits
        clock += 1
        try write(index, try keep(block, index))
        try file.flush()
        try table.write(index..<(index + 1), to: file, at: tableOffset)
    }

    /// Moves the table behind everything that it counts, with room for more: its first new block and the new table
    /// are written and synced before the header names them.
    private func growTable() throws(BlockError) {
        let index = table.count
        let oldClusters = UInt64(table.count) / Qcow2Profile.tableEntries
        let newClusters = oldClusters + 1
        guard newClusters << Qcow2Profile.clusterBits <= Qcow2Header.refcountTableBytesMax else {
            throw BlockError(.tooLarge, "merging with \(file.name): the image cannot grow any more")
        }
        let first = UInt64(index) * Qcow2Profile.countsPerBlock
        let block = Block()
        for place in 0...Int(newClusters) { block[place] = 1 }
        let longer = WordTable(count: index + Int(Qcow2Profile.tableEntries))
        longer.buffer.bytes.copyMemory(from: table.buffer.readable)
        table = longer
        table[index] = first << Qcow2Profile.clusterBits
        clock += 1
        try write(index, try keep(block, index))
        let oldOffset = tableOffset
        tableOffset = (first + 1) << Qcow2Profile.clusterBits
        try table.write(0..<table.count, to: file, at: tableOffset)
        try file.flush()
        let offset = tableOffset
        try image.changeHeader { header in
            header.storeBigEndian(offset, at: 48)
            header.storeBigEndian(UInt32(truncatingIfNeeded: newClusters), at: 56)
        }
        for cluster in 0..<oldClusters { try release((oldOffset >> Qcow2Profile.clusterBits) + cluster) }
    }

    /// Writes the blocks that have changed.
    func writeChanged() throws(BlockError) {
        for (index, block) in blocks.sorted(by: { $0.key < $1.key }) { try write(index, block) }
    }
}
