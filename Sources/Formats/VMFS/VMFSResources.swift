// The system files that everything small lies in: sub-blocks, pointer blocks and descriptors, by cluster and item.
import Block

/// A run of a small file's bytes.
struct VMFSPiece: Sendable, Equatable {
    enum Kind: Sendable { case hole, unwritten, data }
    /// Where it begins in the file.
    var start: UInt64
    var length: UInt64
    var kind: Kind
    /// Where it lies on the volume, for data.
    var place: UInt64
}

extension [VMFSPiece] {
    /// Adds a run behind the last one, joined to it where it continues it.
    mutating func add(_ length: UInt64, _ kind: VMFSPiece.Kind, at place: UInt64) {
        let start = last.map { $0.start + $0.length } ?? 0
        if let last, last.kind == kind, kind != .data || last.place + last.length == place {
            self[count - 1].length += length
        } else {
            append(VMFSPiece(start: start, length: length, kind: kind, place: kind == .data ? place : 0))
        }
    }

    /// The index of the run with the byte at an offset, which must be inside the file.
    func index(at offset: UInt64) -> Int {
        var low = 0
        var high = count - 1
        while low < high {
            let middle = (low + high) / 2
            if self[middle].start + self[middle].length <= offset { low = middle + 1 } else { high = middle }
        }
        return low
    }
}

/// A resource file: a header, then groups of clusters; a group has a lock and a metadata block for each cluster, then
/// the items.
struct VMFSResource: Sendable {
    let size: UInt64
    private let pieces: [VMFSPiece]
    private let itemsPerCluster: UInt64
    private let clustersPerGroup: UInt64
    private let firstGroup: UInt64
    private let groupSize: UInt64
    private let itemSize: UInt64
    private let headerSize: UInt64

    /// The resource file with these runs of bytes.
    ///
    /// - Parameter itemSize: what its items must have.
    /// - Throws: `.corrupt` when its header cannot be right, or what reading throws.
    init(_ pieces: [VMFSPiece], itemSize: UInt64, of span: VMFSSpan, _ geometry: VMFSGeometry) throws(BlockError) {
        self.pieces = pieces
        self.itemSize = itemSize
        size = pieces.last.map { $0.start + $0.length } ?? 0
        headerSize = geometry.clusterHeaderSize
        guard size >= 512 else { throw BlockError(.corrupt, "it has only \(size) bytes") }
        let header = Buffer(count: 64)
        try Self.read(header.bytes, at: 0, pieces, span)
        let bytes = header.readable
        itemsPerCluster = UInt64(bytes.littleEndian(0, as: UInt32.self))
        clustersPerGroup = UInt64(bytes.littleEndian(4, as: UInt32.self))
        firstGroup = UInt64(bytes.littleEndian(8, as: UInt32.self))
        let items: UInt32 = bytes.littleEndian(12)
        groupSize = UInt64(bytes.littleEndian(16, as: UInt32.self))
        // A file of no items is there, too: VMFS 6 keeps .pbc.sf and does not use it.
        if itemsPerCluster == 0 { return }
        guard itemsPerCluster <= 65536, clustersPerGroup > 0, clustersPerGroup <= 65536, UInt64(items) == itemSize,
            groupSize >= clustersPerGroup * (headerSize + itemsPerCluster * itemSize)
        else {
            throw BlockError(
                .corrupt,
                "its header claims \(itemsPerCluster) items of \(items) bytes in a cluster, \(clustersPerGroup) "
                    + "clusters in a group of \(groupSize) bytes")
        }
    }

    /// Where in the file an item begins; nil when it has no such item.
    func offset(cluster: UInt64, item: UInt64) -> UInt64? {
        guard item < itemsPerCluster else { return nil }
        let (group, within) = cluster.quotientAndRemainder(dividingBy: clustersPerGroup)
        // Group and size have at most 36 and 32 bits.
        let (start, isTooFar) = group.multipliedReportingOverflow(by: groupSize)
        let rest = firstGroup + clustersPerGroup * headerSize + (within * itemsPerCluster + item) * itemSize
        guard !isTooFar, start < size, rest < size - start, itemSize <= size - start - rest else { return nil }
        return start + rest
    }

    /// Where the bytes of an item lie on the volume, in order; `offset` and `length` must be inside the file.
    func runs(at offset: UInt64, length: UInt64) -> [VMFSPiece] {
        var found: [VMFSPiece] = []
        var position = offset
        var index = pieces.index(at: offset)
        while position < offset + length {
            let piece = pieces[index]
            let within = position - piece.start
            let count = min(piece.length - within, offset + length - position)
            found.add(count, piece.kind, at: piece.place + within)
            position += count
            index += 1
        }
        return found
    }

