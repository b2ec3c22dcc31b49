// One sparse file by itself, without what is below it: the directory in memory, tables in slices, and the way from an
// offset of the extent to a run of grains.
import Block

/// The metadata of a sparse file.
final class GrainTables: @unchecked Sendable {
    // Sendable because the directory is not changed after init, and the cache locks.

    let layout: SparseLayout
    let geometry: GrainGeometry
    let lower: any BlockDevice
    let lowerSize: UInt64
    let name: String
    /// Bytes of the extent; what its last grain has past them is not the disk's.
    let size: UInt64
    /// Of each table: its sector, or, of seSparse, its number + 1; 0 where there is none.
    private let directory: UnsafeMutablePointer<UInt32>
    /// Shared with the other files of the chain.
    private let cache: SliceCache
    private let firstSlice: UInt64

    /// A directory entry that cannot be followed.
    private static let badEntry = UInt32.max

    /// Reads the directory.
    ///
    /// - Parameter size: bytes of the extent, at most the layout's capacity.
    /// - Throws: `.tooLarge` when there is no memory left for it, or what reading throws.
    init(_ lower: any BlockDevice, _ layout: SparseLayout, size: UInt64, _ memory: inout VMDKMemory) throws(BlockError)
    {
        let share = try memory.take(for: layout)
        (cache, firstSlice) = (share.cache, share.firstSlice)
        self.lower = lower
        self.layout = layout
        self.size = size
        geometry = layout.geometry
        lowerSize = lower.info.size
        name = lower.info.name
        let count = layout.directoryCount
        directory = .allocate(capacity: count)
        directory.initialize(repeating: 0, count: count)
        try readDirectory(count)
    }

    deinit { directory.deallocate() }

    private func readDirectory(_ count: Int) throws(BlockError) {
        let entryBytes = Int(layout.directoryEntryBytes)
        let buffer = Buffer(count: min(count * entryBytes, 1 << 20))
        var index = 0
        while index < count {
            let part = min(count - index, buffer.bytes.count / entryBytes)
            let bytes = UnsafeMutableRawBufferPointer(rebasing: buffer.bytes[..<(part * entryBytes)])
            do throws(BlockError) {
                try lower.read(into: bytes, at: layout.directoryStart + UInt64(index * entryBytes))
            } catch { throw error.during("reading the grain directory of \(name)") }
            for place in 0..<part {
                directory[index + place] =
                    entryBytes == 4
                    ? buffer.readable.littleEndian(place * 4)
                    : seSparseEntry(buffer.readable.littleEndian(place * 8))
            }
            index += part
        }
    }

    /// The highest four bits are 1 where there is a table, whose number the lower half is.
    private func seSparseEntry(_ entry: UInt64) -> UInt32 {
        if entry == 0 { return 0 }
        let number = entry & 0xFFFF_FFFF
        guard entry >> 32 == 0x1000_0000, number < layout.tablesMax, number < UInt64(Self.badEntry - 1) else {
            return Self.badEntry
        }
        return UInt32(number) + 1
    }

    /// The run of grains that starts at an offset of the extent; at least one byte, at most up to `limit`.
    ///
    /// - Parameter limit: greater than `position`, at most the extent's size.
    /// - Returns: nil, with `.resident`, when the tables for it are not in memory. Never a run of kind `.corrupt`.
    /// - Throws: `.corrupt` when the tables are wrong at `position`, or what reading them throws.
    @inline(__always)
    func run(at position: UInt64, limit: UInt64, _ patience: Patience) throws(BlockError) -> GrainRun? {
        let geometry = geometry
        let cached = cache.withSlice(firstSlice &+ (position >> geometry.sliceShift)) { words in
            geometry.run(words, at: position, limit: limit)
        }
        guard let run = cached else { return try uncachedRun(at: position, limit: limit, patience) }
        return try checked(run, at: position)
    }

    @inline(never)
    private func uncachedRun(at position: UInt64, limit: UInt64, _ patience: Patience) throws(BlockError) -> GrainRun? {
        var index = Int(position >> geometry.tableShift)
        guard index < layout.directoryCount else {
            throw corrupt("its grain directory does not reach offset \(position)")
        }
        if directory[index] == 0 {
            // A whole table is missing, and perhaps the next ones.
            var end = limit
            while index + 1 < layout.directoryCount, UInt64(index + 1) << geometry.tableShift < limit {
                index += 1
                if directory[index] != 0 {
                    end = UInt64(index) << geometry.tableShift
                    break
                }
            }
            return GrainRun(kind: .absent, host: 0, length: end - position)
        }
        let table = try tableStart(index, for: position)
        let slice = position >> geometry.sliceShift
        let sliceInTable = slice & ((1 << (geometry.tableShift - geometry.sliceShift)) - 1)
        let buffer = Buffer(count: Int(geometry.sliceBytes))
        do throws(BlockError) {
            let offset = table + sliceInTable * geometry.sliceBytes
            switch patience {
            case .blocking: try lower.read(into: buffer.bytes, at: offset)
            case .resident: if try !lower.readResident(into: buffer.bytes, at: offset) { return nil }
            }
        } catch { throw error.during("reading a grain table of \(name)") }
        let run = insert(buffer.readable, slice, at: position, limit: limit)
        return try checked(run, at: position)
    }

