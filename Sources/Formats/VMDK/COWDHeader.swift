// The header of COWD files, the snapshots of VMFS 3 and 5 ("vmfsSparse").
import Block

/// The 2048 bytes at the start of a COWD file.
enum COWDHeader {
    /// Entries of a grain table.
    private static let tableEntries: UInt64 = 4096
    private static let headerSectors: UInt64 = 4

    /// Reads the header.
    ///
    /// - Throws: as `SparseLayout.read(from:)`.
    static func read(from device: any BlockDevice) throws(BlockError) -> SparseLayout {
        let file = device.info
        let start = try SparseLayout.start(of: device, count: Int(headerSectors * VMDK.sectorBytes))
        let bytes = start.readable
        func field(_ offset: Int) -> UInt64 { UInt64(bytes.littleEndian(offset, as: UInt32.self)) }
        guard field(4) == 1 else { throw VMDK.unsupported(file.name, "version \(field(4)) of its header is not 1") }
        guard field(8) == 3 else {
            throw VMDK.unsupported(file.name, "it has the flags 0x\(hexadecimal(field(8), 1)), where 3 is usual")
        }
        let (capacity, grain, directory, claimed) = (field(12), field(16), field(20), field(24))
        try SparseLayout.checkGrain(grain, file.name)
        let geometry = GrainGeometry(
            .cow, grainSectors: grain, tableEntries: tableEntries, headerSectors: headerSectors)
        let count = try SparseLayout.directoryCount(capacity, geometry, file.name)
        guard UInt64(count) <= claimed else {
            throw VMDK.corrupt(
                file.name, "its grain directory has \(claimed) entries, too few for \(capacity) sectors")
        }
        guard directory >= headerSectors,
            VMDK.contains(file.size, sector: directory, bytes: UInt64(count) * 4)
        else {
            throw VMDK.corrupt(file.name, "its grain directory at sector \(directory) lies outside the file")
        }
        return SparseLayout(
            capacity: capacity, geometry: geometry, directoryStart: directory * VMDK.sectorBytes, directoryCount: count)
    }
}
