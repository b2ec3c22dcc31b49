// Datastores and raw device mappings on logical units that tell who they are: originals, copies, and forgeries.
import Block
import Formats
import Support
import Testing

@testable import LinuxIO
@testable import Transports

/// A datastore's LUNs as units of an iSCSI target.
private struct Datastore {
    let target: ISCSITarget
    let images: [String]

    init(_ directory: TemporaryDirectory, luns count: Int) throws {
        target = try ISCSITarget(directory)
        let path = directory.file("ds.img")
        _ = try Tool.output(
            "python3", ["\(repository)/Scripts/lab/vmfs-image", "6", path, "--luns", "\(count)", "--few"])
        images = count == 1 ? [path] : (0..<count).map { "\(path).\($0)" }
    }

    /// A source on units of the target.
    func source(_ path: String, units: [Int], _ rest: String = "snapshot=test") throws -> SourceReference {
        try SourceReference("san:\(path)?\(rest)" + units.map { "&lun=\(target.uri($0))" }.joined())
    }

    /// What the images themselves have at a path, and the datastore's name.
    func expected(_ path: String) throws -> (name: String, bytes: [UInt8]) {
        let found = try Datastores(on: LogicalUnits(nodes: images)).all().found
        let volume = try #require(found.first?.volume)
        return (volume.label, try Support.readBytes(try volume.open(path), at: 0, count: 4 << 20))
    }
}

@Suite struct SANUnitTests {
    private let disk = "vm/thin-flat.vmdk"

    @Test(arguments: [[1], [1, 2], [2, 1]])
    func datastoreOnLogicalUnits(units: [Int]) throws {
        try withTemporaryDirectory { directory in
            let datastore = try Datastore(directory, luns: units.count)
            for (index, image) in datastore.images.enumerated() {
                try datastore.target.add(image, serial: "TESTLUN000\(index)")
            }
            let expected = try datastore.expected(disk)
            let device = try datastore.source("\(expected.name)/\(disk)", units: units).open()
            try requireEqual(try Support.readBytes(device, at: 0, count: 4 << 20), expected.bytes, "\(units)")
            try device.confirm()
        }
    }

    @Test func copyIsKnownByItsLogicalUnit() throws {
        try withTemporaryDirectory { directory in
            let datastore = try Datastore(directory, luns: 1)
            try datastore.target.add(datastore.images[0], serial: "TESTLUN0000")
            // What another unit claims, perhaps because a guest wants it so.
            let forged = directory.file("forged.img")
            _ = try Tool.output("cp", ["--sparse=always", datastore.images[0], forged])
            try datastore.target.add(forged, serial: "ANOTHER")
            let (name, bytes) = try datastore.expected(disk)
            try requireError(.invalid, "a copy") {
                _ = try datastore.source("\(name)/\(disk)", units: [2]).open()
            }
            let copy = try datastore.source("\(name)/\(disk)", units: [2], "snapshot=test&copy=yes").open()
            try requireEqual(try Support.readBytes(copy, at: 0, count: 4 << 20), bytes, "the copy")
            // Beside the original, it is left aside.
            let both = try datastore.source("\(name)/\(disk)", units: [2, 1])
            try requireEqual(try Support.readBytes(try both.open(), at: 0, count: 4 << 20), bytes, "the original")
            let found = try both.datastores().all().found
            #expect(found.count == 2 && found.filter { $0.copy == nil }.count == 1)
        }
    }

    @Test func mappingLeadsToItsLogicalUnit() throws {
        try withTemporaryDirectory { directory in
            let datastore = try Datastore(directory, luns: 1)
            try datastore.target.add(datastore.images[0], serial: "TESTLUN0000")
            let content = patternBytes(8 << 20, seed: 12)
            try datastore.target.add(try directory.makeFile("mapped", content), serial: "SERIAL0002")
            try datastore.target.add(try directory.makeSparseFile("large", size: 10 << 30), serial: "SERIAL0001")
            let name = try datastore.expected(disk).name
            let device = try datastore.source("\(name)/vm/web-rdm.vmdk", units: [1, 2, 3]).open()
            #expect(device.info.size == 4 << 20)
            let mapped = Array(content.prefix(4 << 20))
            try requireEqual(try Support.readBytes(device, at: 0, count: 4 << 20), mapped, "the LUN")
            try requireError(.notFound, "a LUN that is not there") {
                _ = try datastore.source("\(name)/vm/web-rdm.vmdk", units: [1, 3]).open()
            }
            // Nothing says that it is a virtual one.
            try requireError(.denied, "physical mode") {
                _ = try datastore.source("\(name)/vm/rdm", units: [1, 2, 3]).open()
            }
            let physical = try datastore.source("\(name)/vm/rdm", units: [1, 2, 3], "snapshot=a&physical=yes").open()
            #expect(physical.info.size == 10 << 30)
        }
    }

    @Test func identitiesAreCompared() throws {
        let name = "naa.6000c292bc97e9ff59ca010203040506"
        let bytes: [UInt8] = [0x60, 0, 0xC2, 0x92, 0xBC, 0x97, 0xE9, 0xFF, 0x59, 0xCA, 1, 2, 3, 4, 5, 6]
        func written(_ identifier: [UInt8], model: String = "VRAID") -> VMFSDiskID {
            VMFSDiskID(identifier: identifier, vendor: "VENDOR", model: model)
        }
        func text(_ text: String) -> [UInt8] { Array(text.utf8) }
        let unit = try #require(UnitIdentity(names: [name, "t10.VENDOR  12345"], serial: "S12"))
        let cases: [([UInt8], Bool?)] = [
            (bytes, true), (bytes + text("VRAID "), true), (Array(bytes.dropLast()), false),
            (bytes.reversed(), false), (text("S12"), true), (text("   S12"), true), (text("S12     VRAID"), true),
            (text("S12VRA"), true), (text("S123"), false), (text("S1"), false), ([], nil), ([0, 0, 0x20], nil),
            (text("VENDOR  12345VRAID"), true),
        ]
        for (identifier, matches) in cases {
            #expect(unit.matches(written(identifier)) == matches, "\(identifier)")
        }
        #expect(UnitIdentity(names: [], serial: nil) == nil)
    }

    @Test func leasedDisksAreNoLogicalUnits() throws {
        try withTemporaryDirectory { directory in
            let state = directory.file("state")
            #expect(try !HotAddLeases(stateDirectory: state).holds(disk("sda", serial: "dg1", sequence: 5)))
            let ledger = try RunLedger.begin(stateDirectory: state, machine: "x", repository: nil)
            _ = try ledger.intend("hotadd.disk", ["serial": "dg1", "controller": "c"])
            _ = try ledger.intend("node.read-only", ["node": "/dev/sdb", "diskseq": "7"])
            let leases = try HotAddLeases(stateDirectory: state)
            #expect(leases.holds(disk("sdc", serial: "dg1", sequence: 9)))
            #expect(leases.holds(disk("sdb", serial: "other", sequence: 7)))
            // Another disk has got the name meanwhile.
            #expect(!leases.holds(disk("sdb", serial: "other", sequence: 8)))
            #expect(!leases.holds(disk("sda", serial: nil, sequence: 1)))
            for obligation in ledger.obligations { try ledger.settle(obligation) }
            try ledger.end()
        }
    }

    private func disk(_ name: String, serial: String?, sequence: UInt64) -> AttachedDisk {
        var disk = AttachedDisk(name: name, major: 8, minor: 0, size: 4096)
        (disk.serial, disk.diskSequence) = (serial, sequence)
        return disk
    }
}
