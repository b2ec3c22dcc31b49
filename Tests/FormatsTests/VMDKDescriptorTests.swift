// Descriptors: what they may say and how, which extents there are, and what is refused.
import Block
import Foundation
import Support
import Testing

@testable import Formats

@Suite struct VMDKDescriptorTests {
    private func parse(_ text: String) throws -> VMDKDescriptor {
        let bytes = Array(text.utf8)
        return try bytes.withUnsafeBytes { try VMDKDescriptorParser.parse($0, file: "a.vmdk") }
    }

    private static let least =
        "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"x\"\nRW 8 ZERO\n"

    @Test func keysAndKindsComeInAnyCaseAndWithBlanks() throws {
        let text = """
            # Disk DescriptorFile\r
            Version = 3\r
            \tencoding="UTF-8"  \r
            cid=AbCd1234\r
            PARENTCID=fffffffe\r
            CreateType= seSparse \r
            parentfilenamehint="a = b.vmdk"\r
            changeTrackPath="vm-ctk.vmdk"\r
            rw   16 sesparse   "x y.vmdk"\r
              RdOnly 8\tflat "f.vmdk" 63\r
            NOACCESS 4 ZERO\r
            DDB.UUID = "60 00 C2 9a"\r
            ddb.longContentID="00"\r
            """
        let parsed = try parse(text)
        #expect(parsed.version == 3 && parsed.contentID == 0xABCD_1234 && parsed.parentContentID == 0xFFFF_FFFE)
        #expect(parsed.createType == "seSparse" && parsed.parentName == "a = b.vmdk")
        #expect(parsed.changeTrackName == "vm-ctk.vmdk" && parsed.sectors == 28)
        #expect(parsed.database == ["uuid": "60 00 C2 9a", "longcontentid": "00"])
        let extents: [VMDKDescriptor.Extent] = [
            .init(access: .readWrite, sectors: 16, kind: .seSparse, fileName: "x y.vmdk", offset: 0),
            .init(access: .readOnly, sectors: 8, kind: .flat, fileName: "f.vmdk", offset: 63),
            .init(access: .none, sectors: 4, kind: .zero, fileName: "", offset: 0),
        ]
        #expect(parsed.extents == extents)
    }

    @Test func namesInOtherEncodingsAreUnderstoodOrRefused() throws {
        for (encoding, byte, name) in [("windows-1252", UInt8(0x80), "€"), ("ISO-8859-1", 0xE4, "ä")] {
            let text = Self.least + "encoding=\"\(encoding)\"\nRW 8 FLAT \"?\" 0\n"
            let bytes = Array(text.utf8).map { $0 == UInt8(ascii: "?") ? byte : $0 }
            let parsed = try bytes.withUnsafeBytes { try VMDKDescriptorParser.parse($0, file: "a") }
            #expect(parsed.extents.last?.fileName == name)
        }
        for encoding in ["encoding=\"Shift_JIS\"\n", ""] {
            let bytes = Array((Self.least + encoding).utf8) + [0x22, 0x83, 0x5C, 0x0A]
            try requireError(.unsupported, encoding) {
                _ = try bytes.withUnsafeBytes { try VMDKDescriptorParser.parse($0, file: "a") }
            }
        }
    }

