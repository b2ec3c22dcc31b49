// The L2 tables of an image that is being written: a bounded number of slices in memory, the others in the file.
import Block

/// The mapping of a new image in slices of 4 KiB, 32 MiB of disk each. Used under the writer's lock.
///
/// A slice that has to make room is written into its table's cluster in the file, and read again if it is needed:
/// nobody sees the tables before the header is there.
final class MappingTables {
    static let sliceEntries = 512
    private static let sliceBytes = sliceEntries * 8
    /// log2 of the slices in a table.
    private static let slicesPerTableShift: UInt64 = 4

    private struct Slot {
        var slice: UInt64
        var isChanged: Bool
        var wasUsed: Bool
    }

    private let file: any ImageFile
    private let clusters: HostClusters
    private let capacity: Int
    private let words: UnsafeMutablePointer<UInt64>
    private var slots: [Slot] = []
    private var slotOf: [UInt64: Int] = [:]
    private var hand = 0
    /// The offset of each table in the file, or 0; the lowest bit says that the table has slices.
    private var tables: [UInt64]

    /// Tables for a disk of `size` bytes, with up to `capacity` slices in memory.
    init(size: UInt64, capacity: Int, file: any ImageFile, clusters: HostClusters) {
        self.file = file
        self.clusters = clusters
        self.capacity = capacity
        tables = [UInt64](repeating: 0, count: Int(Qcow2Profile.tables(size)))
        // Memory that is never touched is never there.
        words = .allocate(capacity: capacity * Self.sliceEntries)
    }

    deinit { words.deallocate() }

    /// Slices that are in memory.
    var slicesInMemory: Int { slots.count }

    /// The entries of the slice that maps a cluster.
    ///
    /// - Parameter create: whether to make the slice if there is none.
    /// - Returns: nil where there is none; valid until the next call.
    private func slice(_ number: UInt64, create: Bool) throws(BlockError) -> UnsafeMutablePointer<UInt64>? {
        if let slot = slotOf[number] {
            slots[slot].wasUsed = true
            slots[slot].isChanged = slots[slot].isChanged || create
            return words + slot * Self.sliceEntries
        }
        let table = Int(number >> Self.slicesPerTableShift)
        if tables[table] == 0, !create { return nil }
        let slot = try freeSlot()
        let entries = words + slot * Self.sliceEntries
        if tables[table] > 1 {
            let bytes = UnsafeMutableRawBufferPointer(start: entries, count: Self.sliceBytes)
            try file.read(into: bytes, at: place(number))
            for index in 0..<Self.sliceEntries { entries[index] = UInt64(bigEndian: entries[index]) }
        } else {
            entries.initialize(repeating: 0, count: Self.sliceEntries)
        }
        tables[table] |= create ? 1 : 0
        slots[slot] = Slot(slice: number, isChanged: create, wasUsed: true)
        slotOf[number] = slot
        return entries
    }

    private func freeSlot() throws(BlockError) -> Int {
        if slots.count < capacity {
            slots.append(Slot(slice: .max, isChanged: false, wasUsed: false))
            return slots.count - 1
        }
        while slots[hand].wasUsed {
            slots[hand].wasUsed = false
            hand = (hand + 1) % capacity
        }
        let slot = hand
        hand = (hand + 1) % capacity
        try writeOut(slot)
        slotOf[slots[slot].slice] = nil
        slots[slot].slice = .max
        return slot
    }

    /// Where a slice whose table has a cluster is in the file.
    private func place(_ slice: UInt64) -> UInt64 {
        (tables[Int(slice >> Self.slicesPerTableShift)] & ~1)
            + (slice & ((1 << Self.slicesPerTableShift) - 1)) * UInt64(Self.sliceBytes)
    }

    private func writeOut(_ slot: Int) throws(BlockError) {
        guard slots[slot].isChanged, slots[slot].slice != .max else { return }
        let table = Int(slots[slot].slice >> Self.slicesPerTableShift)
        if tables[table] <= 1 { tables[table] = try clusters.allocate(1) | 1 }
        let buffer = Buffer(count: Self.sliceBytes)
        for index in 0..<Self.sliceEntries {
            buffer.bytes.storeBigEndian(words[slot * Self.sliceEntries + index], at: index * 8)
        }
        try file.write(buffer.readable, at: place(slots[slot].slice))
        slots[slot].isChanged = false
    }

    /// The first cluster of a range that has an entry already.
    func firstEntry(in range: Range<UInt64>) throws(BlockError) -> UInt64? {
        let perSlice = UInt64(Self.sliceEntries)
        var cluster = range.lowerBound
        while cluster < range.upperBound {
            let table = cluster / Qcow2Profile.tableEntries
            if tables[Int(table)] == 0 {
                cluster = (table + 1) * Qcow2Profile.tableEntries
                continue
            }
            let number = cluster / perSlice
            let end = min((number + 1) * perSlice, range.upperBound)
            if let entries = try slice(number, create: false) {
                while cluster < end {
                    if entries[Int(cluster % perSlice)] != 0 { return cluster }
                    cluster += 1
                }
            }
            cluster = end
        }
        return nil
    }

    /// Sets the entries of a range of clusters.
    func set(_ range: Range<UInt64>, _ entry: (UInt64) -> UInt64) throws(BlockError) {
        let perSlice = UInt64(Self.sliceEntries)
        var cluster = range.lowerBound
        while cluster < range.upperBound {
            let number = cluster / perSlice
            let end = min((number + 1) * perSlice, range.upperBound)
            guard let entries = try slice(number, create: true) else { return }
            while cluster < end {
                entries[Int(cluster % perSlice)] = entry(cluster)
                cluster += 1
            }
        }
    }

    /// Writes what is in memory, then the L1 table.
    ///
    /// - Returns: where the L1 table is, and its entries, at least 1.
    func finish() throws(BlockError) -> (offset: UInt64, entries: UInt64) {
        for slot in slots.indices.sorted(by: { slots[$0].slice < slots[$1].slice }) { try writeOut(slot) }
        let count = max(UInt64(tables.count), 1)
        let clusterCount = Qcow2Profile.clusters(count * 8)
        let offset = try clusters.allocate(clusterCount)
        let buffer = Buffer(count: Int(clusterCount << Qcow2Profile.clusterBits))
        buffer.bytes.initializeMemory(as: UInt8.self, repeating: 0)
        for (index, table) in tables.enumerated() where table > 1 {
            buffer.bytes.storeBigEndian(table & ~1 | Qcow2Geometry.copiedFlag, at: index * 8)
        }
        try file.write(buffer.readable, at: offset)
        return (offset, count)
    }
}
