// Which format a file is opened as, and which other files an image may make us open.
import Block
import Foundation
import LinuxIO
import Testing

@testable import Formats

@Suite struct OpenDiskTests {
    private func guess(_ device: any BlockDevice, _ name: String, remote: Bool = false) throws -> any BlockDevice {
        try openDisk(
            ResolvedFile(device: device, identity: "1", resolver: nil), .guess(name: name, isNodeOrRemote: remote))
    }

    private let qcow2 = Qcow2Builder.empty(clusterBits: 12, size: 1 << 20)

    /// A header that a guest could write into its raw disk: it names a file of the host as its backing file.
    private func guestWritten() -> [UInt8] {
        var bytes = qcow2
        let name = Array("/etc/passwd".utf8)
        bytes.replaceSubrange(1000..<(1000 + name.count), with: name)
        Qcow2Builder.store(&bytes, 8, UInt64(1000))
        Qcow2Builder.store(&bytes, 16, UInt32(name.count))
        return bytes
    }

    @Test(arguments: ["disk.raw", "disk.img", "DISK.IMG", "vm-flat.vmdk", "vm-f001.vmdk", "/a/b.qcow2/disk.raw"])
    func rawNamesAreRawWhateverTheGuestWrote(name: String) throws {
        let device = try guess(BytesDevice(guestWritten()), name)
        #expect(device.info.format == "raw")
        #expect(device.info.size == 4 * 4096)
    }

    @Test(arguments: ["sdb", "disk", "disk.qcow2"])
    func nodesAndRemoteDisksAreRawWhateverTheGuestWrote(name: String) throws {
        #expect(try guess(BytesDevice(guestWritten()), name, remote: true).info.format == "raw")
    }

