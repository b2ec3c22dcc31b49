// The headers of seSparse files, the snapshots of VMFS 6: one that never changes, one that says whether it is at rest.
import Block

/// The two headers of an seSparse file.
enum SESparseHeader {
    private static let version: UInt64 = 0x2_0000_0001
    private static let grainSectors: UInt64 = 8
    private static let tableSectors: UInt64 = 64

    /// Reads both headers.
    ///
    /// - Throws: as `SparseLayout.read(from:)`; `.unsupported`, too, when changes of the tables wait in the journal.
    static func read(from device: any BlockDevice) throws(BlockError) -> SparseLayout {
        let file = device.info
        let start = try SparseLayout.start(of: device, count: 512)
        let bytes = start.readable
        func field(_ offset: Int) -> UInt64 { bytes.littleEndian(offset) }
        guard field(8) == version else {
            throw VMDK.unsupported(file.name, "version 0x\(hexadecimal(field(8), 1)) of seSparse is not known")
        }
        let capacity = field(16)
        guard field(24) == grainSectors, field(32) == tableSectors else {
            throw VMDK.unsupported(
                file.name, "grains of \(field(24)) and tables of \(field(32)) sectors are not known (8 and 64 are)")
        }
        if field(40) != 0 {
            throw VMDK.unsupported(file.name, "it has the unknown flags 0x\(hexadecimal(field(40), 1))")
        }
        func area(_ offset: Int, _ what: String) throws(BlockError) -> (sector: UInt64, sectors: UInt64) {
            let (sector, sectors) = (field(offset), field(offset + 8))
            guard sector > 0, sector <= file.size / VMDK.sectorBytes, sectors <= VMDK.sectorsMax else {
                throw VMDK.corrupt(file.name, "its \(what), at sector \(sector), lies outside the file")
            }
            return (sector, sectors)
        }
        try checkAtRest(device, sector: try area(80, "volatile header").sector)
        let directory = try area(128, "grain directory")
        let tables = try area(144, "grain tables' area")
        let grains = try area(192, "grains' area")
        let geometry = GrainGeometry(
            .seSparse, grainSectors: grainSectors, tableEntries: tableSectors * VMDK.sectorBytes / 8, headerSectors: 0,
            grainsStart: grains.sector * VMDK.sectorBytes)
        let count = try SparseLayout.directoryCount(capacity, geometry, file.name)
        guard UInt64(count) * 8 <= directory.sectors * VMDK.sectorBytes else {
            throw VMDK.corrupt(
                file.name, "its grain directory of \(directory.sectors) sectors is too small for \(capacity) sectors")
        }
        guard VMDK.contains(file.size, sector: directory.sector, bytes: UInt64(count) * 8) else {
            throw VMDK.corrupt(file.name, "its grain directory at sector \(directory.sector) lies outside the file")
        }
        return SparseLayout(
            capacity: capacity, geometry: geometry, directoryStart: directory.sector * VMDK.sectorBytes,
            directoryCount: count, tablesStart: tables.sector * VMDK.sectorBytes,
            tablesMax: tables.sectors / tableSectors)
    }

    /// Refuses a file whose tables are not what they will be when its journal is replayed.
    private static func checkAtRest(_ device: any BlockDevice, sector: UInt64) throws(BlockError) {
        let file = device.info
        guard VMDK.contains(file.size, sector: sector, bytes: 512) else {
            throw VMDK.corrupt(file.name, "its volatile header at sector \(sector) lies outside the file")
        }
        let buffer = Buffer(count: 512)
        try device.read(into: buffer.bytes, at: sector * VMDK.sectorBytes)
        guard buffer.readable.littleEndian(0, as: UInt64.self) == VMDK.seSparseVolatileMagic else {
            throw VMDK.corrupt(file.name, "its volatile header does not begin like one")
        }
        guard buffer.readable.littleEndian(24, as: UInt64.self) == 0 else {
            throw VMDK.unsupported(
                file.name,
                "changes of its tables are still in its journal, which only an ESXi host replays: open the disk there "
                    + "once (power its machine on, or consolidate its snapshots)")
        }
    }
}
