// The header of hosted sparse files ("KDMV"): monolithic, in 2 GiB parts, and, compressed, stream-optimised.
import Block

/// The 512 bytes at the start of a hosted sparse file, and those near its end where the first ones send there.
struct HostedSparseHeader {
    private struct Flags: OptionSet {
        let rawValue: UInt32
        static let newlineTest = Flags(rawValue: 1)
        static let redundantDirectory = Flags(rawValue: 2)
        static let zeroGrains = Flags(rawValue: 4)
        static let compressed = Flags(rawValue: 0x1_0000)
        static let markers = Flags(rawValue: 0x2_0000)
        static let known: Flags = [.newlineTest, .redundantDirectory, .zeroGrains, .compressed, .markers]
    }

    /// The directory's place in a header that was written before anybody knew it.
    private static let atEnd = UInt64.max

    private let file: String
    private let fileSize: UInt64
    private let version: UInt32
    private let flags: Flags
    private let capacity: UInt64
    private let grainSectors: UInt64
    private let descriptorOffset: UInt64
    private let descriptorSize: UInt64
    private let tableEntries: UInt32
    private let redundantOffset: UInt64
    private var directoryOffset: UInt64
    private let isUnclean: Bool
    private let newlines: [UInt8]
    private let compression: UInt16

    private init(_ bytes: UnsafeRawBufferPointer, at offset: Int, _ file: String, _ fileSize: UInt64) {
        self.file = file
        self.fileSize = fileSize
        version = bytes.littleEndian(offset + 0x04)
        flags = Flags(rawValue: bytes.littleEndian(offset + 0x08))
        capacity = bytes.littleEndian(offset + 0x0C)
        grainSectors = bytes.littleEndian(offset + 0x14)
        descriptorOffset = bytes.littleEndian(offset + 0x1C)
        descriptorSize = bytes.littleEndian(offset + 0x24)
        tableEntries = bytes.littleEndian(offset + 0x2C)
        redundantOffset = bytes.littleEndian(offset + 0x30)
        directoryOffset = bytes.littleEndian(offset + 0x38)
        isUnclean = bytes[offset + 0x48] != 0
        newlines = Array(bytes[(offset + 0x49)..<(offset + 0x4D)])
        compression = bytes.littleEndian(offset + 0x4D)
    }

    /// Reads the header, and the one at the end where that counts.
    ///
    /// - Throws: as `SparseLayout.read(from:)`.
    static func read(from device: any BlockDevice) throws(BlockError) -> SparseLayout {
        let start = try SparseLayout.start(of: device, count: 512)
        var header = HostedSparseHeader(start.readable, at: 0, device.info.name, device.info.size)
        try header.check()
        if header.directoryOffset == atEnd { try header.readFooter(of: device) }
        return try header.layout()
    }

    private func check() throws(BlockError) {
        guard (1...3).contains(version) else {
            throw VMDK.unsupported(file, "version \(version) of its header is not known (1 to 3 are)")
        }
        let unknown = flags.subtracting(.known).rawValue
        if unknown != 0 { throw VMDK.unsupported(file, "it has the unknown flags 0x\(hexadecimal(unknown, 1))") }
        if flags.contains(.newlineTest), newlines != [0x0A, 0x20, 0x0D, 0x0A] {
            throw VMDK.corrupt(file, "its line breaks were changed on the way, as transfers of text do")
        }
        try SparseLayout.checkGrain(grainSectors, file)
        guard tableEntries.nonzeroBitCount == 1, tableEntries <= 4096 else {
            throw VMDK.corrupt(file, "grain tables of \(tableEntries) entries are not allowed")
        }
        if flags.contains(.compressed) {
            guard compression == 1 else {
                throw VMDK.unsupported(file, "compression \(compression) is not known (1, deflate, is)")
            }
            guard grainSectors <= 4096 else {
                throw VMDK.corrupt(file, "compressed grains of \(grainSectors) sectors are not allowed (4096 at most)")
            }
        }
    }

    /// The last three sectors: a marker, the header with the directory's place, a marker of the end.
    private mutating func readFooter(of device: any BlockDevice) throws(BlockError) {
        guard fileSize >= 4 * 512 else { throw VMDK.corrupt(file, "the file ends before its footer") }
        let end = Buffer(count: 3 * 512)
        try device.read(into: end.bytes, at: fileSize - 3 * 512)
        let bytes = end.readable
        func marker(_ offset: Int) -> (size: UInt32, type: UInt32) {
            (bytes.littleEndian(offset + 8), bytes.littleEndian(offset + 12))
        }
        guard marker(0) == (0, 3), bytes.littleEndian(512, as: UInt32.self) == VMDK.hostedMagic, marker(1024) == (0, 0)
        else {
            throw VMDK.corrupt(file, "its header says that a footer ends the file, but there is none: it is cut short")
        }
        let footer = HostedSparseHeader(bytes, at: 512, file, fileSize)
        guard footer.capacity == capacity, footer.grainSectors == grainSectors, footer.flags == flags,
            footer.tableEntries == tableEntries, footer.compression == compression, footer.directoryOffset != Self.atEnd
        else { throw VMDK.corrupt(file, "its footer contradicts its header") }
        directoryOffset = footer.directoryOffset
    }

    private func layout() throws(BlockError) -> SparseLayout {
        let geometry = GrainGeometry(
            .hosted, grainSectors: grainSectors, tableEntries: UInt64(tableEntries), headerSectors: 2,
            isCompressed: flags.contains(.compressed), hasZeroGrains: flags.contains(.zeroGrains))
        let count = try SparseLayout.directoryCount(capacity, geometry, file)
        // The second directory, with tables of its own, is for when the first one is lost.
        var places = [directoryOffset]
        if flags.contains(.redundantDirectory) { places.append(redundantOffset) }
        let place = places.first {
            $0 > 0 && VMDK.contains(fileSize, sector: $0, bytes: UInt64(count) * 4)
        }
        guard let place else {
            throw VMDK.corrupt(
                file, "its grain directory at sector \(directoryOffset) lies outside the \(fileSize) bytes of the file")
        }
        var layout = SparseLayout(
            capacity: capacity, geometry: geometry, directoryStart: place * VMDK.sectorBytes, directoryCount: count)
        layout.hasMarkers = flags.contains(.markers)
        if descriptorOffset != 0 {
            guard descriptorSize <= VMDKDescriptor.bytesMax / VMDK.sectorBytes,
                VMDK.contains(fileSize, sector: descriptorOffset, bytes: descriptorSize * VMDK.sectorBytes)
            else {
                throw VMDK.corrupt(
                    file,
                    "its descriptor, \(descriptorSize) sectors at sector \(descriptorOffset), lies outside the file")
            }
            let start = descriptorOffset * VMDK.sectorBytes
            layout.descriptorRange = start..<(start + descriptorSize * VMDK.sectorBytes)
        }
        if isUnclean { layout.remark = "not closed properly" }
        if place != directoryOffset { layout.remark = "its first grain directory is lost, the second one is used" }
        return layout
    }
}
