// A stream-optimised VMDK written from its first byte to its last, as OVF and OVA tools take it: a header that says
// that the directory is at the end, compressed grains, their tables behind them, the directory, the footer.
public import Block
import Glibc

/// Writes a stream-optimised VMDK. The bytes of the file follow from the disk's, its size, its name and its content id.
///
/// The disk comes in order, without gaps; grains of zeros take no room. Calls come one at a time.
public final class StreamOptimizedWriter: @unchecked Sendable {
    // Sendable because its callers call one after the other, under a lock of their own or on one thread.

    /// Takes the next bytes of the file.
    public typealias Output = @Sendable (UnsafeRawBufferPointer) throws(BlockError) -> Void

    /// Bytes in a grain.
    public static let grainBytes = 65536
    private static let grainSectors: UInt64 = 128
    private static let tableEntries = 512
    private static let descriptorSectors = 20
    /// zlib's: 3 is twice as fast as 6, with files a few hundredths larger.
    private static let level: Int32 = 3

    /// Bytes on the disk that comes in; the VMDK has whole sectors.
    public let size: UInt64
    /// The disk's bytes so far.
    public private(set) var position: UInt64 = 0
    private let name: String
    private let contentID: UInt32
    private let capacity: UInt64
    private let output: Output
    private let compressors: GrainCompressors
    private let partial = Buffer(count: grainBytes)
    private var partialCount = 0
    /// Sectors of the file so far.
    private var sector: UInt64 = 0
    private var directory: [UInt32]
    private var table: (index: Int, entries: [UInt32])?

    /// Begins a file.
    ///
    /// - Parameters:
    ///   - size: the disk's size in bytes, at least 1, at most 256 TiB.
    ///   - name: what the file will be called, which is recorded in it; without its directory.
    ///   - contentID: for the descriptor. By default a random one: it says that no other disk has the same content,
    ///     and comes before the content is known.
    ///   - output: takes the file's bytes.
    /// - Throws: `.invalid`, `.tooLarge`, or what the output throws.
    public init(size: UInt64, name: String, contentID: UInt32? = nil, output: @escaping Output) throws(BlockError) {
        if size == 0 { throw BlockError(.invalid, "writing \(name): a VMDK has at least one sector") }
        let tableReach = UInt64(Self.grainBytes * Self.tableEntries)
        let tables = (size - 1) / tableReach + 1
        guard tables * 4 <= VMDK.directoryBytesMax else {
            throw BlockError(.tooLarge, "writing \(name): a disk of \(size) bytes is larger than 256 TiB")
        }
        self.size = size
        self.name = name
        // None of those that mean something.
        self.contentID = contentID ?? .random(in: 1..<VMDKDescriptor.untouched)
        self.output = output
        capacity = (size + VMDK.sectorBytes - 1) / VMDK.sectorBytes
        directory = [UInt32](repeating: 0, count: Int(tables))
        let processors = max(1, min(8, Int(sysconf(Int32(_SC_NPROCESSORS_ONLN)))))
        compressors = try GrainCompressors(level: Self.level, threads: processors)
        do throws(BlockError) {
            try put(header(directorySector: .max))
            try put(descriptor())
            try pad(to: Self.grainSectors)
        } catch {
            compressors.stop()
            throw error
        }
    }

    deinit { compressors.stop() }

    /// Adds bytes of the disk.
    ///
    /// - Throws: `.invalid` when they do not follow what came before, `.tooLarge` when the file grows beyond 2 TiB, or
    ///   what the output throws; the file is of no use then.
    public func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws(BlockError) {
        try check(offset, UInt64(bytes.count))
        var done = 0
        while done < bytes.count {
            let count = min(bytes.count - done, Self.grainBytes - partialCount)
            let piece = UnsafeRawBufferPointer(rebasing: bytes[done..<(done + count)])
            if count == Self.grainBytes {
                try addGrain(piece, number: position / UInt64(Self.grainBytes))
            } else {
                UnsafeMutableRawBufferPointer(rebasing: partial.bytes[partialCount..<(partialCount + count)])
                    .copyMemory(from: piece)
                partialCount += count
                if partialCount == Self.grainBytes { try addPartial() }
            }
            done += count
            position += UInt64(count)
        }
    }

