// What lies on a disk, as its first bytes tell: file systems made by their own tools, and marks of volume managers.
import Block
import Formats
import Glibc
import LinuxIO
import Support
import Testing

@Suite struct ContentSignatureTests {
    private func types(_ path: String) throws -> [String] {
        try ContentSignatures.recognised(on: try RawFileDevice.open(path)).map(\.type)
    }

    @Test(arguments: [("mkfs.ext4", ["-q", "-F"], "ext4"), ("mkfs.xfs", ["-q", "-f"], "xfs"), ("mkswap", [], "swap")])
    func recognisesWhatToolsMake(tool: String, options: [String], type: String) throws {
        try withTemporaryDirectory { directory in
            let path = try directory.makeSparseFile("disk", size: 320 << 20)
            let result = try Tool.run(tool, options + [path])
            try require(result.status == 0, result.errors)
            let found = try types(path)
            #expect(found == [type])
        }
    }

    @Test func recognisesMarksInTheirPlaces() throws {
        let label = Array("LABELONE".utf8) + [UInt8](repeating: 0, count: 16) + Array("LVM2 001".utf8)
        let places: [(offset: Int, bytes: [UInt8], type: String)] = [
            (512, label + Array("abcdefghijklmnopqrstuvwxyz012345".utf8), "LVM2_member"),
            (0, Array("LUKS".utf8) + [0xBA, 0xBE], "crypto_LUKS"),
            (4096, [0xFC, 0x4E, 0x2B, 0xA9], "linux_raid_member"),
            (0x10_0000, [0x0D, 0xD0, 0x01, 0xC0], "VMFS_volume_member"),
        ]
        try withTemporaryDirectory { directory in
            for place in places {
                var bytes = [UInt8](repeating: 0, count: 2 << 20)
                bytes.replaceSubrange(place.offset..<(place.offset + place.bytes.count), with: place.bytes)
                let found = try types(try directory.makeFile("disk", bytes))
                #expect(found == [place.type])
            }
        }
    }

    @Test func readsNothingOutsideOfSmallDisks() throws {
        try withTemporaryDirectory { directory in
            for size in [1, 511, 512, 2047, 4096, 65536] {
                let found = try types(try directory.makeFile("disk", [UInt8](repeating: 0, count: size)))
                #expect(found.isEmpty)
            }
        }
    }
}