    /// Reads bytes of a file by its runs.
    static func read(
        _ buffer: UnsafeMutableRawBufferPointer, at offset: UInt64, _ pieces: [VMFSPiece], _ span: VMFSSpan
    ) throws(BlockError) {
        var done = 0
        var index = pieces.index(at: offset)
        while done < buffer.count {
            guard index < pieces.count else { throw BlockError(.corrupt, "a file ends before its bytes do") }
            let piece = pieces[index]
            let within = offset + UInt64(done) - piece.start
            let count = Int(min(piece.length - within, UInt64(buffer.count - done)))
            let part = UnsafeMutableRawBufferPointer(rebasing: buffer[done..<(done + count)])
            if piece.kind == .data {
                try span.read(into: part, at: piece.place + within)
            } else {
                part.initializeMemory(as: UInt8.self, repeating: 0)
            }
            done += count
            index += 1
        }
    }
}

/// The resource files of a volume, loaded once and again when they have grown.
final class VMFSResources: Sendable {
    let span: VMFSSpan
    let geometry: VMFSGeometry
    private let loaded = Locked<[VMFSItem.Kind: VMFSResource]>([:])

    /// The addresses of the descriptors, all of them in the first cluster.
    private static let descriptors: [VMFSItem.Kind: UInt32] = [
        .descriptor: 0x0080_0004, .pointerBlock: 0x00C0_0004, .subBlock: 0x0100_0004,
        .secondPointerBlock: 0x0180_0004,
    ]
    private static let names: [VMFSItem.Kind: String] = [
        .descriptor: ".fdc.sf", .pointerBlock: ".pbc.sf", .subBlock: ".sbc.sf", .secondPointerBlock: ".pb2.sf",
    ]

    /// The resource files of the file system on a volume. What others need comes first.
    init(_ span: VMFSSpan, _ geometry: VMFSGeometry) throws(BlockError) {
        self.span = span
        self.geometry = geometry
        if geometry.secondPointerDescriptor != 0 { try load(.secondPointerBlock) }
        try load(.pointerBlock)
        try load(.subBlock)
        try load(.descriptor)
    }

    private func itemSize(_ kind: VMFSItem.Kind) -> UInt64 {
        switch kind {
        case .subBlock: geometry.subBlockSize
        case .descriptor: UInt64(geometry.descriptorSize)
        case .pointerBlock, .secondPointerBlock: UInt64(geometry.pointerBlockSize)
        }
    }

    /// The descriptor of a resource file, which is read without any of them.
    private func ownDescriptor(_ kind: VMFSItem.Kind) throws(BlockError) -> VMFSDescriptor {
        let address = Self.descriptors[kind] ?? 0
        let position =
            kind == .secondPointerBlock
            ? geometry.secondPointerDescriptor
            : geometry.firstDescriptor + UInt64(address >> 22) * UInt64(geometry.descriptorSize)
        return try readDescriptor(address, at: position)
    }

    private func load(_ kind: VMFSItem.Kind) throws(BlockError) {
        do throws(BlockError) {
            let layout = try VMFSLayout(try ownDescriptor(kind), self)
            let resource = try VMFSResource(try layout.allPieces(), itemSize: itemSize(kind), of: span, geometry)
            loaded.withLock { $0[kind] = resource }
        } catch { throw error.during("opening \(Self.names[kind] ?? "a system file") of \(span.info.name)") }
    }

    /// Where an item lies on the volume.
    ///
    /// - Throws: `.corrupt` when there is no such item.
    func runs(_ item: VMFSItem) throws(BlockError) -> [VMFSPiece] {
        for attempt in 0..<2 {
            guard let resource = loaded.withLock({ $0[item.kind] }) else { break }
            if let offset = resource.offset(cluster: item.cluster, item: item.item) {
                let runs = resource.runs(at: offset, length: itemSize(item.kind))
                if runs.allSatisfy({ $0.kind == .data }) { return runs }
            }
            // The file may have grown since it was loaded.
            if attempt == 0 {
                guard try ownDescriptor(item.kind).size != resource.size else { break }
                try load(item.kind)
            }
        }
        let name = Self.names[item.kind] ?? "a system file"
        throw BlockError(
            .corrupt, "item \(item.item) of cluster \(item.cluster) of \(name) of \(span.info.name) does not exist")
    }

    /// Reads the start of an item into a buffer that is not larger than it.
    func read(_ item: VMFSItem, into buffer: UnsafeMutableRawBufferPointer) throws(BlockError) {
        try VMFSResource.read(buffer, at: 0, try runs(item), span)
    }

    /// The file descriptor at an address.
    ///
    /// - Throws: `.corrupt` when there is none or it cannot be right, or what reading throws.
    func descriptor(_ address: UInt32) throws(BlockError) -> VMFSDescriptor {
        guard let item = geometry.item(UInt64(address)), item.kind == .descriptor else {
            throw BlockError(.corrupt, "0x\(hexadecimal(address, 8)) is not the address of a file descriptor")
        }
        let runs = try runs(item)
        guard runs.count == 1 else {
            throw BlockError(.corrupt, "the file descriptor 0x\(hexadecimal(address, 8)) lies in two places")
        }
        return try readDescriptor(address, at: runs[0].place)
    }

    private func readDescriptor(_ address: UInt32, at position: UInt64) throws(BlockError) -> VMFSDescriptor {
        let buffer = Buffer(count: geometry.descriptorSize)
        try span.read(into: buffer.bytes, at: position)
        return try VMFSDescriptor(Array(buffer.readable), address: address, at: position, geometry)
    }
}
