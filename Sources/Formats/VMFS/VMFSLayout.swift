// From a file's offsets to the volume's: the addresses in a descriptor, the pointer blocks behind them, and a bounded
// cache of these, each part of which must always read as it did when the file was opened.
import Block

/// Where a file's bytes lie on its volume. Everything is looked at once when it is made.
final class VMFSLayout: @unchecked Sendable {
    // Sendable because nothing but the cache changes after init, and the cache locks.

    /// A run of a file's bytes.
    struct Run {
        var kind: VMFSPiece.Kind
        /// Where it lies on the volume, for data.
        var place: UInt64
        var length: UInt64
    }

    /// Addresses that are kept, hashed and read together.
    private static let sliceShift: UInt64 = 9
    private static let sliceWords = 1 << Int(sliceShift)
    /// Pointer blocks that lie behind each other are read together, up to so many bytes.
    private static let readMax = 1 << 20

    let size: UInt64
    /// Bytes in blocks that the file has, whether they were written or not.
    private(set) var allocatedBytes: UInt64 = 0
    /// Bytes in blocks that were never written.
    private(set) var unwrittenBytes: UInt64 = 0
    /// Follows from every address, so that two layouts with the same one are the same.
    private(set) var digest: UInt64 = 0
    private let name: String
    private let resources: VMFSResources
    private let geometry: VMFSGeometry
    private let blockCount: UInt64
    /// For files in their descriptor or in sub-blocks: all of it.
    private var pieces: [VMFSPiece]?
    /// For files with the addresses of their blocks in the descriptor.
    private let direct: UnsafeMutablePointer<UInt64>?
    private let directCount: Int
    /// For files with pointer blocks: the addresses of those that have addresses of data.
    private let tables: UnsafeMutablePointer<UInt64>?
    private let tableCount: UInt64
    /// What each slice of these hashed to at first.
    private let hashes: UnsafeMutablePointer<UInt64>?
    private let cache: SliceCache?

    /// The layout of the file with a descriptor.
    ///
    /// - Parameter cacheBytes: memory for the addresses of files with pointer blocks; 4 MiB map 512 GiB.
    /// - Throws: `.corrupt` when an address cannot be followed, `.unsupported` for blocks shared copy on write, or what
    ///   reading throws.
    init(_ descriptor: VMFSDescriptor, _ resources: VMFSResources, cacheBytes: Int = 0) throws(BlockError) {
        let geometry = resources.geometry
        self.resources = resources
        self.geometry = geometry
        size = descriptor.size
        name = "the file with the descriptor 0x\(hexadecimal(descriptor.address, 8))"
        let unit = descriptor.addressing == .subBlocks ? geometry.subBlockSize : geometry.blockSize
        // At most 64 TiB, as the descriptor has checked.
        blockCount = (size + unit - 1) / unit
        let isDirect = descriptor.addressing == .direct
        let isIndirect = descriptor.addressing == .single || descriptor.addressing == .double
        directCount = isDirect ? Int(min(blockCount, UInt64(geometry.addressCount))) : 0
        direct = isDirect ? .allocate(capacity: max(directCount, 1)) : nil
        tableCount = isIndirect ? (blockCount + (1 << geometry.pointersShift) - 1) >> geometry.pointersShift : 0
        let sliceCount = tableCount << (geometry.pointersShift - Self.sliceShift)
        tables = isIndirect ? .allocate(capacity: max(Int(tableCount), 1)) : nil
        hashes = isIndirect ? .allocate(capacity: max(Int(sliceCount), 1)) : nil
        tables?.initialize(repeating: 0, count: Int(tableCount))
        hashes?.initialize(repeating: 0, count: Int(sliceCount))
        cache =
            isIndirect
            ? SliceCache(sliceWords: Self.sliceWords, sliceCount: sliceCount, bytes: max(cacheBytes, 1 << 16)) : nil
        let reach: UInt64 =
            switch descriptor.addressing {
            case .direct, .subBlocks: 1
            case .single: 1 << geometry.pointersShift
            case .double: 1 << (2 * geometry.pointersShift)
            case .resident, .none: .max
            }
        guard blockCount == 0 || (blockCount - 1) / reach < UInt64(geometry.addressCount) else {
            throw corrupt("has \(size) bytes, more than its addresses reach")
        }
        switch descriptor.addressing {
        case .none: pieces = []
        case .resident: setResident(descriptor)
        case .subBlocks: try setSubBlocks(descriptor)
        case .direct: try setDirect(descriptor)
        case .single, .double: try walk(descriptor)
        }
    }

