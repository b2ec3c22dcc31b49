// Which disks a machine sees, read from a sysfs that the tests have made: VMware's, SAN paths, partitions, gaps.
import Block
import Glibc
import LinuxIO
import Support
import Testing

private func withSystem(_ body: (FakeSystem) throws -> Void) throws {
    try withTemporaryDirectory { try body(FakeSystem(directory: $0)) }
}

/// A designator of page 0x83.
private func designator(type: UInt8, codeSet: UInt8, association: UInt8 = 0, _ value: [UInt8]) -> [UInt8] {
    [codeSet, association << 4 | type, 0, UInt8(value.count)] + value
}

private func page(_ code: UInt8, _ body: [UInt8]) -> [UInt8] {
    [0, code, UInt8(body.count >> 8), UInt8(body.count & 255)] + body
}

/// VMware's name of a disk: the bytes of its ddb.uuid.
private let naa: [UInt8] = [0x60, 0, 0xC2, 0x92, 0xBC, 0x97, 0xE9, 0xFF, 0x59, 0xCA, 1, 2, 3, 4, 5, 6]

@Suite struct DiskInventoryTests {
    @Test func namesADiskByWhatItSaysOfItself() throws {
        try withSystem { system in
            try system.addDisk(
                "sdb", "2:0:5:0", bus: "0000:03:00.0", driver: "vmw_pvscsi", sectors: 4096, minor: 16)
            try system.write("block/sdb/device/vpd_pg83", page(0x83, designator(type: 3, codeSet: 1, naa)))
            try system.write("block/sdb/device/vpd_pg80", page(0x80, Array("  6000c292bc97  ".utf8)))
            try system.write("block/sdb/device/vendor", "VMware  ")
            let disks = try DiskInventory(sysfs: system.sysfs).disks()
            let disk = try #require(disks.first)
            #expect(disk.node == "/dev/sdb" && disk.size == 4096 * 512)
            #expect(disk.wwid == "naa.6000c292bc97e9ff59ca010203040506" && disk.serial == "6000c292bc97")
            #expect(disk.address == SCSIAddress("2:0:5:0") && disk.diskSequence == 23 && disk.vendor == "VMware")
            #expect(disk.controller?.driver == "vmw_pvscsi" && disk.controller?.address == "0000:03:00.0")
            for text in ["6000c292bc97e9ff59ca010203040506", "0x6000C292BC97E9FF59CA010203040506", disk.wwid ?? ""] {
                #expect(DiskSelector.name(text).matches(disk), "\(text)")
            }
            #expect(!DiskSelector.name("6000c292bc97e9ff59ca01020304050").matches(disk))
            #expect(DiskSelector.serial("6000c292bc97").matches(disk) && !DiskSelector.serial("6000c2").matches(disk))
        }
    }

    @Test func knowsPathsOfOneLogicalUnit() throws {
        try withSystem { system in
            for (name, address, minor) in [("sdc", "3:0:0:1", 32), ("sdd", "4:0:0:1", 48)] {
                try system.addDisk(
                    name, address, bus: "0000:04:00.0", driver: "iscsi_tcp", sectors: 2048, minor: minor)
                try system.write("block/\(name)/device/wwid", "naa.5000000000000001")
                try system.write("block/\(name)/holders/dm-0/dev", "253:0")
            }
            try system.write("block/dm-0/size", "2048")
            try system.write("block/dm-0/dev", "253:0")
            try system.write("block/dm-0/dm/uuid", "mpath-35000000000000001")
            try system.write("block/dm-0/dm/name", "backup-lun")
            let disks = try DiskInventory(sysfs: system.sysfs).disks()
            #expect(disks.map(\.name) == ["sdc", "sdd", "dm-0"])
            for disk in disks.prefix(2) {
                #expect(disk.multipath?.name == "dm-0" && disk.multipath?.title == "backup-lun")
                #expect(disk.wwid == "naa.5000000000000001")
            }
        }
    }

    @Test func leavesOutWhatIsNoDisk() throws {
        try withSystem { system in
            try system.addDisk("sda", "0:0:0:0", bus: "0000:00:01.0", driver: "ata_piix", sectors: 2048, minor: 0)
            try system.write("block/sda/sda1/partition", "1")
            try system.write("block/sda/sda1/dev", "8:1")
            try system.write("block/sda/sda1/holders/dm-3/dev", "253:3")
            try system.write("block/loop0/size", "0")
            try system.write("block/loop0/dev", "7:0")
            try system.write("block/odd/size", "many")
            try system.write("block/gone/dev", "9:9")
            try system.write("block/huge/size", "18446744073709551615")
            try system.write("block/huge/dev", "9:1")
            let disks = try DiskInventory(sysfs: system.sysfs).disks()
            #expect(disks.map(\.name) == ["sda"])
            let partition = disks.first?.partitions.first
            #expect(partition?.name == "sda1" && partition?.major == 8 && partition?.minor == 1)
            #expect(disks.first?.holders.map(\.name) == ["dm-3"])
        }
    }

    @Test func findsTheDiskOfAnOpenNode() throws {
        try requireError(.invalid, "asking for the disk of a file") {
            _ = try DiskInventory().disk(of: try Descriptor.open("/proc/self/status", O_RDONLY))
        }
    }

