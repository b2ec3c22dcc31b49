// Images whose data clusters live in another file.
import Block
import Formats
import Foundation
import Testing

@Suite struct DataFileTests {
    private static let writes = ["write -P 1 0 100k", "write -P 2 2M 1M", "write -z 2100k 200k", "discard 3M 64k"]

    @Test(arguments: [false, true], ["1.1"])
    func dataFilesReadAsInQEMU(isRaw: Bool, compatibility: String) throws {
        let scratch = try Scratch()
        try scratch.qemuImg(
            "create -q -f qcow2 -o compat=\(compatibility),data_file=a.data,data_file_raw=\(isRaw ? "on" : "off") "
                + "a.qcow2 4M")
        try scratch.qemuIO("a.qcow2", Self.writes)
        let device = try scratch.open("a.qcow2")
        let header = try #require(device as? Qcow2Device).header
        #expect(header.hasDataFile)
        #expect(header.isDataFileRaw == isRaw)
        #expect(header.dataFileName == "a.data")
        try expectSameAsQEMU(scratch, "a.qcow2", device)
    }

    @Test func dataFileIsRequired() throws {
        let scratch = try Scratch()
        try scratch.qemuImg("create -q -f qcow2 -o data_file=a.data a.qcow2 4M")
        let error = #expect(throws: BlockError.self) {
            try Qcow2Device(lower: try scratch.resolved("a.qcow2").device)
        }
        #expect(error?.kind == .notFound)
        try FileManager.default.removeItem(atPath: scratch.file("a.data"))
        #expect(throws: BlockError.self) { try scratch.open("a.qcow2") }
    }

    @Test func compressedClusterWithDataFileIsCorrupt() throws {
        let scratch = try Scratch()
        try scratch.qemuImg("create -q -f qcow2 -o data_file=a.data a.qcow2 4M")
        try scratch.qemuIO("a.qcow2", ["write -P 1 0 64k"])
        var bytes = try scratch.bytes("a.qcow2")
        Qcow2Builder.setL2Entry(&bytes, 0, 1 << 62)
        let device = try Qcow2Device(
            lower: BytesDevice(bytes), dataFile: BytesDevice([UInt8](repeating: 0, count: 4 << 20)))
        #expect(throws: BlockError.self) { try readBytes(device, 0, 512) }
    }

    @Test func clusterElsewhereInRawDataFileIsCorrupt() throws {
        let scratch = try Scratch()
        try scratch.qemuImg("create -q -f qcow2 -o data_file=a.data,data_file_raw=on a.qcow2 4M")
        try scratch.qemuIO("a.qcow2", ["write -P 1 0 128k"])
        var bytes = try scratch.bytes("a.qcow2")
        Qcow2Builder.setL2Entry(&bytes, 1, 1 << 63 | 5 * 65536)
        let device = try Qcow2Device(
            lower: BytesDevice(bytes), dataFile: BytesDevice([UInt8](repeating: 0, count: 4 << 20)))
        #expect(try readBytes(device, 0, 512).count == 512)
        #expect(throws: BlockError.self) { try readBytes(device, 65536, 512) }
    }
}
