// Chains of VMDKs: snapshots of every kind three deep, and parents that are not what they were.
import Block
import Foundation
import LinuxIO
import Support
import Testing

@testable import Formats

@Suite struct VMDKChainTests {
    /// Not a whole number of grains; beyond what one COWD table maps with grains of one sector (2 MiB).
    private static let sectors = 9000 + 5

    @Test func chainOfHostedSparseDisksIsReadAsInQEMU() throws {
        let scratch = try Scratch()
        try VMDKHostedTests.makeSource(scratch, size: 34 << 20)
        try scratch.qemuImg("convert -f raw -O vmdk source.raw base.vmdk")
        try scratch.qemuImg("create -q -f vmdk -b base.vmdk -F vmdk middle.vmdk")
        try scratch.qemuIO("middle.vmdk", ["write -P 1 1M 1000k", "write -P 2 33M 64k"], format: "vmdk")
        try scratch.qemuImg("create -q -f vmdk -b middle.vmdk -F vmdk top.vmdk")
        try scratch.qemuIO("top.vmdk", ["write -P 3 1500k 1M", "write -P 4 32760k 16k"], format: "vmdk")
        let device = try VMDKHostedTests.open(scratch, "top.vmdk")
        #expect((device as? VMDKDevice)?.chainLength == 3)
        try scratch.qemuImg("convert -f vmdk -O raw top.vmdk expected.raw")
        let expected = try scratch.bytes("expected.raw")
        try expectSame(device, expected)
        try expectSameAllocation(scratch, "top.vmdk", device, expected, depth: true, format: "vmdk")
    }

    /// A base in a flat file below two COWD deltas, grains of one sector or eight.
    static func cowChain(grainSectors: Int) -> (files: FilesInMemory, model: LayeredModel) {
        var model = LayeredModel(sectors: sectors)
        model.write(0..<5000, layer: 1)
        var files: [String: [UInt8]] = ["vm-flat.vmdk": model.bytes]
        files["vm.vmdk"] = VMDKBytes.descriptor(
            ["RW \(sectors) VMFS \"vm-flat.vmdk\""], type: "vmfs", contentID: "fffffffe")
        var parent = (name: "vm.vmdk", contentID: "fffffffe")
        for layer in 2...3 {
            var grains: [Int: VMDKBytes.Grain] = [:]
            // The last one, which is cut short by the disk's end; the first of the second table; runs and single ones.
            let wanted = [0, 7, 8, 9, 100 * layer, 4095, 4096, (sectors - 1) / grainSectors]
            for number in wanted where number * grainSectors < sectors {
                let range = (number * grainSectors)..<((number + 1) * grainSectors)
                grains[number] = .data(LayeredModel.sectors(range, layer: UInt8(layer)))
                model.write(range, layer: UInt8(layer))
            }
            let name = "vm-00000\(layer - 1)"
            files["\(name)-delta.vmdk"] = VMDKBytes.cow(sectors: sectors, grainSectors: grainSectors, grains)
            files["\(name).vmdk"] = VMDKBytes.descriptor(
                ["RW \(sectors) VMFSSPARSE \"\(name)-delta.vmdk\""], type: "vmfsSparse", contentID: "aaaa000\(layer)",
                parentID: parent.contentID, parent: parent.name)
            parent = ("\(name).vmdk", "aaaa000\(layer)")
        }
        return (FilesInMemory(files: files), model)
    }

