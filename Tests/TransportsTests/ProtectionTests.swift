// What setup writes, records, refuses and takes away again, on trees that the tests make: no program is run.
import Block
import Glibc
import LinuxIO
import Support
import Testing

@testable import Transports

private let naa = "naa.6000c292bc97e9ff59ca010203040506"

/// A machine in a directory: its settings in `etc`, `usr` and `run`, its disks in `sys`.
struct FakeMachine {
    let directory: TemporaryDirectory
    let system: FakeSystem
    var root: String { directory.path }

    init(_ directory: TemporaryDirectory) throws {
        self.directory = directory
        try makeDirectories(directory.file("sys"))
        system = FakeSystem(directory: TemporaryDirectory(path: directory.file("sys")))
        try system.addDisk("sda", "2:0:0:0", bus: "0000:03:00.0", driver: "vmw_pvscsi", sectors: 4096, minor: 0)
        try system.write("block/sda/device/wwid", naa)
        try system.addDisk("sdb", "2:0:1:0", bus: "0000:03:00.0", driver: "vmw_pvscsi", sectors: 4096, minor: 16)
        try system.write("block/vda/size", "4096")
        try system.write("block/vda/dev", "254:0")
    }

    /// A machine on which LVM, mdadm and multipath are installed.
    func installPrograms() throws {
        for name in ["lvm", "mdadm", "multipath"] {
            try write("usr/sbin/\(name)", "#!/bin/false\n")
            try require(chmod("\(root)/usr/sbin/\(name)", 0o755) == 0)
        }
        try makeDirectories("\(root)/etc/mdadm")
    }

    func write(_ path: String, _ text: String) throws {
        try makeDirectories(directoryName("\(root)/\(path)"))
        _ = try directory.makeFile(path, Array(text.utf8))
    }

    func text(_ path: String) throws -> String { String(decoding: try contentOfFile("\(root)/\(path)"), as: UTF8.self) }

    func has(_ path: String) -> Bool { access("\(root)/\(path)", F_OK) == 0 }

    var protection: HostProtection { HostProtection(root: root, sysfs: system.sysfs) }

    /// `setup` on a machine that has its disk sda in use.
    func setup(using used: Set<String> = ["sda"], change: (inout DiskQuestions) -> Void = { _ in }) -> ProtectionSetup {
        var questions = DiskQuestions.forTrees
        questions.members = { _ in [] }
        questions.use = { disk, _ in
            used.contains(disk.name) ? DiskUse(kind: .system, reason: "mounted at /") : nil
        }
        change(&questions)
        return ProtectionSetup(protection, questions)
    }
}

func withMachine(_ body: (FakeMachine) throws -> Void) throws {
    try withTemporaryDirectory(in: placeInMemory) { try body(FakeMachine($0)) }
}

private let rule = "etc/udev/rules.d/05-diskgate.rules"
private let record = "etc/diskgate/own-disks.json"

@Suite struct ProtectionTests {
    @Test func recordsDisksInUseAndKeepsOutAllOthers() throws {
        try withMachine { machine in
            let outcome = try machine.setup().install()
            #expect(outcome.isInForce, "\(outcome)")
            #expect(outcome.ownDisks.map(\.wwid) == [naa] && outcome.ownDisks[0].reason == "mounted at /")
            // vda is no SCSI disk: nothing is said of it.
            #expect(outcome.keptOut.map(\.node) == ["/dev/sdb"])
            let text = try machine.text(rule)
            #expect(text.contains("ATTRS{wwid}==\"\(naa)\", GOTO=\"diskgate_own\""))
            #expect(!text.contains("sda") && !text.contains("sdb"))
            let again = try machine.setup().install()
            #expect(again.done.isEmpty && again.isInForce && again.ownDisks == outcome.ownDisks)
            #expect(try machine.setup().check().isInForce)
        }
    }

