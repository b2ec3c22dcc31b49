// Every kind of file of every version of VMFS: its bytes, and the places on the LUNs where they are.
import Block
import Formats
import LinuxIO
import Support
import Testing

@Suite struct VMFSReadingTests {
    private func checkAll(_ image: VMFSImage, _ luns: [any BlockDevice], order: [Int]? = nil) throws {
        let volume = try openVolume(order.map { $0.map { luns[$0] } } ?? luns)
        #expect(volume.label == image.manifest.label)
        #expect(volume.uuid.description == image.manifest.uuid)
        #expect(volume.version.hasPrefix("VMFS \(image.manifest.version)."))
        #expect(volume.replica == nil)
        for (path, expected) in image.manifest.files.sorted(by: { $0.key < $1.key }) {
            try checkFile(try volume.open(path), expected, luns, path)
        }
    }

    @Test(arguments: [3, 5, 6])
    func everyFileIsReadFromOneLUN(version: Int) throws {
        let image = try VMFSImage.make(version)
        try checkAll(image, image.luns())
    }

    @Test(arguments: [3, 5, 6], [[2, 0, 1], [1, 2, 0]])
    func everyFileIsReadFromLUNsInAnyOrder(version: Int, order: [Int]) throws {
        let image = try VMFSImage.make(version, "--luns", "3")
        try checkAll(image, image.luns(), order: order)
    }

    @Test(arguments: [5, 6])
    func everyFileIsReadFromAPartition(version: Int) throws {
        let image = try VMFSImage.make(version, "--mbr")
        try checkAll(image, image.luns())
    }

    @Test func everyFileIsReadWithoutAVolumeManager() throws {
        let image = try VMFSImage.make(5)
        let lun = try image.luns()[0]
        let bare = try SliceDevice(lun, range: 0x110_0000..<lun.info.size, label: "volume")
        let volume = try openVolume([bare])
        #expect(volume.members[0].lvmVersion == 0 && volume.replica == nil)
        for (path, expected) in image.manifest.files {
            try checkFile(try volume.open(path), expected, [lun], path)
        }
    }

    @Test(arguments: [3, 5, 6])
    func neverWrittenBlocksAreNeverRead(version: Int) throws {
        let image = try VMFSImage.make(version)
        let lun = try image.luns()[0]
        let path = "vm1/lazy-flat.vmdk"
        let expected = try #require(image.manifest.files[path]?.blocks?.filter { $0.kind == "unwritten" })
        #expect(expected.count == 6)
        let marker = Array("STALE: bytes of another machine's disk.".utf8)
        for block in expected {
            #expect(try Support.readBytes(lun, at: block.place, count: marker.count) == marker, "no marker planted")
        }
        let file = try image.volume().open(path)
        #expect(file.unwrittenBytes == 6 << 20 && file.allocatedBytes == 12 << 20)
        for block in expected {
            let bytes = try Support.readBytes(file, at: block.offset, count: 1 << 20)
            #expect(areZeros(bytes[...]), "the block at \(block.offset) is not zeros")
        }
        // Allocated zeros, not holes.
        let status = try wholeStatus(file, .allocation)
        #expect(status.map(\.value) == [AllocationFlags.data, AllocationFlags.zero, AllocationFlags.data])
    }

    @Test(arguments: [3, 5, 6])
    func fileIsADevice(version: Int) throws {
        let image = try VMFSImage.make(version)
        let path = "vm1/odd-flat.vmdk"
        let seed = try #require(image.manifest.files[path]?.seed)
        let content = Array(
            (vmfsPattern(seed, 0) + [UInt8](repeating: 0, count: 1 << 20) + vmfsPattern(seed, 2))
                .prefix((2 << 20) + 612345))
        try DeviceConformance { ConformanceSubject(try image.volume().open(path), content: content) }.run()
    }

    @Test(arguments: [3, 5, 6])
    func directoriesAreListed(version: Int) throws {
        let volume = try VMFSImage.make(version).volume()
        let root = try volume.list("/")
        #expect(Set(root.map(\.name)).isSuperset(of: [".fdc.sf", ".vh.sf", "vm1", "readme.txt", "sub.bin"]))
        #expect(root.first { $0.name == "vm1" }?.kind == .directory)
        #expect(root.first { $0.name == ".fdc.sf" }?.kind == .system)
        let readme = try #require(root.first { $0.name == "readme.txt" })
        #expect(readme.kind == .file && readme.size == 6 && readme.modifiedSeconds == 0x6862_6F00)
        let names = try volume.list("vm1/snapshots").map(\.name)
        #expect(names == (0..<20).map { "disk-0000\($0 < 10 ? "0" : "")\($0).vmdk" })
        let machine = try volume.list("/vm1/./snapshots/..")
        let thin = try #require(machine.first { $0.name == "thin-flat.vmdk" })
        #expect(thin.size == 16 << 20 && thin.allocatedBytes == 5 << 20)
        let thick = try #require(machine.first { $0.name == "thick-flat.vmdk" })
        #expect(thick.allocatedBytes == 8 << 20 && thick.lock.mode == .free)
        #expect(try volume.host(holding: thick.lock) == nil)
    }