    deinit {
        direct?.deallocate()
        tables?.deallocate()
        hashes?.deallocate()
    }

    private func corrupt(_ what: String) -> BlockError {
        BlockError(.corrupt, "\(name) of \(resources.span.info.name) \(what)")
    }

    private func mix(_ value: UInt64) { digest = Self.hash(digest, value) }

    /// One value more. For a given value each hash leads to another, so that no single change is lost.
    @inline(__always)
    private static func hash(_ hash: UInt64, _ value: UInt64) -> UInt64 {
        let mixed = (hash ^ value) &* 0x9E37_79B9_7F4A_7C15
        return (mixed ^ (mixed >> 29)) &+ 1
    }
}

// MARK: - Looking at everything

extension VMFSLayout {
    private func setResident(_ descriptor: VMFSDescriptor) {
        var all: [VMFSPiece] = []
        if size > 0 { all.add(size, .data, at: descriptor.position + UInt64(geometry.residentOffset)) }
        pieces = all
    }

    private func setSubBlocks(_ descriptor: VMFSDescriptor) throws(BlockError) {
        var all: [VMFSPiece] = []
        var left = size
        for address in descriptor.addresses(geometry).prefix(Int(blockCount)) {
            mix(address)
            let length = min(left, geometry.subBlockSize)
            left -= length
            if address == 0 {
                all.add(length, .hole, at: 0)
                continue
            }
            guard address & 7 == VMFSItem.Kind.subBlock.rawValue, let item = geometry.item(address) else {
                throw corrupt("has 0x\(hexadecimal(address, 8)) for the address of a sub-block")
            }
            var rest = length
            allocatedBytes += geometry.subBlockSize
            for run in try resources.runs(item) where rest > 0 {
                all.add(min(rest, run.length), .data, at: run.place)
                rest -= min(rest, run.length)
            }
        }
        pieces = all
    }

    private func setDirect(_ descriptor: VMFSDescriptor) throws(BlockError) {
        guard let direct else { return }
        let addresses = descriptor.addresses(geometry)
        for index in 0..<directCount {
            direct[index] = addresses[index]
            mix(addresses[index])
        }
        try count(direct, directCount, from: 0)
    }

    /// Checks addresses of blocks and counts what they are.
    private func count(_ words: UnsafePointer<UInt64>, _ count: Int, from block: UInt64) throws(BlockError) {
        var unwritten: UInt64 = 0
        var data: UInt64 = 0
        for index in 0..<count {
            switch geometry.block(words[index], index: block + UInt64(index)) {
            case .hole: break
            case .unwritten: unwritten += 1
            case .data: data += 1
            case .wrong(let wrong): throw wrongAddress(words[index], wrong, block + UInt64(index))
            }
        }
        allocatedBytes += (data + unwritten) << geometry.blockShift
        unwrittenBytes += unwritten << geometry.blockShift
    }

    private func wrongAddress(_ address: UInt64, _ wrong: VMFSBlock.Wrong, _ block: UInt64) -> BlockError {
        let isUnsupported = wrong == .copyOnWrite || wrong == .partlyZero
        let text =
            "reading \(resources.span.info.name): block \(block) of \(name), 0x\(hexadecimal(address, 8)), "
            + geometry.text(wrong)
        return BlockError(isUnsupported ? .unsupported : .corrupt, text)
    }

    /// Reads every pointer block.
    private func walk(_ descriptor: VMFSDescriptor) throws(BlockError) {
        guard let tables else { return }
        let addresses = descriptor.addresses(geometry)
        let pointers = UInt64(1) << geometry.pointersShift
        if descriptor.addressing == .single {
            for index in 0..<Int(tableCount) { tables[index] = addresses[index] }
        } else {
            let count = Int((tableCount + pointers - 1) >> geometry.pointersShift)
            try forEachTable(addresses.prefix(count)) { (index, words) throws(BlockError) in
                let first = UInt64(index) << geometry.pointersShift
                for within in 0..<min(pointers, tableCount - first) {
                    tables[Int(first + within)] = words[Int(within)]
                }
                mix(addresses[index])
            }
        }
        try forEachTable(UnsafeBufferPointer(start: tables, count: Int(tableCount))) {
            (index, words) throws(BlockError) in
            try keep(words, of: index)
        }
    }