    /// A base in a flat file below two seSparse deltas with entries of every kind.
    static func seSparseChain() -> (files: FilesInMemory, model: LayeredModel) {
        var model = LayeredModel(sectors: sectors)
        model.write(0..<sectors, layer: 1)
        var files: [String: [UInt8]] = ["vm-flat.vmdk": model.bytes]
        files["vm.vmdk"] = VMDKBytes.descriptor(["RW \(sectors) VMFS \"vm-flat.vmdk\""], type: "vmfs")
        var parent = (name: "vm.vmdk", contentID: "11111111")
        for layer in 2...3 {
            var grains: [Int: VMDKBytes.Grain] = [:]
            for number in [0, 1, 2, 10 * layer, 500, (sectors - 1) / 8] {
                let range = (number * 8)..<(number * 8 + 8)
                grains[number] = .data(LayeredModel.sectors(range, layer: UInt8(layer)))
                model.write(range, layer: UInt8(layer))
            }
            for (number, grain) in [(3 * layer, VMDKBytes.Grain.zero), (40 + layer, .unmapped), (600, .zero)] {
                grains[number] = grain
                model.zero((number * 8)..<(number * 8 + 8))
            }
            let name = "vm-00000\(layer - 1)"
            files["\(name)-sesparse.vmdk"] = VMDKBytes.seSparse(sectors: sectors, grains)
            files["\(name).vmdk"] = VMDKBytes.descriptor(
                ["RW \(sectors) SESPARSE \"\(name)-sesparse.vmdk\""], type: "seSparse", contentID: "aaaa000\(layer)",
                parentID: parent.contentID, parent: parent.name)
            parent = ("\(name).vmdk", "aaaa000\(layer)")
        }
        return (FilesInMemory(files: files), model)
    }

    private func write(_ files: FilesInMemory, to scratch: Scratch) throws {
        for (name, bytes) in files.files { try Data(bytes).write(to: URL(fileURLWithPath: scratch.file(name))) }
    }

    @Test(arguments: [1, 8, 128])
    func chainOfCOWDDisksIsRead(grainSectors: Int) throws {
        let (files, model) = Self.cowChain(grainSectors: grainSectors)
        let device = try files.disk("vm-000002.vmdk")
        #expect((device as? VMDKDevice)?.chainLength == 3)
        try expectSame(device, model.bytes)
        // From files, and by qemu, which reads these, too.
        let scratch = try Scratch()
        try write(files, to: scratch)
        try expectSame(try VMDKHostedTests.open(scratch, "vm-000002.vmdk"), model.bytes)
        try scratch.qemuImg("convert -f vmdk -O raw vm-000002.vmdk qemu.raw")
        #expect(try scratch.bytes("qemu.raw") == model.bytes)
    }

    @Test func chainOfSESparseDisksIsRead() throws {
        let (files, model) = Self.seSparseChain()
        let device = try files.disk("vm-000002.vmdk")
        try expectSame(device, model.bytes)
        let scratch = try Scratch()
        try write(files, to: scratch)
        try expectSame(try VMDKHostedTests.open(scratch, "vm-000002.vmdk"), model.bytes)
        try scratch.qemuImg("convert -f vmdk -O raw vm-000002.vmdk qemu.raw")
        #expect(try scratch.bytes("qemu.raw") == model.bytes)
        let depths = try wholeStatus(device, .depth)
        #expect(value(depths, at: 0) == 1 && value(depths, at: 20 * 4096) == 2 && value(depths, at: 400 * 4096) == 3)
        // Zeros of the top hide what the parent has.
        #expect(value(depths, at: 9 * 4096) == 1 && value(depths, at: 43 * 4096) == 1)
    }

    @Test(arguments: ["cow", "seSparse", "streamOptimized"])
    func disksConform(kind: String) throws {
        let (files, name, content): (FilesInMemory, String, [UInt8])
        switch kind {
        case "cow":
            let chain = Self.cowChain(grainSectors: 1)
            (files, name, content) = (chain.files, "vm-000002.vmdk", chain.model.bytes)
        case "seSparse":
            let chain = Self.seSparseChain()
            (files, name, content) = (chain.files, "vm-000002.vmdk", chain.model.bytes)
        default:
            content =
                patternBytes(300_000, seed: 3) + [UInt8](repeating: 0, count: 212_000) + patternBytes(512, seed: 4)
            (files, name) = (FilesInMemory(files: ["a.vmdk": try streamOptimized(content)]), "a.vmdk")
        }
        // In memory, and in files.
        try DeviceConformance { ConformanceSubject(try files.disk(name), content: content) }.run()
        let scratch = try Scratch()
        try write(files, to: scratch)
        try DeviceConformance {
            ConformanceSubject(try VMDKHostedTests.open(scratch, name), content: content)
        }.run()
    }