    @Test(arguments: ["disk", "disk.bin", "a.b/disk", "disk.qcow2.bak"])
    func imageKnownByItsBytesAloneNeverOpensAnotherFile(name: String) throws {
        struct Refusing: FileResolver {
            func open(_ name: String) throws(BlockError) -> ResolvedFile {
                Issue.record("\(name) was opened")
                throw BlockError(.denied, "no")
            }
        }
        let file = ResolvedFile(device: BytesDevice(guestWritten()), identity: "1", resolver: Refusing())
        let error = #expect(throws: BlockError.self) {
            try openDisk(file, .guess(name: name, isNodeOrRemote: false))
        }
        #expect(error?.kind == .denied)
        #expect(error?.message.contains("format=qcow2") == true)
        // Without other files it is what it looks like.
        #expect(try guess(BytesDevice(qcow2), name).info.format == "qcow2")
    }

    @Test func imageNamedAsOneOpensItsBackingFile() throws {
        let scratch = try Scratch()
        try scratch.makeRaw("base.raw", size: 1 << 20, seed: 2)
        try scratch.qemuImg("create -q -f qcow2 -b base.raw -F raw a.qcow2")
        let device = try openDisk(scratch.resolved("a.qcow2"), .guess(name: "a.qcow2", isNodeOrRemote: false))
        try expectSame(device, try scratch.bytes("base.raw"))
    }

    @Test func fileWithoutAnyMagicAndUnknownNameIsRaw() throws {
        #expect(try guess(BytesDevice([UInt8](repeating: 1, count: 4096)), "disk.dat").info.format == "raw")
        #expect(try guess(BytesDevice([]), "empty").info.format == "raw")
        #expect(try guess(BytesDevice([0x51, 0x46]), "two-bytes").info.format == "raw")
    }

    @Test(arguments: ["disk.vmdk", "disk.vhdx", "disk.vhd", "disk.vdi", "disk.qcow2", "disk-delta.vmdk"])
    func nameThatPromisesAFormatIsNeverServedRaw(name: String) throws {
        let error = #expect(throws: BlockError.self) {
            try guess(BytesDevice([UInt8](repeating: 0, count: 4096)), name)
        }
        #expect(error?.kind == .invalid)
        #expect(error?.message.contains("format=raw") == true)
    }

    @Test func recognisedButUnsupportedFormatsSaySo() throws {
        var vdi = [UInt8](repeating: 0, count: 512)
        vdi.replaceSubrange(64..<68, with: [0x7F, 0x10, 0xDA, 0xBE])
        let starts: [([UInt8], ImageFormat)] = [
            (Array("vhdxfile".utf8), .vhdx),
            (Array("conectix".utf8), .vhd), (Array("QED\0".utf8), .qed), (vdi, .vdi),
            ([0x4C, 0x55, 0x4B, 0x53, 0xBA, 0xBE], .luks), ([0x51, 0x46, 0x49, 0xFB, 0, 0, 0, 1], .qcow),
        ]
        for (start, format) in starts {
            let bytes = start + [UInt8](repeating: 0, count: 1024 - start.count)
            #expect(bytes.withUnsafeBytes { ImageFormat.recognised(by: $0) } == format)
            let error = #expect(throws: BlockError.self) { try guess(BytesDevice(bytes), "disk") }
            #expect(error?.kind == .unsupported)
            #expect(error?.message.contains(format.rawValue) == true)
            // A user who says raw gets it raw.
            let file = ResolvedFile(device: BytesDevice(bytes), identity: "1", resolver: nil)
            #expect(try openDisk(file, .explicit(.raw)).info.format == "raw")
        }
    }

    @Test func filesOfVMDKsAreRecognised() {
        let starts: [[UInt8]] = [
            Array("KDMV".utf8), Array("COWD".utf8), Array("# Disk DescriptorFile\n".utf8),
            Array("# disk descriptorfile\r\n".utf8), [0xBE, 0xBA, 0xFE, 0xCA, 0, 0, 0, 0],
        ]
        for start in starts { #expect(start.withUnsafeBytes { ImageFormat.recognised(by: $0) } == .vmdk) }
        let others: [[UInt8]] = [
            Array("KDM".utf8), Array("# Disk Descriptor".utf8), [0xBE, 0xBA, 0xFE, 0xCA, 1, 0, 0, 0],
        ]
        for start in others { #expect(start.withUnsafeBytes { ImageFormat.recognised(by: $0) } == nil) }
    }

    @Test func vmdkKnownByItsBytesAloneNeverOpensAnotherFile() throws {
        let files = FilesInMemory(files: [
            "disk": VMDKBytes.descriptor(["RW 8 FLAT \"secret\" 0"]), "secret": [UInt8](repeating: 1, count: 4096),
        ])
        let error = #expect(throws: BlockError.self) { try files.disk("disk") }
        #expect(error?.kind == .denied && error?.message.contains("format=vmdk") == true)
        #expect(try openDisk(files.open("disk"), .explicit(.vmdk)).info.size == 4096)
    }

    @Test func qcow2OverAVMDKIsRead() throws {
        let scratch = try Scratch()
        try scratch.makeRaw("base.raw", size: 1 << 20, seed: 2)
        try scratch.qemuImg("convert -f raw -O vmdk base.raw base.vmdk")
        try scratch.qemuImg("create -q -f qcow2 -b base.vmdk -F vmdk a.qcow2")
        try scratch.qemuIO("a.qcow2", ["write -P 1 100k 64k"])
        try expectSameAsQEMU(scratch, "a.qcow2", try scratch.open("a.qcow2"))
    }

    @Test func imagesThatQEMUMakesAreRecognised() throws {
        let scratch = try Scratch()
        for (name, format) in [
            ("qcow2", ImageFormat.qcow2), ("vmdk", .vmdk), ("vhdx", .vhdx), ("vpc", .vhd), ("qed", .qed),
        ] {
            try scratch.qemuImg("create -q -f \(name) a.\(name) 8M")
            #expect(try ImageFormat.recognised(in: scratch.resolved("a.\(name)").device) == format)
        }
        try scratch.qemuImg("create -q -f vdi a.vdi 8M")
        #expect(try ImageFormat.recognised(in: scratch.resolved("a.vdi").device) == .vdi)
    }

    @Test(arguments: ["nbd:host:10809", "json:{}", "http://host/a", "nbd+unix:///?socket=s", "nbd://host/export"])
    func backingFilesByProtocolAreRefused(name: String) throws {
        let scratch = try Scratch()
        try scratch.qemuImg("create -q -f qcow2 a.qcow2 1M")
        try scratch.run("qemu-img", "rebase", "-u", "-b", name, "-F", "raw", "a.qcow2")
        let error = #expect(throws: BlockError.self) { try scratch.open("a.qcow2") }
        #expect(error?.kind == .unsupported)
        #expect(error?.message.contains("qemu-img rebase") == true)
    }

    @Test func backingFormatThatIsNotRecordedMustNotMatter() throws {
        let scratch = try Scratch()
        try scratch.makeRaw("base", size: 1 << 20, seed: 2)
        // qemu-img does not make such images any more.
        var image = qcow2
        Qcow2Builder.store(&image, 8, UInt64(1000))
        Qcow2Builder.store(&image, 16, UInt32(4))
        image.replaceSubrange(1000..<1004, with: Array("base".utf8))
        try Data(image).write(to: URL(fileURLWithPath: scratch.file("a.qcow2")))
        #expect(try #require(scratch.open("a.qcow2") as? Qcow2Device).header.backingFormat == nil)
        try expectSame(scratch.open("a.qcow2"), scratch.bytes("base"))
        try scratch.qemuImg("create -q -f qcow2 base 1M")
        let error = #expect(throws: BlockError.self) { try scratch.open("a.qcow2") }
        #expect(error?.message.contains("qemu-img rebase -u") == true)
    }

    @Test func unsupportedBackingFormatIsNamed() throws {
        let scratch = try Scratch()
        try scratch.qemuImg("create -q -f vdi base.vdi 1M")
        try scratch.qemuImg("create -q -f qcow2 -b base.vdi -F vdi a.qcow2")
        let error = #expect(throws: BlockError.self) { try scratch.open("a.qcow2") }
        #expect(error?.message.contains("vdi") == true)
    }

    @Test func missingBackingFileIsAnErrorThatNamesBoth() throws {
        let scratch = try Scratch()
        try scratch.makeRaw("base.raw", size: 4096, seed: 2)
        try scratch.qemuImg("create -q -f qcow2 -b base.raw -F raw a.qcow2")
        unlink(scratch.file("base.raw"))
        let error = #expect(throws: BlockError.self) { try scratch.open("a.qcow2") }
        #expect(error?.message.contains("base.raw") == true)
        #expect(error?.message.contains("a.qcow2") == true)
        let alone = ResolvedFile(device: try scratch.resolved("a.qcow2").device, identity: "1", resolver: nil)
        #expect(throws: BlockError.self) { try openDisk(alone, .explicit(.qcow2)) }
    }

    @Test func wrongExplicitFormatIsAnError() throws {
        let file = ResolvedFile(device: BytesDevice([UInt8](repeating: 0, count: 4096)), identity: "1", resolver: nil)
        let error = #expect(throws: BlockError.self) { try openDisk(file, .explicit(.qcow2)) }
        #expect(error?.kind == .invalid)
    }
}
