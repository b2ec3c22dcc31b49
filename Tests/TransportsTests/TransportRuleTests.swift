// Each rule both ways: kept on a site where everything works, and broken by one fact that was changed.
import Block
import Support
import Testing
import Transports

/// A fact, and what a rule makes of it.
struct RuleCase: CustomTestStringConvertible, Sendable {
    let transport: TransportKind
    let rule: String
    let verdict: Finding.Verdict
    /// What the reason has to name.
    let words: String
    let change: @Sendable (inout Inventory) -> Void

    init(
        _ transport: TransportKind, _ rule: String, _ verdict: Finding.Verdict, _ words: String,
        _ change: @escaping @Sendable (inout Inventory) -> Void
    ) {
        (self.transport, self.rule, self.verdict, self.words, self.change) = (transport, rule, verdict, words, change)
    }

    var testDescription: String { "\(transport).\(rule) \(verdict) \(words)" }
}

private let sanCases = [
    RuleCase(.san, "datastore-type", .excluded, "vSAN") { $0.datastores[0].type = .vsan },
    RuleCase(.san, "datastore-type", .excluded, "vVol") { $0.datastores[0].type = .vvol },
    RuleCase(.san, "datastore-type", .excluded, "NFS") { $0.datastores[0].type = .nfs },
    RuleCase(.san, "datastore-type", .excluded, "own disks") { $0.datastores[0].type = .local },
    RuleCase(.san, "datastore-type", .warning, "not known") { $0.datastores[0].type = .unknown },
    RuleCase(.san, "datastore-type", .warning, "says nothing of the datastore fast") { $0.datastores = [] },
    RuleCase(.san, "datastore-type", .warning, "/vm/web.vmdk") { $0.disk.file = "/vm/web.vmdk" },
    // A chain that goes over to another datastore needs both.
    RuleCase(.san, "luns", .excluded, "1 of 1 LUNs of other is not seen by this proxy: naa.600b1") {
        $0.disk.chain = ["[other] web/base.vmdk"]
    },
    RuleCase(.san, "luns", .excluded, "1 of 2 LUNs of fast is not seen by this proxy: naa.600a2") {
        $0.own.luns = ["naa.600a1"]
    },
    RuleCase(.san, "luns", .excluded, "2 of 2 LUNs of fast are not seen") { $0.own.luns = [] },
    RuleCase(.san, "luns", .warning, "this proxy sees is not known") { $0.own.luns = nil },
    RuleCase(.san, "luns", .warning, "fast lies on is not known") { $0.datastores[0].extents = nil },
    RuleCase(.san, "raw-mapping", .excluded, "naa.600ff, is not seen") {
        $0.disk.rawMapping = .virtual
        $0.disk.lun = "naa.600ff"
    },
    RuleCase(.san, "raw-mapping", .warning, "not known") { $0.disk.rawMapping = .virtual },
    RuleCase(.san, "raw-mapping", .ok, "naa.600A2") {
        $0.disk.rawMapping = .virtual
        $0.disk.lun = "naa.600A2"
    },
    RuleCase(.san, "encryption", .excluded, "ciphertext") { $0.machine.isEncrypted = true },
    RuleCase(.san, "stillness", .excluded, "independent_persistent") { $0.disk.mode = "independent_persistent" },
    RuleCase(.san, "stillness", .excluded, "physical mode") { $0.disk.rawMapping = .physical },
    RuleCase(.san, "stillness", .excluded, "multi-writer") { $0.disk.sharing = .multiwriter },
    RuleCase(.san, "stillness", .excluded, "shared with other machines (physical)") { $0.disk.busSharing = .physical },
]