    /// Checks, counts, hashes and caches the addresses of a pointer block.
    private func keep(_ words: UnsafePointer<UInt64>, of table: Int) throws(BlockError) {
        guard let hashes, let tables, let cache else { return }
        let first = UInt64(table) << geometry.pointersShift
        let used = min(UInt64(1) << geometry.pointersShift, blockCount - first)
        try count(words, Int(used), from: first)
        mix(tables[table])
        let firstSlice = first >> Self.sliceShift
        for slice in 0..<((used + (1 << Self.sliceShift) - 1) >> Self.sliceShift) {
            let part = words + Int(slice << Self.sliceShift)
            let hash = Self.hash(of: part)
            hashes[Int(firstSlice + slice)] = hash
            mix(hash)
            cache.insert(firstSlice + slice, part)
        }
    }

    private static func hash(of slice: UnsafePointer<UInt64>) -> UInt64 {
        var hash: UInt64 = 0
        for index in 0..<sliceWords { hash = self.hash(hash, slice[index]) }
        return hash
    }

    /// Runs a body on the words of each pointer block that is there; those that follow each other are read together.
    private func forEachTable<Addresses: RandomAccessCollection<UInt64>>(
        _ addresses: Addresses, _ body: (Int, UnsafePointer<UInt64>) throws(BlockError) -> Void
    ) throws(BlockError) where Addresses.Index == Int {
        let tableSize = geometry.pointerBlockSize
        let buffer = Buffer(count: Self.readMax)
        let words = UnsafeMutablePointer<UInt64>.allocate(capacity: 1 << Int(geometry.pointersShift))
        defer { words.deallocate() }
        var index = addresses.startIndex
        while index < addresses.endIndex {
            if addresses[index] == 0 {
                index += 1
                continue
            }
            let runs = try place(of: addresses[index])
            var count = 1
            if runs.count == 1 {
                while index + count < addresses.endIndex, (count + 1) * tableSize <= Self.readMax,
                    addresses[index + count] != 0,
                    let next = try? place(of: addresses[index + count]), next.count == 1,
                    next[0].place == runs[0].place + UInt64(count * tableSize)
                { count += 1 }
            }
            let bytes = UnsafeMutableRawBufferPointer(rebasing: buffer.bytes[..<(count * tableSize)])
            if runs.count == 1 {
                try resources.span.read(into: bytes, at: runs[0].place)
            } else {
                try VMFSResource.read(bytes, at: 0, runs, resources.span)
            }
            for number in 0..<count {
                let table = UnsafeRawBufferPointer(
                    rebasing: bytes[(number * tableSize)..<((number + 1) * tableSize)])
                widen(table, into: words)
                try body(index - addresses.startIndex + number, words)
            }
            index += count
        }
    }

    private func widen(_ bytes: UnsafeRawBufferPointer, into words: UnsafeMutablePointer<UInt64>) {
        if geometry.isVMFS6 {
            for index in 0..<(bytes.count / 8) { words[index] = bytes.littleEndian(index * 8) }
        } else {
            for index in 0..<(bytes.count / 4) {
                words[index] = UInt64(bytes.littleEndian(index * 4, as: UInt32.self))
            }
        }
    }

    /// Where a pointer block lies on the volume. Its address says what kind of place it is in.
    private func place(of address: UInt64) throws(BlockError) -> [VMFSPiece] {
        let length = UInt64(geometry.pointerBlockSize)
        if case .data(let place) = geometry.block(address, index: 0), address & 7 == 1 {
            return [VMFSPiece(start: 0, length: length, kind: .data, place: place)]
        }
        guard let item = geometry.item(address), item.kind != .descriptor,
            item.kind != .subBlock || geometry.subBlockSize >= length
        else { throw corrupt("has 0x\(hexadecimal(address, 8)) for the address of a pointer block") }
        return try resources.runs(item)
    }
}

// MARK: - Looking up