    /// Keeps a slice as it was read, and decodes from it: another thread may push it out of the cache at once.
    private func insert(_ bytes: UnsafeRawBufferPointer, _ slice: UInt64, at position: UInt64, limit: UInt64)
        -> GrainRun
    {
        withUnsafeTemporaryAllocation(of: UInt64.self, capacity: cache.sliceWords) { words in
            words.initialize(repeating: 0)
            for index in 0..<Int(geometry.sliceEntries) {
                words[index] =
                    geometry.entries == .seSparse
                    ? bytes.littleEndian(index * 8) : UInt64(bytes.littleEndian(index * 4, as: UInt32.self))
            }
            guard let base = words.baseAddress else {
                return GrainRun(kind: .absent, host: 0, length: limit - position)
            }
            cache.insert(firstSlice + slice, base)
            return geometry.run(base, at: position, limit: limit)
        }
    }

    /// Where a table is in the file.
    private func tableStart(_ index: Int, for position: UInt64) throws(BlockError) -> UInt64 {
        let entry = directory[index]
        let bytes = geometry.tableBytes
        let start =
            geometry.entries == .seSparse
            ? layout.tablesStart + UInt64(entry &- 1) * bytes : UInt64(entry) * VMDK.sectorBytes
        guard entry != Self.badEntry || geometry.entries != .seSparse else {
            throw corrupt("the entry of its grain directory for offset \(position) has no meaning")
        }
        guard start >= VMDK.sectorBytes, start < lowerSize, bytes <= lowerSize - start else {
            throw corrupt("the grain table at \(start) for offset \(position) lies outside the file")
        }
        return start
    }

    /// A run that can be used, or the reason why it cannot.
    @inline(__always)
    private func checked(_ run: GrainRun, at position: UInt64) throws(BlockError) -> GrainRun {
        switch run.kind {
        case .corrupt: throw entryError(run.host, at: position)
        case .data where run.host &+ run.length > lowerSize:
            // The grains before the end of the file are right.
            if run.host >= lowerSize { throw entryError(GrainFault.pastEnd.rawValue, at: position) }
            return GrainRun(kind: .data, host: run.host, length: lowerSize - run.host)
        default: return run
        }
    }

    /// Starts reading the table that maps an offset, as advice.
    func prefetchTable(at position: UInt64) {
        let index = Int(position >> geometry.tableShift)
        guard index < layout.directoryCount, directory[index] != 0, let start = try? tableStart(index, for: position)
        else { return }
        lower.prefetch(start..<(start + geometry.tableBytes))
    }

    func corrupt(_ what: String) -> BlockError { BlockError(.corrupt, "reading the sparse file \(name): \(what)") }

    private func entryError(_ fault: UInt64, at position: UInt64) -> BlockError {
        let what = GrainFault(rawValue: fault)?.text ?? "it is wrong"
        return corrupt("the grain for offset \(position) cannot be read: \(what)")
    }
}

// MARK: - Compressed grains

extension GrainTables: CompressedUnits {
    /// Bytes before a compressed grain: its first sector on the disk, 64 bits, and its length in bytes, 32 bits.
    private static let markerBytes = 12

    var unitSize: UInt64 { geometry.grainMask + 1 }

    func makeInflater() -> Inflater { Inflater(.zlib, inputMax: 2 * Int(unitSize) + 1024) }

    func compressedEntry(at position: UInt64) throws(BlockError) -> UInt64 {
        guard let run = try run(at: position, limit: min(position + unitSize, size), .blocking), run.kind == .compressed
        else { throw corrupt("the grain at offset \(position) was compressed when it was mapped") }
        return run.host
    }

    func decompress(
        _ entry: UInt64, at position: UInt64, with inflater: Inflater, into target: UnsafeMutableRawBufferPointer
    ) throws(BlockError) {
        func damaged(_ what: String) -> BlockError {
            corrupt("the compressed grain for offset \(position), at \(entry) of the file, is damaged: \(what)")
        }
        guard entry < lowerSize else { throw damaged("it lies past the end of the file") }
        let room = Int(min(UInt64(inflater.input.bytes.count), lowerSize - entry))
        let sure = min(room, 4096)
        do throws(BlockError) {
            // What most grains need at least, then the rest.
            let head = UnsafeMutableRawBufferPointer(rebasing: inflater.input.bytes[..<sure])
            try lower.read(into: head, at: entry)
        } catch { throw error.during("reading a compressed grain of \(name)") }
        var range = 0..<room
        if layout.hasMarkers {
            guard room > Self.markerBytes else { throw damaged("the file ends inside it") }
            let bytes = inflater.input.readable
            let sector: UInt64 = bytes.littleEndian(0)
            let length = Int(bytes.littleEndian(8, as: UInt32.self))
            guard sector == position / VMDK.sectorBytes else { throw damaged("it is that of sector \(sector)") }
            guard length > 0, length <= room - Self.markerBytes else {
                throw damaged("its length of \(length) bytes is impossible, or the file ends inside it")
            }
            range = Self.markerBytes..<(Self.markerBytes + length)
        }
        if range.upperBound > sure {
            do throws(BlockError) {
                let rest = UnsafeMutableRawBufferPointer(rebasing: inflater.input.bytes[sure..<range.upperBound])
                try lower.read(into: rest, at: entry + UInt64(sure))
            } catch { throw error.during("reading a compressed grain of \(name)") }
        }
        // The last grain may be as short as the disk.
        let least = Int(min(unitSize, size - position))
        if let problem = try inflater.inflate(range, into: target, least: least) { throw damaged(problem) }
    }
}