private let hotAddCases = [
    RuleCase(.hotadd, "proxy-machine", .excluded, "no virtual machine") { $0.own.isPhysical = true },
    RuleCase(.hotadd, "proxy-machine", .excluded, "not known") { $0.own.id = nil },
    RuleCase(.hotadd, "proxy-machine", .excluded, "not known") { $0.proxy = nil },
    RuleCase(.hotadd, "not-itself", .excluded, "web (vm-42) is this proxy") { $0.own.id = "vm-42" },
    RuleCase(.hotadd, "proxy-power", .excluded, "off") { $0.own.power = .off },
    RuleCase(.hotadd, "datacenter", .excluded, "datacenter west, the machine in east") { $0.own.datacenter = "west" },
    RuleCase(.hotadd, "datacenter", .excluded, "manager vc2, the machine in vc1") { $0.own.manager = "vc2" },
    RuleCase(.hotadd, "host", .excluded, "does not mount the datastore other (mounted on esx2)") {
        $0.disk.file = "[other] web/web.vmdk"
    },
    RuleCase(.hotadd, "host", .excluded, "maintenance") { $0.hosts[0].isInMaintenance = true },
    RuleCase(.hotadd, "host", .warning, "not known") { $0.own.host = nil },
    RuleCase(.hotadd, "host", .warning, "mounts fast is not known") { $0.datastores[0].hosts = nil },
    RuleCase(.hotadd, "controller", .excluded, "ide") { $0.disk.controller = .ide },
    RuleCase(.hotadd, "controller", .excluded, "sata") { $0.disk.controller = .sata },
    RuleCase(.hotadd, "controller", .excluded, "nvme") { $0.disk.controller = .nvme },
    RuleCase(.hotadd, "controller", .warning, "not known") { $0.disk.controller = nil },
    RuleCase(.hotadd, "slots", .excluded, "0 of 78 places free on 2 adapters") {
        $0.own.controllers?[0].usedUnits = Array(0..<16)
        $0.own.controllers?[1].usedUnits = Array(0..<64)
    },
    RuleCase(.hotadd, "slots", .excluded, "of which only 0 may be used (maximumDisks)") { $0.own.maximumDisks = 1 },
    RuleCase(.hotadd, "slots", .excluded, "no SCSI adapter") { $0.own.controllers = [] },
    RuleCase(.hotadd, "slots", .excluded, "no SCSI adapter") {
        $0.own.controllers?[0].kind = .ide
        $0.own.controllers?[1].busSharing = .physical
    },
    RuleCase(.hotadd, "slots", .warning, "not known") { $0.own.controllers = nil },
    RuleCase(.hotadd, "datastore-accessible", .excluded, "fast") { $0.datastores[0].isAccessible = false },
    RuleCase(.hotadd, "encryption", .excluded, "the proxy is not") { $0.machine.isEncrypted = true },
    RuleCase(.hotadd, "encryption", .warning, "not known") {
        $0.machine.isEncrypted = true
        $0.own.isEncrypted = nil
    },
    RuleCase(.hotadd, "encryption", .ok, "both encrypted") {
        $0.machine.isEncrypted = true
        $0.own.isEncrypted = true
    },
    RuleCase(.hotadd, "protection", .excluded, "LVM") { $0.own.isProtected = false },
    RuleCase(.hotadd, "protection", .warning, "not known") { $0.own.isProtected = nil },
    RuleCase(.hotadd, "raw-mapping", .excluded, "physical mode") { $0.disk.rawMapping = .physical },
    RuleCase(.hotadd, "nfs-hosts", .warning, "the proxy on esx1, the machine on esx2") {
        $0.datastores[0].type = .nfs
        $0.machine.host = "esx2"
    },
    RuleCase(.hotadd, "nfs-hosts", .excluded, "stand still") {
        $0.datastores[0].type = .nfs
        $0.machine.host = "esx2"
        $0.policy.allowsHotAddAcrossHostsOnNFS = false
    },
    RuleCase(.hotadd, "vsan", .excluded, "other is a vSAN datastore and the proxy lies on fast") {
        $0.datastores[1].type = .vsan
        $0.disk.file = "[other] web/web.vmdk"
    },
    RuleCase(.hotadd, "vsan", .warning, "before 7.0") {
        $0.datastores[0].type = .vsan
        $0.hosts[0].version = "6.7"
        $0.disk.file = "[other] web/web.vmdk"
    },
    RuleCase(.hotadd, "size-policy", .excluded, "40 GiB, and disks below 100 GiB") {
        $0.policy.minimumHotAddDisk = 100 << 30
    },
    RuleCase(.hotadd, "disk-names", .warning, "SCSI addresses") { $0.own.hasDiskUUIDs = false },
    RuleCase(.hotadd, "size", .warning, "not known") { $0.disk.capacity = nil },
    RuleCase(.hotadd, "large-disk", .excluded, "need 5.5") {
        $0.disk.capacity = 2 << 40
        $0.hosts[0].version = "5.1.0"
    },
    RuleCase(.hotadd, "large-disk", .excluded, "BusLogic") {
        $0.disk.capacity = 2 << 40
        $0.own.controllers = [.init(json: #"{"kind": "buslogic"}"#)]
    },
    RuleCase(.hotadd, "large-disk", .warning, "on the proxy's host esx1 is not known") {
        $0.disk.capacity = 2 << 40
        $0.hosts[0].version = nil
    },
    RuleCase(.hotadd, "large-disk", .warning, "is not known") {
        $0.disk.capacity = 2 << 40
        $0.hosts[0].version = "unreleased"
    },
    RuleCase(.hotadd, "large-disk", .warning, "is not known") {
        $0.disk.capacity = 2 << 40
        $0.hosts[0].kind = nil
        $0.hosts[0].version = "5.1"
    },
    RuleCase(.hotadd, "stillness", .excluded, "does not give it away") { $0.disk.mode = "independent_nonpersistent" },
]

private let networkCases = [
    RuleCase(.nbd, "clear-text", .excluded, "encrypted") { $0.machine.isEncrypted = true },
    RuleCase(.nbd, "clear-text", .excluded, "policy wants TLS") { $0.policy.requiresTLS = true },
    RuleCase(.nbdssl, "size-policy", .excluded, "40 GiB, and disks above 1 GiB") {
        $0.policy.maximumNetworkDisk = 1 << 30
    },
    RuleCase(.nbdssl, "host", .excluded, "does not allow it (it allows NBD)") { $0.hosts[0].transports = ["NBD"] },
    RuleCase(.nbd, "host", .excluded, "it allows none") { $0.hosts[0].transports = [] },
    RuleCase(.nbd, "host", .warning, "maintenance") { $0.hosts[0].isInMaintenance = true },
    RuleCase(.nbd, "host", .warning, "says nothing of its host esx9") { $0.machine.host = "esx9" },
    RuleCase(.nbd, "host", .warning, "not known") { $0.machine.host = nil },
    RuleCase(.nbdssl, "library", .excluded, "VDDK") { $0.own.libraries = ["openssl"] },
    RuleCase(.nbdssl, "library", .warning, "not known") { $0.own.libraries = nil },
    RuleCase(.nbdssl, "library", .excluded, "OpenSSL") {
        $0.hosts[0].kind = .qemu
        $0.own.libraries = []
    },
    RuleCase(.nbd, "sessions", .excluded, "no sessions of the host esx1 are allowed") { $0.hosts[0].sessionLimit = 0 },
    RuleCase(.nbd, "datastore-accessible", .excluded, "fast") { $0.datastores[0].isAccessible = false },
    RuleCase(.nbd, "stillness", .warning, "torn") { $0.disk.mode = "Independent_persistent" },
    RuleCase(.file, "path", .excluded, "fast is not mounted here") { $0.datastores[0].mount = nil },
    RuleCase(.file, "path", .excluded, "not mounted here") { $0.disk.file = "[fast] ../../etc/shadow" },
    RuleCase(.file, "path", .excluded, "/mnt/hidden/web/web.vmdk cannot be read: no") {
        $0.datastores[0].mount = "/mnt/hidden"
    },
    RuleCase(.file, "encryption", .excluded, "ciphertext") { $0.machine.isEncrypted = true },
    RuleCase(.file, "stillness", .excluded, "changes while it is read") { $0.disk.sharing = .multiwriter },
]

extension Inventory.Controller {
    /// An adapter as an inventory has it; one of an unknown kind where that is none.
    init(json: String) {
        let text = #"{"proxy": {"controllers": [\#(json)]}}"#
        let site = try? Inventory(json: Array(text.utf8), from: "an adapter")
        self = site?.proxy?.controllers?.first ?? .unknownKind
    }

    private static var unknownKind: Self { .init(json: #"{"kind": "unknown"}"#) }
}

@Suite struct TransportRuleTests {
    private func findings(_ transport: TransportKind, _ site: Inventory, takesSnapshot: Bool = false) -> [Finding] {
        let rules = TransportRules(site, takesSnapshot: takesSnapshot) { path in
            path.hasPrefix("/mnt/fast/") ? nil : "no"
        }
        return rules.findings(transport, site.disk, of: site.machine)
    }

    @Test(arguments: TransportKind.allCases)
    func whereEverythingIsRightNothingIsFoundWrong(transport: TransportKind) throws {
        let found = findings(transport, try site())
        #expect(found.filter { $0.verdict != .ok } == [] && !found.isEmpty)
    }

    @Test(arguments: sanCases + hotAddCases + networkCases)
    func aChangedFactIsFound(_ example: RuleCase) throws {
        let found = findings(example.transport, try site(example.change))
        let rule = "\(example.transport).\(example.rule)"
        let meant = found.filter {
            $0.rule == rule && $0.verdict == example.verdict && $0.reason.contains(example.words)
        }
        #expect(meant.count == 1, "\(found.filter { $0.verdict != .ok })")
        // Who is kept from something is told what to do.
        for finding in found where finding.verdict != .ok { #expect(finding.remedy?.isEmpty == false, "\(finding)") }
    }

    /// The datastore of the proxy decides: a host writes its redo log there.
    @Test(
        arguments: [
            (1 << 20, 256 << 30), (2 << 20, 512 << 30), (4 << 20, 1 << 40), (8 << 20, 2 << 40),
        ] as [(UInt64, UInt64)])
    func blocksOfVMFS3LimitWhatIsHotAdded(block: UInt64, size: UInt64) throws {
        for (capacity, verdict) in [(size - 512, Finding.Verdict.ok), (size - 511, .excluded), (.max, .excluded)] {
            let changed = try site {
                $0.datastores[0].type = .vmfs3
                $0.datastores[0].blockSize = block
                $0.disk.capacity = capacity
            }
            #expect(findings(.hotadd, changed).first { $0.rule == "hotadd.vmfs3-block" }?.verdict == verdict)
            // VMFS-5 has no such table.
            let newer = try site { $0.disk.capacity = capacity }
            #expect(!findings(.hotadd, newer).contains { $0.rule == "hotadd.vmfs3-block" })
        }
    }

    @Test func vmfs3IsComparedWithTheDisksOwn() throws {
        func verdict(_ change: (inout Inventory) -> Void) throws -> Finding.Verdict? {
            findings(.hotadd, try site(change)).first { $0.rule == "hotadd.vmfs3-block" }?.verdict
        }
        #expect(
            try verdict {
                $0.datastores[0].type = .vmfs3; $0.own.datastore = "other"
            } == .warning)
        #expect(
            try verdict {
                $0.datastores[1].type = .vmfs3; $0.own.datastore = "other"
            } == .warning)
        #expect(
            try verdict {
                $0.datastores[0].type = .vmfs3; $0.datastores[0].blockSize = 3
            } == .warning)
        #expect(
            try verdict {
                $0.datastores[0].type = .vmfs3; $0.datastores[0].blockSize = nil
            } == .warning)
    }

    @Test func hostsThatTakeLargeDisksAreNotWarnedOf() throws {
        for change: (inout Inventory) -> Void in [
            { $0.hosts[0].version = "5.5" }, { $0.hosts[0].version = "ESXi 8.0.1" },
            {
                $0.hosts[0].kind = .qemu
                $0.hosts[0].version = nil
            },
            {
                $0.disk.capacity = (2 << 40) - 512
                $0.hosts[0].version = nil
            },
        ] {
            let changed = try site {
                $0.disk.capacity = 2 << 40
                change(&$0)
            }
            #expect(!findings(.hotadd, changed).contains { $0.rule == "hotadd.large-disk" })
        }
    }

    @Test func stillnessIsASnapshotOrAMachineThatIsOff() throws {
        func verdict(_ transport: TransportKind, takesSnapshot: Bool = false, _ change: (inout Inventory) -> Void)
            throws
            -> Finding.Verdict?
        {
            findings(transport, try site(change), takesSnapshot: takesSnapshot).last?.verdict
        }
        for transport in TransportKind.allCases {
            #expect(try verdict(transport) { $0.machine.hasSnapshot = false } == .excluded)
            #expect(try verdict(transport, takesSnapshot: true) { $0.machine.hasSnapshot = false } == .ok)
            #expect(try verdict(transport) { $0.machine.hasSnapshot = nil } == .warning)
            #expect(
                try verdict(transport) {
                    $0.machine.hasSnapshot = false; $0.machine.power = .unknown
                } == .warning)
            // A machine that is off writes nothing, whatever covers its disks.
            #expect(
                try verdict(transport) {
                    $0.machine.hasSnapshot = false
                    $0.machine.power = .off
                    $0.disk.mode = "independent_persistent"
                } == .ok)
            // Taking a snapshot does not help a disk that snapshots leave out.
            #expect(try verdict(transport, takesSnapshot: true) { $0.disk.sharing = .multiwriter } != .ok)
        }
    }

    @Test func nothingKnownExcludesNothingButWhatHasToBeKnown() throws {
        let empty = #"{"machines": [{"id": "a", "disks": [{"key": "vda"}]}]}"#
        let site = try Inventory(json: Array(empty.utf8), from: "little")
        for transport in [TransportKind.san, .nbdssl, .nbd] {
            let found = findings(transport, site)
            #expect(found.allSatisfy { $0.verdict != .excluded } && found.contains { $0.verdict == .warning })
        }
    }
}

