// Whose a disk is: what setup records by itself, what it asks about, and what it does not take away or let pass.
import Block
import Glibc
import LinuxIO
import Support
import Testing

@testable import Transports

private let rule = "etc/udev/rules.d/05-diskgate.rules"
private let record = "etc/diskgate/own-disks.json"

extension FakeMachine {
    /// Disks of one AHCI adapter: each port is a SCSI host.
    fileprivate func addPort(_ name: String, host: Int, wwid: String?) throws {
        let minor = 16 * host
        try system.addDisk(name, "\(host):0:0:0", bus: "0000:00:1f.2", driver: "ahci", sectors: 8, minor: minor)
        if let wwid { try system.write("block/\(name)/device/wwid", wwid) }
    }

    fileprivate func link(_ path: String, to node: String) throws {
        try write("dev/\(node)", "")
        try makeDirectories(directoryName("\(root)/\(path)"))
        try require(symlink("\(root)/dev/\(node)", "\(root)/\(path)") == 0)
    }

    fileprivate func address(_ text: String) throws -> DiskSelector { .address(try #require(SCSIAddress(text))) }
}

@Suite struct ProtectionRecordTests {
    @Test func portsOfOneAHCIAdapterAreNotOnePlace() throws {
        try withMachine { machine in
            try machine.addPort("sdc", host: 3, wwid: "t10.ATA     QEMU HARDDISK   QM00001")
            try machine.addPort("sdd", host: 4, wwid: "t10.ATA     QEMU HARDDISK   QM00002")
            let outcome = try machine.setup(using: ["sdc"]).install()
            #expect(outcome.ownDisks.map(\.hctl) == ["3:0:0:0"])
            #expect(outcome.keptOut.map(\.node) == ["/dev/sda", "/dev/sdb", "/dev/sdd"])
            let text = try machine.text(rule)
            #expect(text.contains("QM00001\", GOTO=\"diskgate_own\"") && !text.contains("0000:00:1f.2"))
        }
    }

    @Test func anAHCIDiskWithoutANameLetsNoNamedOnePass() throws {
        try withMachine { machine in
            try machine.addPort("sdc", host: 3, wwid: nil)
            try machine.addPort("sdd", host: 4, wwid: "t10.ATA     QEMU HARDDISK   QM00002")
            let outcome = try machine.setup(using: ["sdc"]).install()
            #expect(outcome.ownDisks.map(\.wwid) == [nil] && outcome.keptOut.contains { $0.node == "/dev/sdd" })
            #expect(try machine.text(rule).contains("[0-9]*:0:0:0/block/*\", ENV{.DISKGATE_NAMED}!=\"1\", GOTO="))
        }
    }

    @Test func droppingOneSATADiskLeavesTheOther() throws {
        try withMachine { machine in
            try machine.addPort("sdc", host: 3, wwid: "t10.1")
            try machine.addPort("sdd", host: 4, wwid: "t10.2")
            let setup = machine.setup(using: ["sdc"])
            _ = try setup.install(keep: [try machine.address("4:0:0:0")])
            let dropped = try setup.install(drop: [try machine.address("4:0:0:0")])
            #expect(dropped.ownDisks.map(\.wwid) == ["t10.1"])
            try requireError(.notFound, "dropping what is not recorded") {
                _ = try setup.install(drop: [try machine.address("4:0:0:0")])
            }
            try requireError(.denied, "dropping the disk in use") { _ = try setup.install(drop: [.name("t10.1")]) }
            #expect(try setup.check().ownDisks.map(\.wwid) == ["t10.1"])
        }
    }

    @Test func whatLetsADiskInUsePassIsNotDroppedByAnotherName() throws {
        try withMachine { machine in
            _ = try machine.setup().install()
            // The machine was restored: its disk has another name, and passes by its place.
            try machine.system.write("block/sda/device/wwid", "naa.6000c29000000000")
            let old = try #require(try machine.protection.ownDisks()?.first?.wwid)
            try requireError(.denied, "dropping what the root disk passes by") {
                _ = try machine.setup().install(drop: [.name(old)])
            }
        }
    }

    @Test(arguments: [
        ("UUID=\"1-2\" /data0 ext4 defaults 0 0", "etc/fstab", "dev/disk/by-uuid/1-2", "sdb"),
        ("# x\nLABEL=my\\040disk\t/a\\040b xfs noauto", "etc/fstab", "dev/disk/by-label/my\\x20disk", "sdb"),
        ("/dev/disk/by-id/scsi-1 none swap sw", "etc/fstab", "dev/disk/by-id/scsi-1", "sdb"),
        ("safe PARTUUID=3-4 none luks", "etc/crypttab", "dev/disk/by-partuuid/3-4", "sdb"),
    ])
    func whatTheTablesNameIsOwn(line: String, table: String, link: String, node: String) throws {
        try withMachine { machine in
            try machine.write(table, "\(line)\n")
            try machine.link(link, to: node)
            let outcome = try machine.setup { $0.content = { _ in "ext4" } }.install()
            #expect(outcome.ownDisks.count == 2 && outcome.keptOut.isEmpty)
            #expect(outcome.ownDisks.last?.reason.hasPrefix("in /\(table): ") == true, "\(outcome.ownDisks)")
            // A guest's disk in its slot is no more than that: only disks that the machine runs from go by the slot.
            #expect(outcome.ownDisks.map(\.isSystem) == [true, false])
        }
    }

    @Test func physicalVolumesBesideOwnOnesAreOwn() throws {
        try withMachine { machine in
            let said = "  /dev/sda|u1|vg\n  /dev/sdb|u1|vg\n  /dev/sdz||\n  [unknown]|u1|vg\n"
            let members = VolumeMember.parsed(said) { $0.split(separator: "/").last.map(String.init) }
            #expect(members.count == 3)
            let outcome = try machine.setup { questions in
                questions.members = { _ in members }
                questions.content = { _ in "LVM2_member" }
            }.install()
            #expect(outcome.ownDisks.map(\.reason) == ["mounted at /", "in the volume group vg with others"])
        }
    }

    @Test func aGroupOfAGuestsWithTheSameNameIsNoneOfOurs() throws {
        try withMachine { machine in
            let members = ["sda", "sdb"].map { VolumeMember(node: $0, group: "uuid of \($0)", title: "vg") }
            let outcome = try machine.setup { $0.members = { _ in members } }.install()
            #expect(outcome.ownDisks.count == 1)
        }
    }

    @Test func nothingIsKeptOutUnknowingly() throws {
        try withMachine { machine in
            let setup = machine.setup { $0.content = { $0.name == "sdb" ? "gpt, 2 partitions" : nil } }
            do throws(BlockError) {
                _ = try setup.install()
                Issue.record("a disk with something on it is kept out")
            } catch {
                #expect(error.kind == .denied && error.message.contains("/dev/sdb"))
                #expect(error.message.contains("gpt") && error.message.contains("--not-mine"))
            }
            #expect(!machine.has(rule) && !machine.has(record))
            let place = try machine.address("2:0:1:0")
            try requireError(.denied, "leaving out the root disk") {
                _ = try setup.install(notMine: [try machine.address("2:0:0:0")])
            }
            let outcome = try setup.install(notMine: [place])
            #expect(outcome.ownDisks.count == 1 && outcome.keptOut.map(\.node) == ["/dev/sdb"])
            // Only the first time: what comes later is a guest's.
            #expect(try setup.install().isInForce)
            try requireError(.denied, "leaving out what is recorded") {
                _ = try machine.setup(using: []).install(notMine: [try machine.address("2:0:0:0")])
            }
        }
    }

    @Test func whatOnlyTheKernelHoldsGoesByItsName() throws {
        try withMachine { machine in
            let setup = machine.setup { questions in
                questions.use = { disk, _ in
                    disk.name == "sda" || disk.name == "sdb" ? DiskUse(kind: .held, reason: "held by guest-root") : nil
                }
            }
            // Without a name only its slot would tell it, for ever.
            try requireError(.denied, "recording a disk by its slot") { _ = try setup.install() }
            try machine.system.write("block/sdb/device/wwid", "naa.5")
            #expect(try setup.install().ownDisks.map(\.wwid).contains("naa.5"))
            #expect(try !machine.text(rule).contains("DEVPATH"))
        }
    }

    @Test func isNotRemovedWhileForeignDisksAreHere() throws {
        try withMachine { machine in
            try machine.installPrograms()
            _ = try machine.setup().install()
            do throws(BlockError) {
                _ = try machine.setup().remove()
                Issue.record("it is removed")
            } catch { #expect(error.kind == .denied && error.message.contains("/dev/sdb (")) }
            #expect(machine.has(rule) && machine.has(record))
            #expect(try machine.setup().check().isInForce)
            #expect(try !machine.setup().remove(force: true).isEmpty)
            #expect(!machine.has(rule) && !machine.has(record))
        }
    }

    @Test func initramfsesWithoutTheRuleAreTold() throws {
        try withMachine { machine in
            try machine.write("boot/initrd.img-6", "old")
            var times = [timespec(tv_sec: 1_000_000, tv_nsec: 0), timespec(tv_sec: 1_000_000, tv_nsec: 0)]
            try require(utimensat(AT_FDCWD, "\(machine.root)/boot/initrd.img-6", &times, 0) == 0)
            #expect(try machine.setup().install().warnings.isEmpty)
            try machine.write("usr/sbin/update-initramfs", "#!/bin/false\n")
            try require(chmod("\(machine.root)/usr/sbin/update-initramfs", 0o755) == 0)
            let check = try machine.setup().check()
            #expect(check.warnings.count == 1 && check.isInForce)
            #expect(check.warnings.first?.contains("/boot/initrd.img-6; run update-initramfs -u -k all") == true)
            times = times.map { _ in timespec(tv_sec: time(nil) + 1000, tv_nsec: 0) }
            try require(utimensat(AT_FDCWD, "\(machine.root)/boot/initrd.img-6", &times, 0) == 0)
            #expect(try machine.setup().check().warnings.isEmpty)
            let changed = try machine.setup().install(keep: [try machine.address("2:0:1:0")])
            #expect(changed.warnings.count == 1, "\(changed.warnings)")
            #expect(try machine.setup().remove().contains { $0.hasPrefix("to do: ") })
        }
    }

    @Test(arguments: [
        ("run/systemd/container", "lxc"), (".dockerenv", ""), ("proc/1/environ", "PATH=/bin\u{0}container=podman\u{0}"),
    ])
    func aContainerCannotSeeTheHostsUdev(path: String, text: String) throws {
        try withMachine { machine in
            try machine.write("proc/1/environ", "PATH=/bin\u{0}not_container=1\u{0}")
            #expect(try machine.setup().install().isInForce)
            try machine.write(path, text)
            let finding = try #require(try machine.setup().check().findings.first { $0.part == .udev })
            #expect(finding.state == .missing && finding.detail.contains("host's udev"), "\(finding)")
            try requireError(.denied, "adding a disk in a container") { try machine.protection.require("adding") }
            // One that runs a udev of its own is asked.
            try machine.write("run/udev/control", "")
            #expect(try machine.setup().check().isInForce)
        }
    }
}