    @Test(arguments: [3, 5, 6])
    func lockedFileTellsItsHost(version: Int) throws {
        let volume = try VMFSImage.make(version).volume()
        let entry = try volume.entry("vm1/locked-flat.vmdk")
        #expect(entry.lock.mode == .exclusive)
        let host = try #require(try volume.host(holding: entry.lock))
        #expect(host.uuid == entry.lock.owner && host.address == "192.0.2.7")
    }

    @Test(arguments: [3, 5, 6])
    func rawDeviceTellsItsLUN(version: Int) throws {
        let volume = try VMFSImage.make(version).volume()
        let entry = try volume.entry("vm1/raw-rdm.vmdk")
        #expect(entry.kind == .rawDevice && entry.size == 10 << 30)
        #expect(entry.rawDevice?.text == "SERIAL0001" && entry.rawDevice?.model == "MODEL")
        try requireError(.unsupported, "opening a raw device mapping") { _ = try volume.open("vm1/raw-rdm.vmdk") }
    }

    @Test(arguments: [3, 5, 6])
    func symbolicLinksAreFollowed(version: Int) throws {
        let image = try VMFSImage.make(version)
        let volume = try image.volume()
        func same(_ link: String, _ target: String) throws {
            let file = try volume.open(link)
            #expect(file.fingerprint == (try volume.open(target)).fingerprint)
            #expect(file.info.name == "[test\(version)] \(target)")
        }
        try same("vm1/link.vmdk", "vm1/thick-flat.vmdk")
        try same("vm1/up.vmdk", "vm1/thin-flat.vmdk")
        try same("/vm1/absolute/absolute/link.vmdk", "vm1/thick-flat.vmdk")
        #expect(try volume.entry("vm1/link.vmdk").kind == .symbolicLink)
        try requireError(.invalid, "a link to itself") { _ = try volume.open("vm1/loop") }
        try requireError(.notFound, "a link out of the datastore") { _ = try volume.open("vm1/out") }
    }

    @Test(arguments: [3, 5, 6])
    func siblingsAreOpenedFromAllowedDirectories(version: Int) throws {
        let image = try VMFSImage.make(version)
        let volume = try image.volume()
        let resolver = VMFSResolver(volume, directory: "/vm1")
        let flat = try resolver.open("thick-flat.vmdk")
        #expect((flat.device as? VMFSFile)?.path == "vm1/thick-flat.vmdk")
        #expect(try resolver.open("link.vmdk").identity == flat.identity)
        #expect(try resolver.open("/vmfs/volumes/\(image.manifest.uuid)/vm1/thick-flat.vmdk").identity == flat.identity)
        let snapshot = try resolver.open("snapshots/disk-000003.vmdk")
        #expect(snapshot.identity != flat.identity)
        // Relative to the file that was opened last.
        #expect(try #require(snapshot.resolver).open("../thick-flat.vmdk").identity == flat.identity)
        try requireError(.denied, "above") { _ = try resolver.open("../readme.txt") }
        try requireError(.denied, "another datastore") { _ = try resolver.open("/vmfs/volumes/other/readme.txt") }
        let below = VMFSResolver(volume, directory: "vm1/snapshots")
        try requireError(.denied, "not allowed") { _ = try below.open("../thick-flat.vmdk") }
        let allowed = VMFSResolver(volume, directory: "vm1/snapshots", allowed: ["vm1/"])
        #expect(try allowed.open("../thick-flat.vmdk").identity == flat.identity)
    }

    @Test func whatIsNotThereIsSaid() throws {
        let volume = try VMFSImage.make(6).volume()
        try requireError(.notFound, "no file") { _ = try volume.open("vm1/none.vmdk") }
        try requireError(.notFound, "no directory") { _ = try volume.list("vm2") }
        try requireError(.notFound, "a file for a directory") { _ = try volume.open("readme.txt/x") }
        try requireError(.invalid, "listing a file") { _ = try volume.list("readme.txt") }
        try requireError(.invalid, "opening a directory") { _ = try volume.open("vm1") }
        #expect(try volume.open("empty.txt").info.size == 0)
    }

    @Test(arguments: [5, 6])
    func aSmallCacheIsEnough(version: Int) throws {
        let image = try VMFSImage.make(version)
        var options = onlyOnce
        options.cacheBytes = 1
        let luns = try image.luns()
        let volume = try openVolume(luns, options)
        for path in ["vm1/big-flat.vmdk", "vm1/huge-flat.vmdk"] {
            let expected = try #require(image.manifest.files[path])
            try checkFile(try volume.open(path), expected, luns, path)
        }
    }
}