    @Test(
        arguments: [
            ("version=1", "version=4", .unsupported), ("version=1", "", .corrupt), ("CID=1\n", "\n", .corrupt),
            ("CID=1\n", "CID=123456789\n", .corrupt), ("CID=1\n", "CID=xyz\n", .corrupt),
            ("CID=1\n", "CID=1\ncid=2\n", .corrupt), ("parentCID=ffffffff", "", .corrupt),
            ("parentCID=ffffffff", "parentCID=1", .corrupt), ("createType=\"x\"", "", .corrupt),
            ("RW 8 ZERO", "", .corrupt), ("RW 8 ZERO", "RV 8 ZERO", .corrupt), ("RW 8 ZERO", "RW 0 ZERO", .corrupt),
            ("RW 8 ZERO", "RW -8 ZERO", .corrupt), ("RW 8 ZERO", "RW 8", .corrupt),
            ("RW 8 ZERO", "RW 8 FLAT", .corrupt),
            ("RW 8 ZERO", "RW 8 FLAT \"\" 0", .corrupt), ("RW 8 ZERO", "RW 8 FLAT \"a 0", .corrupt),
            ("RW 8 ZERO", "RW 8 FLAT \"a\" b", .corrupt), ("RW 8 ZERO", "RW 8 FLAT \"a\" 36028797018963968", .corrupt),
            ("RW 8 ZERO", "RW 36028797018963968 ZERO", .corrupt), ("RW 8 ZERO", "RW 8 SPHERE \"a\"", .unsupported),
            ("RW 8 ZERO", "RW 18014398509481983 ZERO\nRW 1 ZERO", .corrupt),
            ("RW 8 ZERO", "RW 8 ZERO\nencryptionKeys=\"vmware:key\"", .unsupported),
            ("RW 8 ZERO", "RW 8 ZERO\nwhat is this", .corrupt),
        ] as [(String, String, BlockError.Kind)])
    func impossibleDescriptorsAreRefused(part: String, other: String, kind: BlockError.Kind) throws {
        _ = try parse(Self.least)
        let text = Self.least.replacingOccurrences(of: part, with: other)
        try requireError(kind, other) { _ = try parse(text) }
    }

    @Test func longDescriptorsAreReadUpToALimit() throws {
        // Many more than 20 sectors of text.
        let lines = (1...2000).map { "RW 4192256 FLAT \"a-f\($0).vmdk\" 0" }
        let many = try parse(Self.least + lines.joined(separator: "\n"))
        #expect(many.extents.count == 2001 && many.sectors == 2000 * 4_192_256 + 8)
        try requireError(.corrupt, "too many extents") {
            _ = try parse(Self.least + String(repeating: "RW 1 ZERO\n", count: 5000))
        }
        let long = FilesInMemory(files: ["a.vmdk": Array(Self.least.utf8) + [UInt8](repeating: 10, count: 1 << 20)])
        try requireError(.tooLarge, "a long text") { _ = try long.disk("a.vmdk") }
    }

    // MARK: - Extents

    private let flat = patternBytes(40 * 512, seed: 3)

    @Test func extentsOfAllKindsFollowEachOther() throws {
        var files = FilesInMemory(files: ["a-flat.vmdk": flat])
        let grain = VMDKBytes.Grain.data(patternBytes(4096, seed: 9))
        files.files["s.vmdk"] = VMDKBytes.hosted(sectors: 20, [1: grain])
        files.files["c.vmdk"] = VMDKBytes.cow(sectors: 12, grainSectors: 1, [3: .data(patternBytes(512, seed: 4))])
        files.files["a.vmdk"] = VMDKBytes.descriptor([
            "RW 10 FLAT \"a-flat.vmdk\" 30", "RDONLY 7 ZERO", "RW 20 SPARSE \"s.vmdk\"", "RW 12 VMFSSPARSE \"c.vmdk\"",
            "RW 5 VMFS \"a-flat.vmdk\"", "RW 5 VMFSRAW \"a-flat.vmdk\" 1",
        ])
        let zeros = { [UInt8](repeating: 0, count: $0 * 512) }
        let expected =
            flat[(30 * 512)...] + zeros(7) + zeros(8) + patternBytes(4096, seed: 9) + zeros(4) + zeros(3)
            + patternBytes(512, seed: 4) + zeros(8) + flat[..<(5 * 512)] + flat[512..<(6 * 512)]
        try expectSame(try files.disk("a.vmdk"), Array(expected))
    }