    @Test func aDiskThatIsUsedLaterIsNotRecordedUntilItIsNamed() throws {
        try withMachine { machine in
            _ = try machine.setup().install()
            let later = try machine.setup(using: ["sda", "sdb"]).install()
            #expect(later.ownDisks.count == 1 && later.keptOut.map(\.use) == ["mounted at /"])
            let place = try #require(SCSIAddress("2:0:1:0"))
            let named = try machine.setup().install(keep: [.address(place)])
            #expect(named.ownDisks.count == 2 && named.keptOut.isEmpty && named.isInForce)
            // Without a name it is known by its place on its adapter, whatever number the adapter has; but the machine
            // does not run from it: no disk with a name passes for it.
            let pattern = "DEVPATH==\"*/0000:03:00.0/*/[0-9]*:0:1:0/block/*\", ENV{.DISKGATE_NAMED}!=\"1\", GOTO="
            #expect(try machine.text(rule).contains(pattern))
            let dropped = try machine.setup().install(drop: [.address(place)])
            #expect(dropped.ownDisks.map(\.wwid) == [naa] && dropped.isInForce)
            try requireError(.denied, "dropping a disk in use") {
                _ = try machine.setup().install(drop: [.name(naa)])
            }
            try requireError(.notFound, "keeping what is not there") {
                _ = try machine.setup().install(keep: [.serial("none")])
            }
        }
    }

    @Test func aRestoredMachineFindsItsDisksByTheirPlaces() throws {
        try withMachine { machine in
            try machine.system.addDisk("sdc", "3:0:0:1", bus: "0000:04:00.0", driver: "lpfc", sectors: 8, minor: 32)
            try machine.system.write("block/sdc/device/wwid", "naa.5000000000000001")
            let outcome = try machine.setup(using: ["sda", "sdc"]).install()
            #expect(outcome.ownDisks.count == 2)
            try machine.system.write("block/sda/device/wwid", "naa.6000c29000000000")
            try machine.system.write("block/sdc/device/wwid", "naa.5000000000000002")
            // A LUN's place may be another's tomorrow; a slot of the machine's own adapter is not.
            #expect(try machine.setup().check().keptOut.map(\.node) == ["/dev/sdb", "/dev/sdc"])
            let text = try machine.text(rule)
            #expect(text.contains("[0-9]*:0:0:0/block/*\", GOTO=\"diskgate_own\""))
            #expect(text.contains("[0-9]*:0:0:1/block/*\", ENV{.DISKGATE_NAMED}!=\"1\", GOTO=\"diskgate_own\""))
        }
    }

    @Test func aDiskThatDiskgateHasAddedIsNobodysOwn() throws {
        try withMachine { machine in
            let setup = machine.setup(using: ["sda", "sdb"]) { $0.isHeld = { $0.name == "sdb" } }
            let outcome = try setup.install()
            #expect(outcome.ownDisks.map(\.wwid) == [naa])
        }
    }

