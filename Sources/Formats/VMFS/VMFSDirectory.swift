// Directories of VMFS: an array of entries (VMFS 3 and 5), or blocks of entries with a map that says which there are.
import Block

/// An entry of a directory, as it stands there.
struct VMFSDirectoryEntry: Sendable, Equatable {
    let name: String
    /// The address of the file descriptor.
    let address: UInt32
    let generation: UInt32
}

/// Reads the entries of directories.
struct VMFSDirectory: ~Copyable {
    /// The largest directory that is read; ESXi makes them for some ten thousand entries, which have 288 bytes each.
    private static let sizeMax: UInt64 = 64 << 20
    /// Bytes in an entry of VMFS 3 and 5, and of VMFS 6.
    private static let entrySize = 140
    private static let entrySize6 = 288

    private let bytes: Buffer
    private let name: String
    private let alignment: Int
    private let isVMFS6: Bool

    /// Reads a directory.
    ///
    /// - Throws: `.invalid` when the descriptor is not a directory's, `.corrupt` when the directory cannot be right, or
    ///   what reading throws.
    static func entries(_ descriptor: VMFSDescriptor, _ resources: VMFSResources) throws(BlockError)
        -> [VMFSDirectoryEntry]
    {
        let name = "the directory 0x\(hexadecimal(descriptor.address, 8)) of \(resources.span.info.name)"
        guard descriptor.kind == .directory else { throw BlockError(.invalid, "reading \(name): it is no directory") }
        guard descriptor.size <= sizeMax else {
            throw BlockError(.tooLarge, "reading \(name): it has \(descriptor.size) bytes")
        }
        if descriptor.size == 0 { return [] }
        let pieces = try VMFSLayout(descriptor, resources).allPieces()
        guard pieces.allSatisfy({ $0.kind == .data }) else {
            throw BlockError(.corrupt, "reading \(name): parts of it were never written")
        }
        let geometry = resources.geometry
        let buffer = Buffer(count: Int(descriptor.size))
        try VMFSResource.read(buffer.bytes, at: 0, pieces, resources.span)
        return try VMFSDirectory(
            bytes: buffer, name: name, alignment: Int(geometry.alignment), isVMFS6: geometry.isVMFS6
        ).entries()
    }

    private func entries() throws(BlockError) -> [VMFSDirectoryEntry] {
        isVMFS6 ? try entries6() : try entries5()
    }

    private func corrupt(_ what: String) -> BlockError { BlockError(.corrupt, "reading \(name): \(what)") }

    private func entries5() throws(BlockError) -> [VMFSDirectoryEntry] {
        var found: [VMFSDirectoryEntry] = []
        for index in 0..<(bytes.readable.count / Self.entrySize) {
            let start = index * Self.entrySize
            if let entry = try entry(at: start, nameAt: start + 12, length: 128) { found.append(entry) }
        }
        return found
    }

    /// An entry whose first twelve bytes are the same in all versions; nil for a free one, and for "." and "..".
    private func entry(at start: Int, nameAt: Int, length: Int) throws(BlockError) -> VMFSDirectoryEntry? {
        let bytes = bytes.readable
        let address: UInt32 = bytes.littleEndian(start + 4)
        if address == 0 { return nil }
        let text = bytes[nameAt..<(nameAt + length)].prefix { $0 != 0 }
        guard !text.isEmpty, text.count < length, !text.contains(0x2F), address & 7 == 4 else {
            throw corrupt("its entry at \(start) is damaged")
        }
        let name = String(decoding: text, as: UTF8.self)
        if name == "." || name == ".." { return nil }
        return VMFSDirectoryEntry(name: name, address: address, generation: bytes.littleEndian(start + 8))
    }

    // VMFS 6: a header of 64 KiB, then blocks of the size that metadata is aligned to.

    private static let header6 = 0x10000
    private static let blockHeader = 64
    private static let mapsMax = 128

    private func entries6() throws(BlockError) -> [VMFSDirectoryEntry] {
        let bytes = bytes.readable
        guard bytes.count >= Self.header6 else { throw corrupt("it ends inside its header") }
        let version: UInt32 = bytes.littleEndian(0)
        guard version == 0x00F5_0001 || version == 0x00FD_C001 else {
            throw corrupt("its version 0x\(hexadecimal(version, 8)) is not known")
        }
        let mapCount: UInt32 = bytes.littleEndian(0x0C)
        guard mapCount <= Self.mapsMax else { throw corrupt("it claims \(mapCount) maps of its blocks") }
        let blockCount = (bytes.count - Self.header6) / alignment
        // Half a byte for each block.
        let perMap = (alignment - Self.blockHeader) * 2
        var found: [VMFSDirectoryEntry] = []
        for map in 0..<Int(mapCount) {
            let number: UInt32 = bytes.littleEndian(0x10 + 4 * map)
            let start = try block(number, of: blockCount)
            guard bytes.littleEndian(start + 2, as: UInt16.self) == 3 else {
                throw corrupt("its block \(number) is no map of blocks")
            }
            for index in 0..<min(perMap, max(0, blockCount - map * perMap)) {
                let pair = bytes[start + Self.blockHeader + index / 2]
                let state = index % 2 == 0 ? pair >> 4 : pair & 15
                // Bits 0 and 1 are the kind, bit 3 says that the block was never written.
                if state & 3 == 1, state & 8 == 0 { try readBlock(map * perMap + index, into: &found) }
            }
        }
        return found
    }

    private func block(_ number: UInt32, of count: Int) throws(BlockError) -> Int {
        guard Int(number) < count else { throw corrupt("its block \(number) lies past its end") }
        return Self.header6 + Int(number) * alignment
    }

    private func readBlock(_ number: Int, into found: inout [VMFSDirectoryEntry]) throws(BlockError) {
        let bytes = bytes.readable
        let start = Self.header6 + number * alignment
        let slotsMax = min((alignment - Self.blockHeader) / Self.entrySize6, 448)
        let slots = Int(bytes.littleEndian(start + 4, as: UInt16.self))
        guard bytes.littleEndian(start + 2, as: UInt16.self) == 1, slots <= slotsMax else {
            throw corrupt("its block \(number) has no entries, though its map says so")
        }
        for slot in 0..<slots {
            // A set bit is a free slot.
            if bytes[start + 8 + slot / 8] >> UInt8(slot % 8) & 1 != 0 { continue }
            let position = start + Self.blockHeader + slot * Self.entrySize6
            guard bytes.littleEndian(position + 16, as: UInt64.self) == UInt64(position) else {
                throw corrupt("its entry at \(position) is damaged")
            }
            if let entry = try entry(at: position, nameAt: position + 24, length: 256) { found.append(entry) }
        }
    }
}