    /// Adds zeros to the disk.
    ///
    /// - Throws: as `write`.
    public func zero(_ range: Range<UInt64>) throws(BlockError) {
        try check(range.lowerBound, range.count64)
        while position < range.upperBound {
            let inside = position % UInt64(Self.grainBytes)
            if inside == 0, partialCount == 0 {
                // Whole grains are left out.
                let whole = (range.upperBound - position) / UInt64(Self.grainBytes) * UInt64(Self.grainBytes)
                position += whole
                if whole > 0 { continue }
            }
            let count = min(range.upperBound - position, UInt64(Self.grainBytes) - inside)
            try write(UnsafeRawBufferPointer(rebasing: ZeroPage.bytes[..<Int(count)]), at: position)
        }
    }

    /// Ends the file.
    ///
    /// - Throws: `.invalid` when bytes of the disk are missing, or as `write`.
    public func finish() throws(BlockError) {
        defer { compressors.stop() }
        guard position == size else {
            throw BlockError(.invalid, "writing \(name): only \(position) of \(size) bytes of the disk have come")
        }
        if partialCount > 0 { try addPartial() }
        while let grain = try compressors.next(waits: true) { try putGrain(grain) }
        try putTable()
        let bytes = directory.count * 4
        try putMarker(type: 2, sectors: UInt64(bytes + 511) / 512)
        let place = sector
        try putEntries(directory)
        try putMarker(type: 3, sectors: 1)
        try put(header(directorySector: place))
        try putMarker(type: 0, sectors: 0)
    }

    /// Ends the work on a file that is given up.
    public func abandon() { compressors.stop() }

    private func check(_ offset: UInt64, _ count: UInt64) throws(BlockError) {
        guard offset == position, count <= size - position else {
            throw BlockError(
                .invalid, "writing \(name): \(count) bytes at \(offset) do not follow the \(position) before them")
        }
    }

    // MARK: - Grains

    private func addPartial() throws(BlockError) {
        UnsafeMutableRawBufferPointer(rebasing: partial.bytes[partialCount...])
            .initializeMemory(as: UInt8.self, repeating: 0)
        // `position` may be at the grain's end or at the disk's, or before the last bytes were counted.
        let number = min(position, size - 1) / UInt64(Self.grainBytes)
        partialCount = 0
        try addGrain(partial.readable, number: number)
    }

    private func addGrain(_ bytes: UnsafeRawBufferPointer, number: UInt64) throws(BlockError) {
        if let start = bytes.baseAddress, bytes[0] == 0, memcmp(start, start + 1, bytes.count - 1) == 0 { return }
        var free = compressors.free()
        while free == nil {
            guard let done = try compressors.next(waits: true) else { break }
            try putGrain(done)
            free = compressors.free()
        }
        guard let grain = free else { throw BlockError(.noMemory, "writing \(name): there is no grain to fill") }
        grain.input.bytes.copyMemory(from: bytes)
        grain.number = number
        compressors.compress(grain)
        while let done = try compressors.next(waits: false) { try putGrain(done) }
    }

    private func putGrain(_ grain: CompressedGrain) throws(BlockError) {
        let index = Int(grain.number) / Self.tableEntries
        if let table, table.index != index { try putTable() }
        var current = table ?? (index, [UInt32](repeating: 0, count: Self.tableEntries))
        current.entries[Int(grain.number) % Self.tableEntries] = try entry(sector)
        table = current
        try put(UnsafeRawBufferPointer(rebasing: grain.output.readable[..<grain.length]))
        compressors.recycle(grain)
    }

    /// Writes the table of the grains that came last.
    private func putTable() throws(BlockError) {
        guard let done = table else { return }
        table = nil
        try putMarker(type: 1, sectors: UInt64(Self.tableEntries * 4 / 512))
        directory[done.index] = try entry(sector)
        try putEntries(done.entries)
    }

    private func entry(_ sector: UInt64) throws(BlockError) -> UInt32 {
        guard let entry = UInt32(exactly: sector) else {
            throw BlockError(.tooLarge, "writing \(name): the file grows beyond 2 TiB, which no table can say")
        }
        return entry
    }

    // MARK: - The file

    private func put(_ bytes: UnsafeRawBufferPointer) throws(BlockError) {
        try output(bytes)
        sector += UInt64(bytes.count) / VMDK.sectorBytes
    }