    @Test func extentThatNobodyMayReadIsRefusedWhenItIsRead() throws {
        var files = FilesInMemory(files: ["a-flat.vmdk": flat])
        files.files["a.vmdk"] = VMDKBytes.descriptor([
            "RW 10 FLAT \"a-flat.vmdk\" 0", "NOACCESS 4 FLAT \"b\" 0", "RW 6 ZERO",
        ])
        let device = try files.disk("a.vmdk")
        #expect(device.info.size == 20 * 512)
        #expect(try readBytes(device, 0, 5120) == Array(flat[..<5120]))
        #expect(try mapped(device, 0..<10240).end == 5120)
        try requireError(.denied, "no access") { _ = try readBytes(device, 5000, 200) }
        #expect(try readBytes(device, 14 * 512, 512) == [UInt8](repeating: 0, count: 512))
    }

    @Test(
        arguments: [
            ("RW 41 FLAT \"a-flat.vmdk\" 0", .corrupt), ("RW 10 FLAT \"a-flat.vmdk\" 31", .corrupt),
            ("RW 8 FLAT \"nbd://host/x\" 0", .unsupported), ("RW 8 FLAT \"C:\\x.vmdk\" 0", .unsupported),
            ("RW 8 FLAT \"gone.vmdk\" 0", .notFound), ("RW 8 SPARSE \"a-flat.vmdk\"", .invalid),
            ("RW 8 SPARSE \"a.vmdk\"", .corrupt), ("RW 9 SPARSE \"s.vmdk\"", .corrupt),
            ("RW 8 SESPARSE \"s.vmdk\"", .corrupt), ("RW 8 SPARSE \"s.vmdk\"\nRW 8 SPARSE \"s.vmdk\"", .corrupt),
            ("RW 8 VMFSRDM \"a-flat.vmdk\"", .unsupported),
        ] as [(String, BlockError.Kind)])
    func extentsThatCannotBeAreRefused(line: String, kind: BlockError.Kind) throws {
        var files = FilesInMemory(files: ["a-flat.vmdk": flat, "s.vmdk": VMDKBytes.hosted(sectors: 8, [:])])
        files.files["a.vmdk"] = VMDKBytes.descriptor([line])
        var options = VMDKOptions()
        options.allowsPhysicalMapping = true
        try requireError(kind, line) { _ = try files.disk("a.vmdk", options) }
    }

    @Test func filesOutsideTheAllowedDirectoriesAreNotOpened() throws {
        // The transports' resolvers decide; names reach them as they are.
        struct Recording: FileResolver {
            let names = Locked<[String]>([])
            func open(_ name: String) throws(BlockError) -> ResolvedFile {
                names.withLock { $0.append(name) }
                throw BlockError(.denied, "no")
            }
        }
        let resolver = Recording()
        for name in ["../x.vmdk", "/etc/passwd", "a/../../b"] {
            let bytes = VMDKBytes.descriptor(["RW 8 FLAT \"\(name)\" 0"])
            let file = ResolvedFile(device: BytesDevice(bytes), identity: "a", resolver: resolver)
            try requireError(.denied, name) { _ = try openDisk(file, .explicit(.vmdk)) }
        }
        #expect(resolver.names.withLock { $0 } == ["../x.vmdk", "/etc/passwd", "a/../../b"])
        let alone = ResolvedFile(
            device: BytesDevice(VMDKBytes.descriptor(["RW 8 FLAT \"b\" 0"])), identity: "a", resolver: nil)
        try requireError(.unsupported, "nothing beside it") { _ = try openDisk(alone, .explicit(.vmdk)) }
    }

    // MARK: - Raw device mappings