    @Test func isRefusedUntilEveryProgramKeepsAway() throws {
        try withMachine { machine in
            try machine.installPrograms()
            for part in ["udev", "LVM", "mdadm", "multipath"] {
                do throws(BlockError) {
                    try machine.protection.require("adding a disk")
                    Issue.record("nothing is refused")
                } catch { #expect(error.message.contains("\(part): ") && error.message.contains("diskgate setup")) }
            }
            let outcome = try machine.setup().install()
            #expect(outcome.isInForce && outcome.findings.allSatisfy { $0.state == .inForce }, "\(outcome)")
            #expect(try machine.protection.require("adding a disk") == "of udev, LVM, mdadm, multipath")
            for path in [
                rule, "etc/lvm/lvmlocal.conf", "etc/mdadm/mdadm.conf.d/diskgate.conf",
                "etc/multipath/conf.d/diskgate.conf",
            ] {
                let before = try machine.text(path)
                try require(unlink("\(machine.root)/\(path)") == 0)
                try requireError(.denied, "working without \(path)") { try machine.protection.require("adding") }
                _ = try machine.setup().install()
                #expect(try machine.text(path) == before)
            }
        }
    }

    @Test(arguments: [
        rule, "etc/lvm/lvmlocal.conf", "etc/mdadm/mdadm.conf.d/diskgate.conf", "etc/multipath/conf.d/diskgate.conf",
    ])
    func whatSomebodyHasChangedIsLeftAlone(path: String) throws {
        try withMachine { machine in
            try machine.installPrograms()
            _ = try machine.setup().install()
            let written = try machine.text(path)
            let lines = written.split(separator: "\n", omittingEmptySubsequences: false)
            let changed = (lines[..<1] + ["# mine"] + lines[1...]).joined(separator: "\n")
            try machine.write(path, changed)
            let outcome = try machine.setup().install(keep: [.address(try #require(SCSIAddress("2:0:1:0")))])
            #expect(!outcome.isInForce)
            #expect(try machine.text(path) == changed)
            try requireError(.denied, "removing what was changed") { _ = try machine.setup().remove() }
            #expect(try machine.text(path) == changed)
        }
    }

    @Test func whatOthersHaveWrittenStays() throws {
        try withMachine { machine in
            try machine.installPrograms()
            let local = "# mine\nlocal {\n\tsystem_id = \"a\"\n}"
            try machine.write("etc/lvm/lvmlocal.conf", local)
            _ = try machine.setup().install()
            #expect(try machine.text("etc/lvm/lvmlocal.conf").hasPrefix(local + "\n"))
            _ = try machine.setup().install(keep: [.address(try #require(SCSIAddress("2:0:1:0")))])
            let blocks = try machine.text("etc/lvm/lvmlocal.conf").split(separator: "\n").filter {
                $0.hasPrefix("devices/global_filter")
            }
            #expect(blocks.count == 1)
            _ = try machine.setup().remove()
            #expect(try machine.text("etc/lvm/lvmlocal.conf") == local + "\n")
            for path in [rule, record, "etc/mdadm/mdadm.conf.d/diskgate.conf", "etc/multipath/conf.d/diskgate.conf"] {
                #expect(!machine.has(path), "\(path) is left")
            }
            #expect(try machine.setup().remove().isEmpty)
        }
    }

    @Test func aFilterOfTheAdministratorsOwnIsNotReplaced() throws {
        try withMachine { machine in
            try machine.installPrograms()
            let own = "devices {\n    global_filter = [ \"a|^/dev/|\" ]\n}\n"
            try machine.write("etc/lvm/lvmlocal.conf", own)
            let outcome = try machine.setup().install()
            #expect(
                !outcome.isInForce
                    && outcome.problems.contains { $0.contains("\"r|^/dev/disk/by-diskgate/kept-out/|\"") },
                "\(outcome)")
            #expect(try machine.text("etc/lvm/lvmlocal.conf") == own)
        }
    }

    @Test(arguments: [
        ("AUTO +all\n", false), ("# AUTO -all\nARRAY /dev/md0 UUID=1\n", true), ("AUTO -all\n", true),
        ("AUTO +1.x\n  -all\n", false),
    ])
    func onlyTheFirstAUTOCounts(text: String, isInForce: Bool) throws {
        try withMachine { machine in
            try machine.installPrograms()
            try machine.write("etc/mdadm/mdadm.conf", text)
            let finding = try #require(try machine.setup().install().findings.first { $0.part == .mdadm })
            #expect((finding.state == .inForce) == isInForce, "\(finding)")
            if !isInForce { #expect(finding.remedy?.contains("AUTO -all") == true) }
            #expect(try machine.text("etc/mdadm/mdadm.conf") == text)
        }
    }

    @Test(arguments: [
        ("99-mine.rules", "KERNEL==\"sd*\", ENV{SYSTEMD_READY}=\"1\"\n"),
        ("01-mine.rules", "ENV{UDEV_DISABLE_PERSISTENT_STORAGE_RULES_FLAG}=\"\"\n"),
        ("60-persistent-storage.rules", "# nothing asked\n"),
    ])
    func rulesThatTakeItBackAreFound(name: String, text: String) throws {
        try withMachine { machine in
            _ = try machine.setup().install()
            try machine.write("usr/lib/udev/rules.d/55-dm.rules", "ENV{DM_NAME}==\"?*\", ENV{SYSTEMD_READY}=\"1\"\n")
            try machine.write("usr/lib/udev/rules.d/99-fine.rules", "ENV{SYSTEMD_READY}==\"1\", ENV{A}=\"1\"\n")
            #expect(try machine.setup().check().isInForce)
            try machine.write("etc/udev/rules.d/\(name)", text)
            let finding = try #require(try machine.setup().check().findings.first { $0.part == .udev })
            #expect(finding.state == .missing && finding.remedy?.contains(name) == true, "\(finding)")
        }
    }

    @Test func udevsWordOnEachDiskIsAskedFor() throws {
        try withMachine { machine in
            _ = try machine.setup().install()
            try machine.write("run/udev/control", "")
            #expect(try machine.setup().check().isInForce)
            try machine.write("run/udev/data/b8:16", "E:ID_FS_TYPE=ext4\nS:disk/by-label/root\n")
            let finding = try #require(try machine.setup().check().findings.first { $0.part == .udev })
            #expect(finding.state == .missing && finding.detail.contains("/dev/sdb"))
            try machine.write("run/udev/data/b8:16", "E:DISKGATE_KEPT_OUT=1\nE:SYSTEMD_READY=0\n")
            #expect(try machine.setup().check().isInForce)
            let disk = try #require(try machine.protection.scsiDisks().last)
            try machine.protection.confirm(disk, "opening")
        }
    }

    @Test(arguments: [
        ([:] as [String: String], "not in force"), (["DISKGATE_OWN": "1"], "passes for one"),
        (["DISKGATE_KEPT_OUT": "1", "ID_FS_TYPE": "LVM2_member"], "LVM2_member"),
        (["DISKGATE_KEPT_OUT": "1", "SYSTEMD_READY": "1"], "SYSTEMD_READY"),
    ])
    func disksThatWereNotKeptOutAreRefused(properties: [String: String], word: String) {
        let refusal = HostProtection.refusal(UdevDatabase.Entry(properties: properties))
        #expect(refusal?.contains(word) == true, "\(refusal ?? "no refusal")")
    }

    @Test(arguments: [("disk/by-diskgate/kept-out/sdb", false), ("disk/by-uuid/1-2-3", true)])
    func aDiskWithALinkThatAGuestChoseIsRefused(link: String, isRefused: Bool) {
        let properties = ["DISKGATE_KEPT_OUT": "1", "SYSTEMD_READY": "0"]
        let refusal = HostProtection.refusal(UdevDatabase.Entry(properties: properties, links: [link]))
        #expect((refusal != nil) == isRefused, "\(refusal ?? "no refusal")")
    }

    @Test(arguments: [
        (["r|^/dev/disk/by-diskgate/kept-out/|"], true), (["r|^/dev/disk/by-diskgate/kept-out/|", "a|.*|"], false),
        (["r|.*|"], true), (["a|.*|"], false), ([], false), (["a|^/dev/sda$|", "r|.*|"], true),
        (["a|^/dev/disk/by-id/|", "r(by-diskgate)"], true), (["r/sdy/", "a/sdz/"], false), (["r{sdz}"], true),
    ])
    func filtersAreReadAsLVMReadsThem(patterns: [String], isProtected: Bool) {
        #expect((LVMFilter.protection(by: .filter(patterns)) != nil) == isProtected)
    }

    @Test func lvmsWordIsTakenApart() {
        let said = "dir=\"/dev\"\nglobal_filter=[\"a|^/dev/\\\"x|\",\"r|.*|\"]\nuse_devicesfile=1\n"
        #expect(LVMFilter.effective(said, hasDevicesFile: false) == .filter(["a|^/dev/\"x|", "r|.*|"]))
        #expect(LVMFilter.effective(said, hasDevicesFile: true) == .devicesFile)
    }

    @Test func namesAreNoPatterns() {
        #expect(UdevRules.pattern("t10.ATA  A*\"[b]\\\n|?") == "t10.ATA  A???b?????")
    }
}