    private func put(_ bytes: [UInt8]) throws(BlockError) {
        let buffer = Buffer(count: bytes.count)
        buffer.bytes.copyBytes(from: bytes)
        try put(buffer.readable)
    }

    private func pad(to end: UInt64) throws(BlockError) {
        try put(UnsafeRawBufferPointer(rebasing: ZeroPage.bytes[..<Int((end - sector) * VMDK.sectorBytes)]))
    }

    /// A sector that says what follows.
    private func putMarker(type: UInt32, sectors: UInt64) throws(BlockError) {
        let buffer = Buffer(count: 512)
        buffer.bytes.initializeMemory(as: UInt8.self, repeating: 0)
        buffer.bytes.storeBytes(of: sectors.littleEndian, toByteOffset: 0, as: UInt64.self)
        buffer.bytes.storeBytes(of: type.littleEndian, toByteOffset: 12, as: UInt32.self)
        try put(buffer.readable)
    }

    private func putEntries(_ entries: [UInt32]) throws(BlockError) {
        let buffer = Buffer(count: (entries.count * 4 + 511) & ~511)
        buffer.bytes.initializeMemory(as: UInt8.self, repeating: 0)
        for (index, entry) in entries.enumerated() {
            buffer.bytes.storeBytes(of: entry.littleEndian, toByteOffset: index * 4, as: UInt32.self)
        }
        try put(buffer.readable)
    }

    private func header(directorySector: UInt64) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: 512)
        bytes.withUnsafeMutableBytes { header in
            header.storeBytes(of: VMDK.hostedMagic.littleEndian, toByteOffset: 0x00, as: UInt32.self)
            header.storeBytes(of: UInt32(3).littleEndian, toByteOffset: 0x04, as: UInt32.self)
            // Lines can be tested, grains are compressed, there are markers.
            header.storeBytes(of: UInt32(0x3_0001).littleEndian, toByteOffset: 0x08, as: UInt32.self)
            header.storeBytes(of: capacity.littleEndian, toByteOffset: 0x0C, as: UInt64.self)
            header.storeBytes(of: Self.grainSectors.littleEndian, toByteOffset: 0x14, as: UInt64.self)
            header.storeBytes(of: UInt64(1).littleEndian, toByteOffset: 0x1C, as: UInt64.self)
            header.storeBytes(of: UInt64(Self.descriptorSectors).littleEndian, toByteOffset: 0x24, as: UInt64.self)
            header.storeBytes(of: UInt32(Self.tableEntries).littleEndian, toByteOffset: 0x2C, as: UInt32.self)
            header.storeBytes(of: directorySector.littleEndian, toByteOffset: 0x38, as: UInt64.self)
            header.storeBytes(of: Self.grainSectors.littleEndian, toByteOffset: 0x40, as: UInt64.self)
            header.storeBytes(of: UInt32(0x0A0D_200A).littleEndian, toByteOffset: 0x49, as: UInt32.self)
            header.storeBytes(of: UInt16(1).littleEndian, toByteOffset: 0x4D, as: UInt16.self)
        }
        return bytes
    }

    private func descriptor() -> [UInt8] {
        let cylinders = max(1, capacity / (255 * 63))
        let text = """
            # Disk DescriptorFile
            version=1
            encoding="UTF-8"
            CID=\(hexadecimal(contentID, 8))
            parentCID=ffffffff
            createType="streamOptimized"

            # Extent description
            RW \(capacity) SPARSE "\(recordedName)"

            # The Disk Data Base
            #DDB

            ddb.adapterType = "lsilogic"
            ddb.geometry.cylinders = "\(cylinders)"
            ddb.geometry.heads = "255"
            ddb.geometry.sectors = "63"
            ddb.virtualHWVersion = "4"

            """
        var bytes = Array(text.utf8)
        bytes += [UInt8](repeating: 0, count: Self.descriptorSectors * 512 - bytes.count)
        return bytes
    }

    /// The name, where it can stand between quotes in a line.
    private var recordedName: String {
        let isPlain = name.utf8.count <= 255 && name.utf8.allSatisfy { $0 >= 0x20 && $0 != 0x22 && $0 != 0x7F }
        return isPlain && !name.isEmpty ? name : "disk.vmdk"
    }
}