    @Test(.enabled(if: LoopDevice.areAvailable, Comment(rawValue: LoopDevice.reason)))
    func hearsOfADiskThatComes() throws {
        let watch = DiskWatch()
        try LoopDevice.with(patternBytes(1 << 20, seed: 3)) { node, _ in
            let name = String(node.dropFirst("/dev/".count))
            let found = try watch.wait(seconds: 20) { $0.first { $0.name == name } }
            #expect(found?.size == 1 << 20)
            let again = try DiskInventory().disk(of: try Descriptor.open(node, O_RDONLY))
            #expect(again == found)
            let missing = try watch.wait(seconds: 0.01) { $0.first { $0.name == "none" } }
            #expect(missing == nil)
        }
    }

    /// Makes a loop device while a watch waits that looks by itself only after an hour, and tells whether it is seen
    /// before the watch's time is up, when it looks for the last time.
    private func isSeen(bufferBytes: Int32? = nil, before comes: () -> Void = {}) throws -> Bool {
        // Without events it would look all the time.
        _ = try KernelEvents()
        return try LoopDevice.with(patternBytes(1 << 20, seed: 5)) { first, file in
            LoopDevice.detach(first)
            let watch = DiskWatch(lookingEvery: 3600, bufferBytes: bufferBytes)
            // What the first device still has to say must not be what wakes it.
            _ = try watch.wait(seconds: 0.5) { (_) -> Bool? in nil }
            var added: String?
            defer { if let added { LoopDevice.detach(added) } }
            var failure: (any Error)?
            let seconds = 30.0
            let end = monotonicSeconds() + seconds
            let found = try watch.wait(seconds: seconds) { (disks) -> Bool? in
                if failure != nil { return false }
                if let added { return disks.contains { $0.node == added } && monotonicSeconds() < end ? true : nil }
                do {
                    comes()
                    added = try LoopDevice.attach(file, sectorSize: 512)
                } catch { failure = error }
                return nil
            }
            if let failure { throw failure }
            return found == true
        }
    }

    @Test(.enabled(if: LoopDevice.areAvailable, Comment(rawValue: LoopDevice.reason)))
    func isWokenByTheKernelsEvent() throws {
        #expect(try isSeen())
    }

    @Test(.enabled(if: LoopDevice.areAvailable, Comment(rawValue: LoopDevice.reason)))
    func looksAgainWhenEventsWereLost() throws {
        // The events of another device fill the room that there is, so that the disk's own one is lost.
        #expect(try isSeen(bufferBytes: 1) { for _ in 0..<50 { tellOfNull() } })
    }
}

/// Has the kernel tell of a device that is no disk.
private func tellOfNull() {
    let file = try? Descriptor.open("/sys/devices/virtual/mem/null/uevent", O_WRONLY)
    if let file { _ = write(file.number, "change", 6) }
}

@Suite struct VitalProductDataTests {
    @Test func prefersTheLongestName() {
        let names = VitalProductData.names(
            page(
                0x83,
                designator(type: 1, codeSet: 2, Array("VENDOR  Disk   77".utf8))
                    + designator(type: 3, codeSet: 1, Array(naa.prefix(8)))
                    + designator(type: 3, codeSet: 1, association: 1, Array(naa.suffix(8)))
                    + designator(type: 2, codeSet: 1, Array(naa.prefix(8)))
                    + designator(type: 3, codeSet: 1, naa)))
        let expected = [
            "naa.6000c292bc97e9ff59ca010203040506", "naa.6000c292bc97e9ff", "eui.6000c292bc97e9ff",
            "t10.VENDOR  Disk   77",
        ]
        #expect(names == expected)
    }

    @Test func passesOverWhatIsCutOff() {
        let whole = page(0x83, designator(type: 3, codeSet: 1, naa))
        for count in 0..<whole.count { #expect(VitalProductData.names(Array(whole[..<count])).isEmpty, "\(count)") }
        #expect(VitalProductData.names(whole).count == 1)
        #expect(VitalProductData.names(page(0x80, Array("x".utf8))).isEmpty)
        #expect(VitalProductData.serial(page(0x80, [])) == nil)
        #expect(VitalProductData.serial(page(0x80, Array("    ".utf8))) == nil)
        #expect(VitalProductData.serial(page(0x80, Array("      beaf11".utf8))) == "beaf11")
        // A header that promises more than there is.
        #expect(VitalProductData.serial([0, 0x80, 0xFF, 0xFF, 0x41, 0x42]) == "AB")
    }
}

@Suite struct KernelEventTests {
    @Test func takesAMessageApart() throws {
        let text = "add@/devices/virtual/block/loop0\0ACTION=add\0DEVNAME=loop0\0SUBSYSTEM=block\0EMPTY=\0odd\0"
        let event = try #require(KernelEvent(Array(text.utf8)))
        #expect(event.action == "add" && event.path == "/devices/virtual/block/loop0")
        #expect(event.values == ["ACTION": "add", "DEVNAME": "loop0", "SUBSYSTEM": "block", "EMPTY": ""])
        // What udev sends to its own group, and nothing.
        #expect(KernelEvent(Array("libudev\0\0".utf8)) == nil && KernelEvent([]) == nil)
    }

    @Test(.enabled(if: LoopDevice.areAvailable, Comment(rawValue: LoopDevice.reason)))
    func lostEventsAreToldOf() throws {
        let events = try KernelEvents(bufferBytes: 1)
        let count = 50
        for _ in 0..<count { tellOfNull() }
        var answers: [KernelEvents.Answer] = []
        while answers.last != .nothing { answers.append(try events.next(seconds: 0)) }
        #expect(answers.contains(.overrun))
        let heard = answers.count { if case .event = $0 { true } else { false } }
        #expect(heard < count)
        // What comes from then on is heard.
        tellOfNull()
        let next = try events.next(seconds: 20)
        guard case .event = next else { throw CheckFailure("after the loss: \(next)") }
    }
}
