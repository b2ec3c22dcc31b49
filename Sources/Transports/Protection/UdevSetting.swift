// udev as a machine has it: our rule among its rules, and what it has done with the disks that are there.
import Block
import LinuxIO

/// udev's rules on a machine.
struct UdevSetting {
    let machine: Machine
    let database: UdevDatabase
    let own: [OwnDisk]

    /// Where udev looks for rules, in the order in which they count (udev(7)).
    private static let directories = [
        "/etc/udev/rules.d", "/run/udev/rules.d", "/usr/local/lib/udev/rules.d", "/usr/lib/udev/rules.d",
        "/lib/udev/rules.d",
    ]
    /// What our rule says, and no other may take back: those that nobody else has a reason to set, and those that
    /// rules of others set for their own devices.
    private static let properties = [UdevRules.mark, "UDEV_DISABLE_PERSISTENT_STORAGE_RULES_FLAG"]
    private static let sharedProperties = ["SYSTEMD_READY", "UDISKS_IGNORE"]

    init(_ machine: Machine, _ database: UdevDatabase, own: [OwnDisk]) {
        (self.machine, self.database, self.own) = (machine, database, own)
    }

    /// Our rule.
    var file: ManagedFile { ManagedFile(path: machine.path(UdevRules.path)) }

    /// How it is with udev.
    ///
    /// - Parameter disks: the SCSI disks that are there.
    func finding(_ disks: [AttachedDisk]) throws(BlockError) -> ProtectionFinding {
        if !database.isActive && machine.isContainer {
            return ProtectionFinding(
                .udev, .missing, "this is a container, and the host's udev cannot be seen from here",
                remedy: "run diskgate on the host; where the host's programs are known to keep away, "
                    + "say unprotected=yes in the source")
        }
        guard database.isActive || !machine.root.isEmpty else {
            return ProtectionFinding(.udev, .notNeeded, "no udev is at work here")
        }
        switch try file.state(UdevRules.text(own)) {
        case .current: break
        case .missing:
            return ProtectionFinding(
                .udev, .missing, "it reads every disk that comes, and starts what it finds", remedy: "diskgate setup")
        case .outdated:
            return ProtectionFinding(
                .udev, .missing, "the rule \(UdevRules.path) is not that for the recorded disks",
                remedy: "diskgate setup")
        case .changed:
            return ProtectionFinding(
                .udev, .missing, "somebody has changed \(UdevRules.path)",
                remedy: "move \(UdevRules.path) away, then: diskgate setup")
        }
        if let other = try opponent() {
            return ProtectionFinding(.udev, .missing, other.problem, remedy: other.remedy)
        }
        if let disk = notLookedAt(disks) {
            return ProtectionFinding(
                .udev, .missing, "it has not looked at \(disk.node) since the rule is there", remedy: "diskgate setup")
        }
        let count = "\(own.count) \(own.count == 1 ? "disk" : "disks")"
        return ProtectionFinding(
            .udev, .inForce, "\(UdevRules.path) keeps it from all SCSI disks but \(count) of this machine's own")
    }

    /// A rule of somebody else's that takes back what ours says, or does not go by it.
    private func opponent() throws(BlockError) -> (problem: String, remedy: String)? {
        for (name, path) in machine.files(in: Self.directories, ending: ".rules") {
            let text = try textIfThere(path) ?? ""
            if name == "60-persistent-storage.rules" && !text.contains("UDEV_DISABLE_PERSISTENT_STORAGE_RULES_FLAG") {
                return (
                    "\(path) reads every disk, whatever other rules say",
                    "remove \(path), so that udev's own file of this name counts"
                )
            }
            if "/etc/udev/rules.d/\(name)" == UdevRules.path { continue }
            if let line = text.split(separator: "\n").first(where: Self.takesBack) {
                return ("\(path) takes back what the rule says: \(line)", "remove that line from \(path)")
            }
        }
        return nil
    }

    /// Whether a line sets a property of a SCSI disk to something else than our rule does.
    static func takesBack(_ line: Substring) -> Bool {
        if line.first == "#" || line.contains("KERNEL==\"dm-") { return false }
        return (properties + (line.contains("KERNEL==\"sd") ? sharedProperties : [])).contains { property in
            let wanted = property == "SYSTEMD_READY" ? "0" : "1"
            return line.split(separator: ",").contains { part in
                guard let value = part.drop(while: \.isWhitespace).after("ENV{\(property)}") else { return false }
                let assigned = ["=\"", ":=\""].compactMap { value.after($0) }.first
                return assigned.map { $0.prefix { $0 != "\"" } != wanted } ?? false
            }
        }
    }

    /// A disk of which udev has noted what it was before the rule was there.
    func notLookedAt(_ disks: [AttachedDisk]) -> AttachedDisk? {
        disks.first { disk in
            guard let entry = database.entry(major: disk.major, minor: disk.minor) else { return false }
            let isOwn = own.contains { $0.isSame(as: disk) }
            return entry.properties[isOwn ? UdevRules.ownMark : UdevRules.mark] == nil
        }
    }
}