    @Test(
        arguments: [
            ("vmfsRawDeviceMap", "vm-rdm.vmdk", false), ("vmfsRDM", "vm-rdm.vmdk", false),
            ("vmfsPassthroughRawDeviceMap", "vm-rdmp.vmdk", true), ("vmfsRDMP", "vm-rdmp.vmdk", true),
            // What does not say that it is virtual, or contradicts itself, may be physical.
            ("vmfsPassthroughRawDeviceMap", "vm-rdm.vmdk", true), ("vmfsRawDeviceMap", "vm-rdmp.vmdk", true),
            ("vmfsRawDeviceMap", "vm.map", true), ("vmfs", "vm-rdmp.vmdk", true), ("custom", "vm-rdm.vmdk", true),
        ])
    func rawDeviceMappingIsItsLUN(type: String, mapping: String, mayBePhysical: Bool) throws {
        var files = FilesInMemory(files: [:], mapped: [mapping: flat])
        files.files["vm.vmdk"] = VMDKBytes.descriptor(["RW 40 VMFSRDM \"\(mapping)\""], type: type)
        var options = VMDKOptions()
        if mayBePhysical {
            let error = #expect(throws: BlockError.self) { try files.disk("vm.vmdk") }
            #expect(error?.kind == .denied && error?.message.contains("physical=yes") == true)
            options.allowsPhysicalMapping = true
        }
        try expectSame(try files.disk("vm.vmdk", options), flat)
        files.mapped[mapping] = Array(flat.dropLast())
        try requireError(.corrupt, "a smaller LUN") { _ = try files.disk("vm.vmdk", options) }
    }

    @Test(arguments: [5, 6])
    func disksOfADatastoreAreOpenedWithTheirSnapshotsAndMappings(version: Int) throws {
        let volume = try VMFSImage.make(version).volume()
        let resolver = VMFSResolver(volume, directory: "vm1")
        func open(_ name: String, _ resolver: VMFSResolver) throws -> any BlockDevice {
            try openDisk(try resolver.open(name), .guess(name: name, isNodeOrRemote: false))
        }
        for name in ["thick", "thin", "lazy", "big"] {
            let device = try open("\(name).vmdk", resolver)
            let flat = try volume.open("vm1/\(name)-flat.vmdk")
            #expect(device.info.size == flat.info.size)
            #expect("\(try mapped(device, 0..<device.info.size))" == "\(try mapped(flat, 0..<flat.info.size))")
            try device.confirm()
        }
        let child = try open("thin-000001.vmdk", resolver)
        #expect((child as? VMDKDevice)?.chainLength == 2)
        let base = try volume.open("vm1/thin-flat.vmdk")
        var expected = try readBytes(base, 0, 4 << 20)
        for (sector, text) in [(0, "first"), (4000, "later")] {
            let bytes = Array(text.utf8) + [UInt8](repeating: UInt8(ascii: "."), count: 512 - text.utf8.count)
            expected.replaceSubrange((sector * 512)..<(sector * 512 + 512), with: bytes)
        }
        #expect(try readBytes(child, 0, 4 << 20) == expected)
        // The mapping names a LUN, which somebody else has to find.
        var options = VMDKOptions()
        options.allowsPhysicalMapping = true
        let mapping = try resolver.open("raw.vmdk")
        try requireError(.denied, "physical") { _ = try openDisk(mapping, .explicit(.vmdk)) }
        let error = #expect(throws: BlockError.self) { try openDisk(mapping, .explicit(.vmdk), vmdk: options) }
        #expect(error?.kind == .unsupported && error?.message.contains("SERIAL0001") == true)
        let lun = patternBytes(20480 * 512, seed: 5)
        let withLUNs = VMFSResolver(volume, directory: "vm1") { (disk) throws(BlockError) in
            guard disk.text == "SERIAL0001", disk.model == "MODEL" else { throw BlockError(.notFound, "another") }
            return BytesDevice(lun)
        }
        try expectSame(try openDisk(try withLUNs.open("raw.vmdk"), .explicit(.vmdk), vmdk: options), lun)
        try requireError(.invalid, "no mapping") { _ = try withLUNs.openMappedDevice("thin-flat.vmdk") }
    }
}