@Suite struct SessionLimitTests {
    @Test(
        arguments: [
            ("3.5", nil, [9]), ("3.5", "vc", [27]), ("4.1.0", nil, [11]), ("4.1", "vc", [23]), ("5.5", nil, [32]),
            ("5.5", "vc", [32, 52]), ("6.7.0", nil, [48]), ("ESXi 7.0.3", "vc", [48, 52]), ("9.9", "vc", [48, 52]),
            ("2.0", nil, [9]), ("unreleased", nil, [9]), ("99999999999999999999.1", nil, [48]),
        ] as [(String, String?, [Int])])
    func areThoseOfTheHostsVersion(version: String, manager: String?, limits: [Int]) throws {
        let found = try SessionLimit.limits(
            of: site {
                $0.hosts[0].version = version
                $0.hosts[0].manager = manager
            }.hosts[0])
        #expect(found.map(\.limit) == limits)
        #expect(found.map(\.key) == ["host esx1", "manager vc"].prefix(limits.count).map { $0 })
    }

    @Test func areNoneForHostsWithoutAny() throws {
        #expect(SessionLimit.limits(of: try site { $0.hosts[0].kind = .qemu }.hosts[0]).isEmpty)
        #expect(SessionLimit.limits(of: try site { $0.hosts[0].sessionLimit = 5 }.hosts[0]).map(\.limit) == [5])
        #expect(SessionLimit.limits(of: try site { $0.hosts[0].sessionLimit = .min }.hosts[0]).map(\.limit) == [0])
    }
}