extension VMFSLayout {
    /// The run that starts at an offset; at least one byte, at most up to `limit`.
    ///
    /// - Parameter limit: greater than `position`, at most the file's size.
    /// - Returns: nil, with `.resident`, when the addresses are not in memory.
    /// - Throws: `.changed` when a pointer block is no longer what it was, or what reading it throws.
    @inline(__always)
    func run(at position: UInt64, limit: UInt64, _ patience: Patience) throws(BlockError) -> Run? {
        if let tables, let cache {
            let block = position >> geometry.blockShift
            let table = block >> geometry.pointersShift
            if tables[Int(table)] == 0 { return holes(from: table, position, limit) }
            let slice = block >> Self.sliceShift
            let first = slice << Self.sliceShift
            let cached = cache.withSlice(slice) { words in
                scan(words, first, Self.sliceWords, at: position, limit: limit)
            }
            if let cached { return cached }
            return try uncachedRun(slice, at: position, limit: limit, patience)
        }
        if let direct { return scan(direct, 0, directCount, at: position, limit: limit) }
        return pieceRun(at: position, limit: limit)
    }

    private func pieceRun(at position: UInt64, limit: UInt64) -> Run? {
        guard let pieces, !pieces.isEmpty else { return nil }
        let piece = pieces[pieces.index(at: position)]
        let within = position - piece.start
        return Run(
            kind: piece.kind, place: piece.place + within, length: min(piece.length - within, limit - position))
    }

    /// The run of a hole that begins in a pointer block that is not there, with those behind it.
    private func holes(from table: UInt64, _ position: UInt64, _ limit: UInt64) -> Run {
        let shift = geometry.pointersShift + geometry.blockShift
        var next = table + 1
        while next < tableCount, next << shift < limit, tables?[Int(next)] == 0 { next += 1 }
        let end = next << shift
        return Run(kind: .hole, place: 0, length: min(end, limit) - position)
    }

    /// The run at a position, from addresses that were checked before.
    @inline(__always)
    private func scan(
        _ words: UnsafePointer<UInt64>, _ firstBlock: UInt64, _ count: Int, at position: UInt64, limit: UInt64
    ) -> Run {
        let geometry = geometry
        var block = position >> geometry.blockShift
        var index = Int(block &- firstBlock)
        let within = position & (geometry.blockSize &- 1)
        var run = Run(kind: .hole, place: 0, length: 0)
        var start: UInt64 = 0
        let first = geometry.block(words[index], index: block)
        switch first {
        case .data(let place):
            run.kind = .data
            start = place
            run.place = place &+ within
        case .unwritten: run.kind = .unwritten
        case .hole, .wrong: run.kind = .hole
        }
        var end = (block &+ 1) << geometry.blockShift
        while end < limit {
            index &+= 1
            block &+= 1
            if index >= count { break }
            let next = geometry.block(words[index], index: block)
            if case .data = first {
                start = start &+ geometry.blockSize
                if next != .data(start) { break }
            } else if next != first {
                break
            }
            end = end &+ geometry.blockSize
        }
        run.length = min(end, limit) &- position
        return run
    }

    @inline(never)
    private func uncachedRun(_ slice: UInt64, at position: UInt64, limit: UInt64, _ patience: Patience)
        throws(BlockError) -> Run?
    {
        guard patience == .blocking, let tables, let hashes, let cache else { return nil }
        let perTable = geometry.pointersShift - Self.sliceShift
        let buffer = Buffer(count: Self.sliceWords * geometry.addressSize)
        let offset = (slice & ((1 << perTable) - 1)) * UInt64(buffer.bytes.count)
        let place = try place(of: tables[Int(slice >> perTable)])
        try VMFSResource.read(buffer.bytes, at: offset, place, resources.span)
        let words = UnsafeMutablePointer<UInt64>.allocate(capacity: Self.sliceWords)
        defer { words.deallocate() }
        widen(buffer.readable, into: words)
        guard Self.hash(of: words) == hashes[Int(slice)] else {
            throw BlockError(
                .changed,
                "reading \(resources.span.info.name): the pointer blocks of \(name) changed while it was being read")
        }
        cache.insert(slice, words)
        return scan(words, slice << Self.sliceShift, Self.sliceWords, at: position, limit: limit)
    }

    /// All runs of a small file: a directory, a system file.
    ///
    /// - Throws: `.tooLarge` for a file of more than 64 GiB.
    func allPieces() throws(BlockError) -> [VMFSPiece] {
        guard size <= 64 << 30 else {
            throw BlockError(.tooLarge, "\(name) has \(size) bytes, more than a system file can have")
        }
        if let pieces { return pieces }
        var all: [VMFSPiece] = []
        var position: UInt64 = 0
        while position < size {
            guard let run = try run(at: position, limit: size, .blocking) else { break }
            all.add(run.length, run.kind, at: run.place)
            position += run.length
        }
        return all
    }
}