    @Test func largeSESparseDiskUsesHighGrainNumbers() throws {
        // Grain 0x12345 of the area: both parts of the number are used. The file is one hole up to there.
        let entry: UInt64 = 3 << 60 | 0x345 << 48 | 0x12
        let bytes = VMDKBytes.seSparse(sectors: 1 << 31, [70_000: .entry(entry), 4096 * 1000: .zero])
        let scratch = try Scratch()
        try Data(bytes).write(to: URL(fileURLWithPath: scratch.file("a-sesparse.vmdk")))
        let grains = bytes.withUnsafeBytes { UnsafeRawBufferPointer($0).littleEndian(192, as: UInt64.self) } * 512
        let file = try #require(FileHandle(forWritingAtPath: scratch.file("a-sesparse.vmdk")))
        try file.seek(toOffset: grains + 0x12345 * 4096)
        try file.write(contentsOf: Data([UInt8](repeating: 0x77, count: 4096)))
        try file.close()
        try Data(VMDKBytes.descriptor(["RW \(1 << 31) SESPARSE \"a-sesparse.vmdk\""], type: "seSparse"))
            .write(to: URL(fileURLWithPath: scratch.file("a.vmdk")))
        let device = try VMDKHostedTests.open(scratch, "a.vmdk")
        #expect(device.info.size == 1 << 40)
        let read = try readBytes(device, 70_000 * 4096 - 10, 4116)
        #expect(
            read == [UInt8](repeating: 0, count: 10) + [UInt8](repeating: 0x77, count: 4096)
                + [UInt8](repeating: 0, count: 10))
    }

    @Test func parentThatHasChangedIsRefused() throws {
        var (files, _) = Self.cowChain(grainSectors: 8)
        files.files["vm.vmdk"] = VMDKBytes.descriptor(
            ["RW \(Self.sectors) VMFS \"vm-flat.vmdk\""], type: "vmfs", contentID: "12ab34cd")
        let error = #expect(throws: BlockError.self) { try files.disk("vm-000002.vmdk") }
        #expect(error?.kind == .corrupt)
        for part in ["vm.vmdk", "vm-000001.vmdk", "12ab34cd", "fffffffe", "changed"] {
            #expect(error?.message.contains(part) == true, "\(part)")
        }
        #expect(try files.disk("vm.vmdk").info.size == UInt64(Self.sectors) * 512)
    }

    @Test func qemuMadeParentThatHasChangedIsRefused() throws {
        let scratch = try Scratch()
        try scratch.qemuImg("create -q -f vmdk base.vmdk 8M")
        try scratch.qemuImg("create -q -f vmdk -b base.vmdk -F vmdk a.vmdk")
        _ = try VMDKHostedTests.open(scratch, "a.vmdk")
        // The first write gives the base another content id.
        try scratch.qemuIO("base.vmdk", ["write -P 1 0 64k"], format: "vmdk")
        try requireError(.corrupt, "a changed parent") { _ = try VMDKHostedTests.open(scratch, "a.vmdk") }
    }

    @Test func contentIDOfAnUntouchedDiskMayBeInTheLongOne() throws {
        var (files, model) = Self.cowChain(grainSectors: 8)
        let extent = "RW \(Self.sectors) VMFS \"vm-flat.vmdk\""
        for (long, parentID, isRight) in [
            ("0123456789abcdef01234567deadbeef", "deadbeef", true),
            ("0123456789abcdef01234567deadbeef", "fffffffe", true),
            ("0123456789abcdef01234567deadbeef", "deadbee0", false), ("none", "deadbeef", false),
        ] {
            files.files["vm.vmdk"] = VMDKBytes.descriptor(
                [extent], type: "vmfs", contentID: "fffffffe", more: "ddb.longContentID = \"\(long)\"")
            files.files["vm-000001.vmdk"] = VMDKBytes.descriptor(
                ["RW \(Self.sectors) VMFSSPARSE \"vm-000001-delta.vmdk\""], type: "vmfsSparse", contentID: "aaaa0002",
                parentID: parentID, parent: "vm.vmdk")
            if isRight {
                try expectSame(try files.disk("vm-000002.vmdk"), model.bytes)
            } else {
                try requireError(.corrupt, parentID) { _ = try files.disk("vm-000002.vmdk") }
            }
        }
        model.bytes.removeAll()
    }

    @Test func parentOfAnotherSizeIsRefused() throws {
        var (files, _) = Self.cowChain(grainSectors: 8)
        files.files["vm.vmdk"] = VMDKBytes.descriptor(
            ["RW \(Self.sectors - 1) VMFS \"vm-flat.vmdk\""], type: "vmfs", contentID: "fffffffe")
        try requireError(.corrupt, "a smaller parent") { _ = try files.disk("vm-000002.vmdk") }
    }

    @Test func chainsThatDoNotEndAreRefused() throws {
        let link = { (name: String, parent: String) in
            VMDKBytes.descriptor(["RW 8 ZERO"], parentID: "11111111", parent: parent)
        }
        var files = FilesInMemory(files: ["a.vmdk": link("a", "b.vmdk"), "b.vmdk": link("b", "a.vmdk")])
        try requireError(.corrupt, "a loop") { _ = try files.disk("a.vmdk") }
        files.files["a.vmdk"] = link("a", "a.vmdk")
        try requireError(.corrupt, "its own parent") { _ = try files.disk("a.vmdk") }
        for number in 0..<100 { files.files["\(number).vmdk"] = link("", "\(number + 1).vmdk") }
        try requireError(.tooLarge, "a long chain") { _ = try files.disk("0.vmdk") }
        files.files["100.vmdk"] = VMDKBytes.descriptor(["RW 8 ZERO"])
        let last = try files.disk("\(101 - VMDKDevice.chainLengthMax).vmdk")
        #expect((last as? VMDKDevice)?.chainLength == VMDKDevice.chainLengthMax)
        #expect(try readBytes(last, 0, 4096) == [UInt8](repeating: 0, count: 4096))
    }

    @Test func longestChainIsWalkedOnTheStackOfAConnection() throws {
        var files = FilesInMemory(files: ["0.vmdk": VMDKBytes.descriptor(["RW 16 FLAT \"f\" 0"])])
        files.files["f"] = patternBytes(8192, seed: 1)
        let count = VMDKDevice.chainLengthMax
        for number in 1..<count {
            files.files["\(number).vmdk"] = VMDKBytes.descriptor(
                ["RW 16 VMFSSPARSE \"d\(number)\""], parentID: "11111111", parent: "\(number - 1).vmdk")
            files.files["d\(number)"] = VMDKBytes.cow(sectors: 16, grainSectors: 1, [:])
        }
        let device = try files.disk("\(count - 1).vmdk")
        // These threads have stacks as small as those of connections.
        try concurrently([
            { @Sendable () throws in
                try requireEqual(try readBytes(device, 0, 8192), patternBytes(8192, seed: 1), "the base")
                let all = try status(device, .depth, of: 0..<8192).extents
                try require(all.count == 1 && all[0].value == UInt32(count), "\(all)")
                device.prefetch(0..<8192)
            }
        ])
    }

    @Test func parentMustBeThereAndBeAVMDK() throws {
        var (files, _) = Self.cowChain(grainSectors: 8)
        files.files["vm.vmdk"] = nil
        let error = #expect(throws: BlockError.self) { try files.disk("vm-000002.vmdk") }
        #expect(error?.kind == .notFound && error?.message.contains("vm-000001.vmdk") == true)
        files.files["vm.vmdk"] = [UInt8](repeating: 1, count: 1000)
        try requireError(.invalid, "another file") { _ = try files.disk("vm-000002.vmdk") }
    }

    // MARK: - While it is read

    /// Changes a text in a file in place, as hosts do; the file keeps its length.
    private func replace(_ old: String, by new: String, in name: String, _ scratch: Scratch) throws {
        try require(old.utf8.count == new.utf8.count, "\(old) \(new)")
        let text = String(decoding: try scratch.bytes(name), as: UTF8.self)
        try require(text.contains(old), "\(name) has no \(old)")
        let file = try #require(FileHandle(forWritingAtPath: scratch.file(name)))
        try file.write(contentsOf: Data(text.replacingOccurrences(of: old, with: new).utf8))
        try file.close()
    }

    @Test(
        arguments: [
            ("vm.vmdk", "CID=fffffffe", "CID=12ab34cd", "12ab34cd"),
            ("vm-000001.vmdk", "\nCID=aaaa0002", "\nCID=aaaa0009", "aaaa0009"),
            ("vm-000002.vmdk", "\nCID=aaaa0003", "\nCID=00000001", "00000001"),
            ("vm-000002.vmdk", "parentCID=aaaa0002", "parentCID=aaaa0001", "aaaa0001"),
            ("vm-000001.vmdk", "parentCID=fffffffe", "parentCID=ffffffff", "parent"),
            ("vm-000001.vmdk", "Hint=\"vm.vmdk\"", "Hint=\"vn.vmdk\"", "vn.vmdk"),
            ("vm.vmdk", "vm-flat.vmdk", "vn-flat.vmdk", "extents"), ("vm.vmdk", "CID=fffffffe", "CID=fffffffx", "none"),
        ])
    func descriptorThatChangesAfterItWasOpenedIsNoticed(name: String, old: String, new: String, part: String) throws {
        let scratch = try Scratch()
        try write(Self.cowChain(grainSectors: 8).files, to: scratch)
        let device = try VMDKHostedTests.open(scratch, "vm-000002.vmdk")
        try device.confirm()
        try replace(old, by: new, in: name, scratch)
        let error = #expect(throws: BlockError.self) { try device.confirm() }
        #expect(error?.kind == .changed, "\(String(describing: error))")
        for part in [name, part] { #expect(error?.message.contains(part) == true, "\(String(describing: error))") }
        // What does not count may change.
        try replace(new, by: old, in: name, scratch)
        try replace("lsilogic", by: "buslogic", in: name, scratch)
        try device.confirm()
    }

    @Test func parentThatIsWrittenWhileItIsReadIsNoticed() throws {
        let scratch = try Scratch()
        try scratch.qemuImg("create -q -f vmdk base.vmdk 8M")
        try scratch.qemuIO("base.vmdk", ["write -P 1 0 64k"], format: "vmdk")
        try scratch.qemuImg("create -q -f vmdk -b base.vmdk -F vmdk a.vmdk")
        let devices = try ["a.vmdk", "base.vmdk"].map { try VMDKHostedTests.open(scratch, $0) }
        for device in devices { try device.confirm() }
        // In place: no byte of the map moves. Only the descriptor in the file tells.
        try scratch.qemuIO("base.vmdk", ["write -P 2 0 64k"], format: "vmdk")
        for device in devices { try requireError(.changed, device.info.name) { try device.confirm() } }
    }

    // MARK: - Memory

    @Test func metadataOfAllFilesTogetherAreLimited() throws {
        // Each of two deltas has a directory, 4 bytes for each table of 4096 grains of one sector.
        let tables = UInt64(Self.sectors - 1) / 4096 + 1
        let (files, model) = Self.cowChain(grainSectors: 1)
        var options = VMDKOptions()
        options.metadataBytesMax = 2 * 4 * tables
        // A cache that is shared, and far too small.
        options.cacheBytes = 1
        try expectSame(try files.disk("vm-000002.vmdk", options), model.bytes)
        options.metadataBytesMax -= 1
        let error = #expect(throws: BlockError.self) { try files.disk("vm-000002.vmdk", options) }
        #expect(error?.kind == .tooLarge && error?.message.contains("vm-000002.vmdk") == true)
        #expect(try files.disk("vm-000001.vmdk", options).info.size == UInt64(Self.sectors) * 512)
        // Compressed grains take more.
        let stream = FilesInMemory(files: ["a.vmdk": try streamOptimized(patternBytes(200_000, seed: 8))])
        options.metadataBytesMax = 4 << 20
        try requireError(.tooLarge, "a decompressor") { _ = try stream.disk("a.vmdk", options) }
    }
}
