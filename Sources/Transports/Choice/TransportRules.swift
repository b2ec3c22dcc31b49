// Whether a disk can be read over a transport: every rule, asked of the inventory and of nothing else.
import Block

/// The rules, over an inventory. Nothing is opened and nothing is asked: what the inventory does not say gives a
/// warning that says so.
public struct TransportRules: Sendable {
    /// What is used up: by other jobs, and by disks that were planned before.
    public struct Usage: Sendable, Equatable {
        /// Places for hot-added disks that disks of the same request have been given.
        public var slots = 0
        /// Sessions by the keys of `SessionLimit`.
        public var sessions: [String: Int] = [:]

        /// Nothing is used.
        public init() {}
    }

    /// What is known of the site.
    public let inventory: Inventory
    /// Whether a snapshot of the machine will be there when its disks are read, as in a backup. Otherwise it counts
    /// what the inventory says of snapshots.
    public let takesSnapshot: Bool
    /// Why a file cannot be read by this process; nil when it can.
    public let obstacle: @Sendable (_ path: String) -> String?

    /// Rules over an inventory.
    public init(
        _ inventory: Inventory, takesSnapshot: Bool = true,
        obstacle: @escaping @Sendable (String) -> String? = { _ in nil }
    ) {
        self.inventory = inventory
        self.takesSnapshot = takesSnapshot
        self.obstacle = obstacle
    }

    /// What all rules of a transport say of a disk.
    public func findings(
        _ transport: TransportKind, _ disk: Inventory.Disk, of machine: Inventory.Machine, usage: Usage = Usage()
    ) -> [Finding] {
        let own: [Finding?]
        switch transport {
        case .san: own = sanFindings(disk, machine)
        case .hotadd: own = hotAddFindings(disk, machine, usage)
        case .nbdssl, .nbd: own = networkFindings(transport, disk, machine, usage)
        case .file: own = fileFindings(disk, machine)
        }
        return own.compactMap(\.self) + [stillness(transport, disk, machine)]
    }

    var policy: ChoicePolicy { inventory.policy }

    /// What is known of the datastores of a disk, with the names of those that the inventory does not have.
    func datastores(of disk: Inventory.Disk) -> (known: [Inventory.Datastore], missing: [String]) {
        var known: [Inventory.Datastore] = []
        var missing: [String] = []
        for name in disk.datastores {
            if let datastore = inventory.datastore(name) { known.append(datastore) } else { missing.append(name) }
        }
        return (known, missing)
    }

    // MARK: - What holds for all transports

    /// Whether the disk stands still while it is read: the machine is off, or a snapshot covers the disk.
    private func stillness(_ transport: TransportKind, _ disk: Inventory.Disk, _ machine: Inventory.Machine) -> Finding
    {
        let rule = "\(transport).stillness"
        switch machine.power {
        case .off, .suspended:
            return Finding(rule, .ok, "the machine is \(machine.power == .off ? "off" : "suspended")")
        case .on, .unknown, nil: break
        }
        let mayRun = machine.power == .on ? "the machine runs" : "the machine may run"
        if let why = uncovered(disk) {
            if transport == .nbd || transport == .nbdssl {
                return Finding(
                    rule, .warning,
                    "\(mayRun) and no snapshot covers the disk, since \(why): what is read may be torn, "
                        + "and the host may refuse it", remedy: "switch the machine off for the backup of this disk")
            }
            let consequence = transport == .hotadd ? "its host does not give it away" : "it changes while it is read"
            return Finding(
                rule, .excluded, "\(mayRun) and no snapshot covers the disk, since \(why): \(consequence)",
                remedy: "switch the machine off for the backup of this disk"
                    + (transport == .san ? ", or say ?inconsistent=yes" : ""))
        }
        if machine.hasSnapshot == true { return Finding(rule, .ok, "a snapshot covers the disk") }
        if takesSnapshot { return Finding(rule, .ok, "a snapshot is taken before it is read") }
        let remedy = "take a snapshot of the machine and read what lies below it"
        if machine.hasSnapshot == nil || machine.power != .on {
            return Finding(rule, .warning, "\(mayRun), and whether it has a snapshot is not known", remedy: remedy)
        }
        return Finding(rule, .excluded, "the machine runs and has no snapshot: it writes to the disk", remedy: remedy)
    }

    /// Why snapshots leave a disk out; nil when they do not.
    private func uncovered(_ disk: Inventory.Disk) -> String? {
        if disk.isIndependent { return "its mode is \(disk.mode ?? "independent")" }
        if disk.rawMapping == .physical { return "it is a raw mapping in physical mode" }
        if disk.sharing == .multiwriter { return "several machines may write to it (multi-writer)" }
        switch disk.busSharing {
        case .virtual, .physical:
            return "its adapter is shared with other machines (\(disk.busSharing?.rawValue ?? ""))"
        case .some(.none), .unknown, nil: return nil
        }
    }

    /// Whether the hosts themselves reach what the disk lies on.
    func accessibility(_ transport: TransportKind, _ disk: Inventory.Disk) -> Finding? {
        let (known, _) = datastores(of: disk)
        guard let lost = known.first(where: { $0.isAccessible == false }) else { return nil }
        return Finding(
            "\(transport).datastore-accessible", .excluded, "the hosts do not reach the datastore \(lost.name)",
            remedy: "bring the datastore \(lost.name) back")
    }

    /// Of several names, the first few.
    func listed(_ names: [String]) -> String {
        names.count <= 4
            ? names.joined(separator: ", ") : "\(names.prefix(3).joined(separator: ", ")) and \(names.count - 3) more"
    }
}
