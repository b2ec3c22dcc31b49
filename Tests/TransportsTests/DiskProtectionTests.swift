// What disks and doctor say of disks from which this machine's own programs are kept, or not.
import Block
import LinuxIO
import Support
import Testing

@testable import Transports

@Suite struct DiskProtectionTests {
    private func states(_ machine: FakeMachine) throws -> [String: DiskProtection]? {
        guard let protections = try DiskProtections(of: machine.protection) else { return nil }
        var states: [String: DiskProtection] = [:]
        for disk in try machine.protection.inventory.disks() { states[disk.name] = protections.state(of: disk) }
        return states
    }

    @Test func nothingIsToldBeforeSetupWhereNoUdevIs() throws {
        try withMachine { machine in
            #expect(try states(machine) == nil)
            try machine.write("run/udev/control", "")
            // vda is no SCSI disk.
            #expect(try states(machine) == ["sda": .notKeptOut, "sdb": .notKeptOut])
        }
    }

    @Test func eachDiskIsOwnOrKeptOutOrNot() throws {
        try withMachine { machine in
            _ = try machine.setup().install()
            #expect(try states(machine) == ["sda": .own, "sdb": .keptOut])
            try machine.write("run/udev/control", "")
            #expect(try states(machine) == ["sda": .own, "sdb": .notKeptOut])
            try machine.write("run/udev/data/b8:16", "E:DISKGATE_KEPT_OUT=1\nE:SYSTEMD_READY=0\n")
            #expect(try states(machine) == ["sda": .own, "sdb": .keptOut])
            try machine.write("run/udev/data/b8:16", "E:DISKGATE_KEPT_OUT=1\nE:ID_FS_TYPE=ext4\nE:SYSTEMD_READY=0\n")
            #expect(try states(machine) == ["sda": .own, "sdb": .notKeptOut])
        }
    }

    @Test func aProgramThatDoesNotKeepAwayMakesItNotKeptOut() throws {
        try withMachine { machine in
            _ = try machine.setup().install()
            try machine.installPrograms()
            #expect(try states(machine) == ["sda": .own, "sdb": .notKeptOut])
            _ = try machine.setup().install()
            #expect(try states(machine) == ["sda": .own, "sdb": .keptOut])
        }
    }

    @Test func attachedDisksWithoutSetupAreWarnedOfInOneLine() throws {
        try withMachine { machine in
            let added = Obligation(id: 1, kind: "hotadd.disk", details: ["serial": "dg1", "node": "/dev/sdb"])
            let held = Obligation(id: 1, kind: "node.read-only", details: ["node": "/dev/sdb", "diskseq": "23"])
            let coming = Obligation(id: 2, kind: "hotadd.disk", details: ["serial": "dg2"])
            let other = Obligation(id: 3, kind: "qemu.bitmap", details: ["node": "x"])
            let protection = machine.protection
            try machine.write("run/udev/control", "")
            let warning = try #require(protection.warning(about: [added, held, other]))
            #expect(warning.hasPrefix("1 disk is attached, and") && warning.contains("udev"), "\(warning)")
            #expect(!warning.contains("\n"))
            let two = try #require(protection.warning(about: [added, coming]))
            #expect(two.hasPrefix("2 disks are attached, and"), "\(two)")
            #expect(protection.warning(about: [other]) == nil && protection.warning(about: []) == nil)
            _ = try machine.setup().install()
            try machine.write("run/udev/data/b8:0", "E:DISKGATE_OWN=1\n")
            try machine.write("run/udev/data/b8:16", "E:DISKGATE_KEPT_OUT=1\nE:SYSTEMD_READY=0\n")
            #expect(protection.warning(about: [added, held]) == nil)
            try machine.write("etc/diskgate/own-disks.json", "nonsense")
            let unclear = try #require(protection.warning(about: [added]))
            #expect(unclear.contains("cannot be told"), "\(unclear)")
        }
    }
}
