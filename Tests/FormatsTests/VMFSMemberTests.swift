// Which LUNs make a datastore: missing ones, copies, strangers, and what is said of them.
import Block
import Formats
import LinuxIO
import Support
import Testing

private let volumeEntry: [Int: UInt64] = [3: 0x10_0200, 5: 0x10_0200, 6: 0x10_1000]

@Suite struct VMFSMemberTests {
    private func members(_ luns: [any BlockDevice]) throws -> [VMFSMember] {
        var found: [VMFSMember] = []
        for lun in luns { found += try VMFSMember.probe(lun) }
        return found
    }

    private func message(_ body: () throws -> Void) -> String {
        do { try body() } catch { return "\(error)" }
        return ""
    }

    @Test(arguments: [3, 5, 6])
    func memberTellsWhatItIs(version: Int) throws {
        let luns = try VMFSImage.make(version, "--luns", "3").luns()
        let found = try members(luns)
        #expect(found.map(\.lvmVersion) == [UInt32](repeating: UInt32(version), count: 3))
        #expect(Set(found.map(\.deviceUUID)).count == 3 && Set(found.map(\.volumeUUID)).count == 1)
        #expect(found.map(\.deviceCount) == [3, 3, 3] && found.map(\.sectorSize) == [512, 512, 512])
        #expect(found.map { $0.diskID?.text } == ["TESTLUN0000", "TESTLUN0001", "TESTLUN0002"])
        #expect(found[0].deviceNames == (0..<3).map { "naa.6000000000000000000000000000000\($0):1" })
        #expect(found[1].deviceNames.isEmpty)
        #expect(found[0].firstExtent == 0 && found[1].firstExtent == found[0].lastExtent + 1)
    }

    @Test(arguments: [3, 5, 6])
    func missingLUNIsNamed(version: Int) throws {
        let luns = try VMFSImage.make(version, "--luns", "3").luns()
        for missing in 1..<3 {
            let rest = luns.enumerated().filter { $0.offset != missing }.map(\.element)
            let set = try #require(try VMFSMemberSet.grouped(members(rest)).first)
            #expect(set.missing == ["naa.6000000000000000000000000000000\(missing):1"])
            #expect(set.problem?.kind == .notFound)
            let text = message { _ = try openVolume(rest) }
            #expect(
                text.contains("1 of its 3 LUNs are missing: naa.6000000000000000000000000000000\(missing):1"), "\(text)"
            )
        }
        // The first LUN is the one that knows the names.
        #expect(try VMFSMemberSet.grouped(members([luns[1], luns[2]]))[0].missing == ["LUN 1 of 3"])
        #expect(try VMFSMemberSet.grouped(members([luns[1]]))[0].missing == ["LUN 1 of 3", "LUN 3 of 3"])
    }

    @Test(arguments: [5, 6])
    func twoWaysToOneLUNAreRefused(version: Int) throws {
        let image = try VMFSImage.make(version, "--luns", "3")
        let luns = try image.luns()
        try requireError(.invalid, "a LUN twice") { _ = try openVolume(luns + [try image.luns()[1]]) }
    }

    /// A copy that was given another signature is another volume, and its LUNs do not mix with the original's.
    @Test(arguments: [5, 6])
    func copiesWithAnotherSignatureAreToldApart(version: Int) throws {
        let original = try VMFSImage.make(version, "--luns", "3").luns()
        let copy = try VMFSImage.make(version, "--luns", "3", "--snapshot", "77").luns()
        let sets = try VMFSMemberSet.grouped(members([copy[1], original[2], copy[0], original[0], original[1]]))
        #expect(sets.count == 2)
        let whole = try #require(sets.first { $0.problem == nil })
        #expect(whole.members.map(\.device.info.name) == original.map(\.info.name))
        #expect(try whole.open().replica == nil)
        let part = try #require(sets.first { $0.problem != nil })
        #expect(part.members.map(\.device.info.name) == copy[..<2].map(\.info.name))
        // The file system in the copy still names the original's signature.
        let volume = try openVolume(copy)
        #expect(volume.replica?.contains("snapshot number (77)") == true, "\(volume.replica ?? "nil")")
    }

    @Test(arguments: [5, 6])
    func fileSystemOfAnotherVolumeIsAReplica(version: Int) throws {
        let lun = ChangingDevice(try VMFSImage.make(version).luns()[0])
        lun.change(0x1234_5678, at: (volumeEntry[version] ?? 0) + 0x54)
        #expect(try openVolume([lun]).replica?.contains("it was made on volume") == true)
    }

    @Test func severalDatastoresAreKeptApart() throws {
        // Both images have the same UUIDs, except for the snapshot number.
        let luns = try VMFSImage.make(5).luns() + VMFSImage.make(6, "--snapshot", "5").luns()
        let volumes = try VMFSVolume.assemble(members(luns), onlyOnce)
        #expect(volumes.map(\.label) == ["test5", "test6"])
    }

    @Test func otherDisksAreNoMembers() throws {
        #expect(try VMFSMember.probe(try NamelessFile.memory(size: 64 << 20)).isEmpty)
        #expect(try VMFSMember.probe(try PatternDevice(size: 64 << 20, seed: 3)).isEmpty)
        #expect(try VMFSMember.probe(BytesDevice(patternBytes(5000, seed: 1))).isEmpty)
    }

    @Test func sectorsOf4096BytesAreTold() throws {
        for version in [5, 6] {
            let image = try VMFSImage.make(version, "--sector", "4096")
            #expect(try VMFSMember.probe(image.luns()[0]).map(\.sectorSize) == [4096])
            #expect(try image.volume().label == "test\(version)")
        }
    }
}
