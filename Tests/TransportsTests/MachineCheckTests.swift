// What a machine can do, judged from facts that tests have made, and facts read from a sysfs that they have made.
import Block
import Glibc
import LinuxIO
import Support
import Testing
import Transports

@Suite struct MachineCheckTests {
    /// A machine on which everything works.
    private func facts(_ change: (inout MachineFacts) -> Void = { _ in }) -> MachineFacts {
        var facts = MachineFacts()
        facts.luns = [
            .init(node: "/dev/sda", names: ["naa.5"], isOwn: true), .init(node: "/dev/sdb", names: ["naa.6"]),
        ]
        facts.adapters = [
            .init(number: 0, driver: "ahci", canScan: true), .init(number: 2, driver: "vmw_pvscsi", canScan: true),
        ]
        facts.mayAdminister = true
        facts.mayOpenAll = true
        facts.openSSL = .success("OpenSSL 3.0.0")
        facts.hasLibiscsi = true
        facts.hasKernelNBD = true
        facts.hasNBDClient = true
        facts.protection = Finding("hotadd.protection", .ok, "the rule is in force")
        change(&facts)
        return facts
    }

    private func ability(_ name: String, _ change: (inout MachineFacts) -> Void = { _ in }) throws
        -> MachineCheck.Ability
    {
        try #require(MachineCheck(facts(change)).abilities.first { $0.name == name })
    }

    @Test func everythingWorksWhereEverythingIsThere() throws {
        let check = MachineCheck(facts(), order: try TransportOrder("nbd:san:hotadd:nbdssl:file"))
        #expect(check.abilities.map(\.name) == ["nbd", "san", "hotadd", "nbdssl", "file", "iscsi", "mount", "vddk"])
        #expect(check.abilities.filter { $0.verdict != .ok }.map(\.name) == ["vddk"])
    }

    @Test func whatIsMissingIsSaid() throws {
        let cases: [(name: String, verdict: Finding.Verdict, word: String, change: (inout MachineFacts) -> Void)] = [
            ("san", .excluded, "no SCSI disk", { $0.luns = [] }),
            ("san", .excluded, "none of the 1 SCSI disks", { $0.luns.removeLast() }),
            (
                "san", .warning, "naa.6 is there 2 times (/dev/sdb, /dev/sdc)",
                { $0.luns.append(.init(node: "/dev/sdc", names: ["naa.6"])) }
            ),
            ("san", .warning, "not root", { $0.mayOpenAll = false }),
            ("hotadd", .excluded, "it has ahci", { $0.adapters.removeLast() }),
            ("hotadd", .excluded, "it has none", { $0.adapters = [] }),
            ("hotadd", .excluded, "CAP_SYS_ADMIN", { $0.mayAdminister = false }),
            ("hotadd", .warning, "look for new disks", { $0.adapters[1].canScan = false }),
            ("hotadd", .warning, "not known", { $0.protection = nil }),
            (
                "hotadd", .excluded, "no rule",
                { $0.protection = Finding("hotadd.protection", .excluded, "no rule", remedy: "install it") }
            ),
            ("nbdssl", .excluded, "gone", { $0.openSSL = .failure(BlockError(.unsupported, "OpenSSL is gone")) }),
            ("iscsi", .excluded, "libiscsi", { $0.hasLibiscsi = false }),
            ("mount", .excluded, "module nbd", { $0.hasKernelNBD = false }),
            ("mount", .excluded, "nbd-client", { $0.hasNBDClient = false }),
            ("mount", .excluded, "only root", { $0.mayAdminister = false }),
        ]
        for (name, verdict, word, change) in cases {
            let found = try ability(name, change)
            #expect(found.verdict == verdict && found.findings.contains { $0.reason.contains(word) }, "\(found)")
            #expect(found.findings.filter { $0.verdict != .ok }.allSatisfy { $0.remedy != nil })
        }
        // Paths that multipath has joined are one.
        let joined = try ability("san") { facts in
            facts.luns = ["/dev/sdb", "/dev/sdc"].map { .init(node: $0, names: ["naa.6"], multipath: "mpatha") }
        }
        #expect(joined.verdict == .ok && joined.findings[0].reason.contains("1 LUN is seen"))
        #expect(
            try ability("iscsi") {
                $0.hasLibiscsi = false; $0.kernelSessions = 2
            }.verdict == .ok)
    }

    @Test func factsAreReadFromTheSystem() throws {
        try withTemporaryDirectory { directory in
            for name in ["block", "class/scsi_host/host3", "class/iscsi_session/session1", "module/nbd"] {
                try makeDirectories(directory.file(name))
            }
            _ = try directory.makeFile("class/scsi_host/host3/proc_name", Array("vmw_pvscsi\n".utf8))
            _ = try directory.makeFile("class/scsi_host/host3/scan", [])
            let facts = try MachineFacts.gather(sysfs: directory.path) { Finding("hotadd.protection", .ok, "a test") }
            #expect(facts.adapters == [.init(number: 3, driver: "vmw_pvscsi", canScan: true)])
            #expect(facts.kernelSessions == 1 && facts.hasKernelNBD && facts.luns.isEmpty)
            #expect(facts.protection?.reason == "a test" && facts.mayOpenAll == Tool.isRoot)
            // The tests of TLS need it, too.
            let version = try facts.openSSL.get()
            #expect(version.contains("OpenSSL 3") && facts.libraries.contains("openssl"))
        }
    }
}
