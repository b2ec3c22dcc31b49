// san: sources: datastores found on LUNs, files opened from them, what has to be said first, and what is refused.
import Block
import Formats
import Glibc
import Support
import Testing

@testable import LinuxIO
@testable import Transports

/// Images of a datastore's LUNs, made by the lab's builder.
private struct Datastore {
    let directory: TemporaryDirectory
    let luns: [String]

    init(_ directory: TemporaryDirectory, luns count: Int, isWhole: Bool = false) throws {
        self.directory = directory
        let script =
            #filePath.split(separator: "/").dropLast(3).reduce("") { "\($0)/\($1)" } + "/Scripts/lab/vmfs-image"
        let path = directory.file("ds.img")
        _ = try Tool.output("python3", [script, "6", path, "--luns", "\(count)"] + (isWhole ? [] : ["--few"]))
        luns =
            count == 1
            ? [path]
            : try namesInDirectory(directory.path).filter { !$0.hasSuffix(".json") }
                .map { directory.file($0) }
    }

    /// A source on these LUNs only.
    func source(_ path: String, _ rest: String = "snapshot=test") throws -> SourceReference {
        try SourceReference("san:\(path)?\(rest)" + luns.map { "&lun=\($0)" }.joined())
    }
}

@Suite struct SANSourceTests {
    private func label(_ datastore: Datastore) throws -> String {
        let units = try datastore.source("x").logicalUnits
        let (found, problems) = try Datastores(on: units).all()
        try require(problems.isEmpty && found.count == 1, "\(problems) \(found.count)")
        return try #require(found.first?.volume?.label)
    }

    @Test(arguments: [1, 2])
    func filesOfADatastoreAreDisks(luns: Int) throws {
        try withTemporaryDirectory { directory in
            let datastore = try Datastore(directory, luns: luns)
            let name = try label(datastore)
            let volume = try Datastores(on: datastore.source("x").logicalUnits).volume(named: name)
            let folders = try volume.list("").filter { $0.kind == .directory }.map(\.name)
            let files = try folders.flatMap { folder in
                try volume.list(folder).filter { $0.kind == .file && $0.size > 0 }.map { "\(folder)/\($0.name)" }
            }
            let path = try #require(files.first { $0.hasSuffix("-flat.vmdk") } ?? files.first)
            let direct = try volume.open(path)
            for text in ["\(name)/\(path)", "\(volume.uuid)/\(path)"] {
                let device = try datastore.source(text).open()
                #expect(device.info.size == direct.info.size && device.info.isReadOnly)
                let count = Int(min(device.info.size, 1 << 20))
                try requireEqual(
                    try readBytes(device, at: 0, count: count), try readBytes(direct, at: 0, count: count), text)
                try device.confirm()
            }
        }
    }

    @Test func disksOfADatastoreAreOpenedWithTheirSnapshots() throws {
        try withTemporaryDirectory { directory in
            let datastore = try Datastore(directory, luns: 1, isWhole: true)
            let name = try label(datastore)
            let disk = try datastore.source("\(name)/vm1/thin-000001.vmdk").open()
            #expect(disk.info.format == "vmdk" && disk.info.size == 16 << 20)
            #expect(String(decoding: try readBytes(disk, at: 0, count: 5), as: UTF8.self) == "first")
            try disk.confirm()
            let mapping = "\(name)/vm1/raw.vmdk"
            try requireError(.denied, "a physical mapping") { _ = try datastore.source(mapping).open() }
            // No LUN here has that serial number.
            try requireError(.notFound, "its LUN") {
                _ = try datastore.source(mapping, "snapshot=test&physical=yes").open()
            }
        }
    }

    @Test func snapshotThatGoesIntoItsBaseInPlaceIsNoticed() throws {
        try withTemporaryDirectory { directory in
            let datastore = try Datastore(directory, luns: 1, isWhole: true)
            let name = try label(datastore)
            let disks = try ["thin-000001", "thin"].map { try datastore.source("\(name)/vm1/\($0).vmdk").open() }
            for disk in disks { try disk.confirm() }
            // No block moves, nothing is renamed: the host writes another content id over the one that was.
            let script = """
                import mmap, sys
                with open(sys.argv[1], "r+b") as file, mmap.mmap(file.fileno(), 64 << 20) as image:
                    at = image.find(b"\\nCID=fffffffe")
                    while at >= 0:
                        image[at + 5:at + 13] = b"12ab34cd"
                        at = image.find(b"\\nCID=fffffffe", at)
                """
            _ = try Tool.output("python3", ["-c", script, datastore.luns[0]])
            for disk in disks {
                let error = #expect(throws: BlockError.self) { try disk.confirm() }
                #expect(error?.kind == .changed && error?.message.contains("thin.vmdk") == true, "\(disk.info.name)")
            }
        }
    }

    @Test func somebodyHasToSayWhatKeepsTheDiskStill() throws {
        try withTemporaryDirectory { directory in
            let datastore = try Datastore(directory, luns: 1)
            let name = try label(datastore)
            try requireError(.denied, "neither") { _ = try datastore.source("\(name)/a", "snapshot=").open() }
            try requireError(.notFound, "a snapshot") { _ = try datastore.source("\(name)/none").open() }
            try requireError(.notFound, "torn") { _ = try datastore.source("\(name)/none", "inconsistent=yes").open() }
            try requireError(.readOnly, "writing") { _ = try datastore.source("\(name)/none").open(writable: true) }
            try requireError(.invalid, "no file") { _ = try datastore.source(name).open() }
            try requireError(.notFound, "another") { _ = try datastore.source("other/none").open() }
        }
    }

    @Test func aDatastoreWithoutAllItsLUNsIsNotOpened() throws {
        try withTemporaryDirectory { directory in
            let datastore = try Datastore(directory, luns: 2)
            let units = LogicalUnits(nodes: [try #require(datastore.luns.first)])
            let (found, _) = try Datastores(on: units).all()
            #expect(found.count == 1 && found.first?.volume == nil && found.first?.problem?.kind == .notFound)
            // One that is no LUN of any datastore, and one that is not there, do not hide the others.
            let noise = try directory.makeFile("noise", patternBytes(4 << 20, seed: 4))
            let all = LogicalUnits(nodes: datastore.luns + [noise, directory.file("gone")])
            let (more, problems) = try Datastores(on: all).all()
            #expect(more.compactMap(\.volume).count == 1 && problems.map(\.kind) == [.notFound])
        }
    }

    @Test func referencesAreTakenApart() throws {
        #expect(try SourceReference("san:wwn=naa.6").kind == .san(.unit(.name("naa.6"))))
        #expect(try SourceReference("san:").kind == .san(.file(datastore: "", path: "")))
        let file = SANReference.file(datastore: "fast one", path: "vm/vm-flat.vmdk")
        #expect(try SourceReference("san:fast%20one/vm/vm-flat.vmdk?snapshot=x").kind == .san(file))
        // A name with an equals sign in it is one, unless the part before means something.
        #expect(try SourceReference("san:a=b/c").kind == .san(.file(datastore: "a=b", path: "c")))
        try requireError(.invalid, "an empty name") { _ = try SourceReference("san:wwn=") }
        try requireError(.invalid, "no address") { _ = try SourceReference("san:hctl=1:2") }
    }
}
