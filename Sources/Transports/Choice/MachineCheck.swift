// Which transports this machine can use at all, whatever the disks: the rules over what it has.
import Block

/// What this machine can do.
public struct MachineCheck: Codable, Sendable, Equatable {
    /// A transport, or something else that a machine can do with disks.
    public struct Ability: Codable, Sendable, Equatable {
        /// The transport's name, or `iscsi`, `vddk`, `mount`.
        public var name: String
        /// The transport, where it is one.
        public var transport: TransportKind?
        /// The worst that was found.
        public var verdict: Finding.Verdict
        public var findings: [Finding]

        init(_ name: String, _ findings: [Finding?]) {
            self.name = name
            transport = TransportKind(rawValue: name)
            self.findings = findings.compactMap(\.self)
            verdict = self.findings.map(\.verdict).max() ?? .ok
        }
    }

    /// Transports in the order in which they are wanted, then what else there is.
    public let abilities: [Ability]

    /// The drivers of adapters that hypervisors add disks to.
    private static let addingDrivers: Set<String> = [
        "vmw_pvscsi", "virtio_scsi", "Virtio SCSI HBA", "mptspi", "mptsas", "mpt3sas", "BusLogic", "sym53c8xx",
    ]

    /// Judges a machine.
    public init(_ facts: MachineFacts, order: TransportOrder = .standard) {
        abilities =
            order.kinds.map { kind in
                switch kind {
                case .san: Ability("san", Self.san(facts))
                case .hotadd: Ability("hotadd", Self.hotAdd(facts))
                case .nbdssl: Ability("nbdssl", [Self.tls(facts)])
                case .nbd: Ability("nbd", [Finding("nbd.client", .ok, "the client is built in")])
                case .file: Ability("file", [Finding("file.reader", .ok, "files and block devices are read directly")])
                }
            } + [
                Ability("iscsi", [Self.iSCSI(facts)]), Ability("mount", [Self.mount(facts)]),
                Ability(
                    "vddk",
                    [
                        Finding(
                            "vddk.library", .excluded, "this version of diskgate does not use VMware's VDDK library",
                            remedy:
                                "use san or hotadd, or nbdkit's vddk plugin as a source: nbd+command:nbdkit -s vddk ..."
                        )
                    ]),
            ]
    }

    private static func san(_ facts: MachineFacts) -> [Finding?] {
        let units = facts.luns.filter { !$0.isOwn && !$0.names.isEmpty }
        var findings: [Finding] = []
        if units.isEmpty {
            findings.append(
                Finding(
                    "san.luns", .excluded,
                    facts.luns.isEmpty
                        ? "this machine sees no SCSI disk"
                        : "none of the \(facts.luns.count) SCSI disks that this machine sees has a worldwide name "
                            + "and is not in use by itself",
                    remedy: "let the storage present LUNs to this machine (zoning, LUN masking, iSCSI login)"))
        } else {
            let names = Set(units.compactMap(\.names.first)).sorted()
            findings.append(
                Finding(
                    "san.luns", .ok,
                    "\(names.count) LUN\(names.count == 1 ? " is" : "s are") seen: "
                        + names.prefix(3).joined(separator: ", ")
                        + (names.count > 3 ? " and \(names.count - 3) more" : "")))
        }
        let loose = Dictionary(grouping: units.filter { $0.multipath == nil }, by: { $0.names[0] }).filter {
            $1.count > 1
        }
        for (name, paths) in loose.sorted(by: { $0.key < $1.key }) {
            findings.append(
                Finding(
                    "san.multipath", .warning,
                    "\(name) is there \(paths.count) times (\(paths.map(\.node).joined(separator: ", "))), and "
                        + "multipath has not joined its paths: it is refused by name",
                    remedy: "set multipath up for it (Debian: multipath-tools), or name one path by its hctl="))
        }
        if !facts.mayOpenAll {
            findings.append(
                Finding(
                    "san.rights", .warning,
                    "this process is not root: LUNs can be opened only where their nodes allow it",
                    remedy: "run it as root, or in the group that the nodes belong to"))
        }
        return findings
    }

    private static func hotAdd(_ facts: MachineFacts) -> [Finding?] {
        let adapters = facts.adapters.filter { addingDrivers.contains($0.driver) }
        let names = adapters.map { "host\($0.number) (\($0.driver))" }.joined(separator: ", ")
        let drivers = Set(facts.adapters.map(\.driver)).sorted().joined(separator: ", ")
        return [
            adapters.isEmpty
                ? Finding(
                    "hotadd.adapters", .excluded,
                    "this machine has no SCSI adapter that disks are added to (it has "
                        + "\(drivers.isEmpty ? "none" : drivers))",
                    remedy: "add a PVSCSI or virtio-scsi adapter to this virtual machine")
                : Finding("hotadd.adapters", .ok, "disks can be added to \(names)"),
            facts.mayAdminister
                ? Finding("hotadd.rights", .ok, "this process may switch disks to read-only (CAP_SYS_ADMIN)")
                : Finding(
                    "hotadd.rights", .excluded,
                    "this process may not switch disks to read-only (CAP_SYS_ADMIN is missing)",
                    remedy: "run it as root"),
            adapters.isEmpty || adapters.contains(where: \.canScan)
                ? nil
                : Finding(
                    "hotadd.scan", .warning,
                    "no adapter can be told to look for new disks: those that do not come by "
                        + "themselves are not found", remedy: "run it as root, with /sys writable"),
            facts.protection
                ?? Finding(
                    "hotadd.protection", .warning,
                    "whether udev, LVM, mdadm and multipath are kept away from disks that come is not known",
                    remedy: "diskgate setup"),
        ]
    }

    private static func tls(_ facts: MachineFacts) -> Finding {
        switch facts.openSSL {
        case .success(let version): Finding("nbdssl.library", .ok, "the client is built in, with \(version)")
        case .failure(let error):
            Finding("nbdssl.library", .excluded, error.message, remedy: "install OpenSSL 3 (Debian: libssl3)")
        }
    }

    private static func iSCSI(_ facts: MachineFacts) -> Finding {
        if facts.hasLibiscsi {
            return Finding("iscsi.initiator", .ok, "libiscsi can be loaded: iscsi: sources are taken for san")
        }
        if facts.kernelSessions > 0 {
            return Finding(
                "iscsi.initiator", .ok, "the kernel has \(facts.kernelSessions) iSCSI sessions: their LUNs are san")
        }
        return Finding(
            "iscsi.initiator", .excluded, "the kernel has no iSCSI session, and libiscsi cannot be loaded",
            remedy: "log in with open-iscsi, or install libiscsi (Debian: libiscsi7)")
    }

    private static func mount(_ facts: MachineFacts) -> Finding {
        if facts.hasKernelNBD && facts.hasNBDClient {
            if !facts.mayAdminister {
                return Finding(
                    "mount.rights", .excluded, "only root may mount", remedy: "run diskgate mount as root")
            }
            return Finding("mount.kernel-client", .ok, "the kernel has an NBD client, and nbd-client is there")
        }
        return Finding(
            "mount.kernel-client", .excluded,
            facts.hasKernelNBD ? "the program nbd-client is missing" : "the kernel has no NBD client (module nbd)",
            remedy: facts.hasKernelNBD
                ? "install nbd-client" : "use a kernel with CONFIG_BLK_DEV_NBD; everything but mount works without")
    }
}
