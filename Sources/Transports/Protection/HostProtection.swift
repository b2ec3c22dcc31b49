// Keeping hot-added disks from the proxy's own udev, LVM, mdadm and multipath: what is checked before a disk is added,
// and what udev has done with a disk that has come.
public import Block
import FoundationEssentials
import Glibc
public import LinuxIO

/// The settings of a machine that keep its own programs from disks that come: default-deny, because nobody knows who a
/// disk is before it appears.
///
/// The udev rule does the work: disks that it keeps out are not read by udev, so LVM, mdadm, bcache and Btrfs never
/// hear of them, and systemd, udisks and multipath are told to leave them alone. The settings of LVM, mdadm and
/// multipath keep their commands away, too, whoever runs them.
public struct HostProtection: Sendable {
    /// Where the record of the machine's own disks is.
    static let recordPath = "/etc/diskgate/own-disks.json"
    /// How long udev may take to look at a disk, in seconds.
    private static let patience = 10.0
    /// udev looks at the times of its rules at most every 3 seconds.
    private static let reloading = 4.0

    let machine: Machine
    let inventory: DiskInventory
    let udev: UdevDatabase

    /// - Parameters:
    ///   - root: what lies before /etc and /run; empty for this machine. Elsewhere no program is run.
    ///   - sysfs: where sysfs is.
    public init(root: String = "", sysfs: String = "/sys") {
        machine = Machine(root: root)
        inventory = DiskInventory(sysfs: sysfs)
        udev = UdevDatabase(root: root)
    }

    // MARK: - What is recorded

    /// The disks that are recorded as the machine's own; nil where nothing was recorded yet.
    ///
    /// - Throws: `.corrupt` when the record makes no sense, or the system's reason.
    public func ownDisks() throws(BlockError) -> [OwnDisk]? {
        let path = machine.path(Self.recordPath)
        guard let text = try textIfThere(path) else { return nil }
        do {
            let record = try JSONDecoder().decode(ProtectionRecord.self, from: Data(text.utf8))
            if record.version == 1 { return record.disks }
        } catch {
            throw BlockError(
                .corrupt, "reading \(path): it is no record of disks; move it away and run diskgate setup again")
        }
        throw BlockError(.unsupported, "reading \(path): a later version of diskgate has written it")
    }

    func note(_ disks: [OwnDisk]) throws(BlockError) {
        let path = machine.path(Self.recordPath)
        let encoder = JSONEncoder()
        encoder.outputFormatting = [.prettyPrinted, .sortedKeys, .withoutEscapingSlashes]
        let bytes: Data
        do { bytes = try encoder.encode(ProtectionRecord(disks: disks)) } catch {
            throw BlockError(.invalid, "writing \(path): \(error)")
        }
        try makeDirectories(directoryName(path), mode: 0o755)
        try writeDurably(path, Array(bytes) + [UInt8(ascii: "\n")], mode: 0o644)
    }

    /// The disks that the rule is about.
    func scsiDisks() throws(BlockError) -> [AttachedDisk] {
        try inventory.disks().filter(\.isSubjectToRule)
    }

    // MARK: - Checking

    /// How it is with every program that might act on disks that come.
    ///
    /// - Parameter asks: whether to ask the programs themselves, or to look at their files where that is enough.
    /// - Throws: `BlockError` when something cannot be read.
    public func findings(asks: Bool = true) throws(BlockError) -> [ProtectionFinding] {
        let own = try ownDisks() ?? []
        return [
            try UdevSetting(machine, udev, own: own).finding(try scsiDisks()),
            try LVMSetting(machine: machine).finding(asks: asks),
            try ArrayAssembly(machine: machine).finding(),
            try MultipathBlacklist(machine: machine).finding(asks: asks),
        ]
    }

    /// Refuses where a program might act on a disk that comes.
    ///
    /// - Parameter doing: what is refused.
    /// - Returns: from what disks are kept, for people.
    /// - Throws: `.denied` with what is missing, or when nobody can tell.
    @discardableResult
    public func require(_ doing: String) throws(BlockError) -> String {
        let findings = try findings(asks: false)
        let missing = findings.filter { $0.state == .missing }
        if let first = missing.first {
            let names = missing.map { "\($0.part.rawValue): \($0.detail)" }.joined(separator: "; ")
            var advice =
                first.remedy.map { $0.contains("diskgate setup") } == true || missing.count > 1
                ? "run diskgate setup once, as root" : "diskgate setup --check tells what to do"
            if !udev.isActive && machine.isContainer { advice = "run diskgate on the host, after diskgate setup there" }
            throw BlockError(
                .denied,
                "\(doing): this machine's own programs may act on what lies on the disk (\(names)); \(advice), or say "
                    + "unprotected=yes in the source if you know that they do not")
        }
        reloadIfFresh()
        let kept = findings.filter { $0.state == .inForce }.map(\.part.rawValue)
        return kept.isEmpty ? "nothing here acts on disks" : "of \(kept.joined(separator: ", "))"
    }

    /// From what disks are kept that were opened with `unprotected=yes`, for people.
    static let unprotected = "no: unprotected=yes was said"

    /// Says aloud that nobody has looked whether disks are kept out, because somebody has said so.
    static func warn(_ doing: String) {
        let text =
            "diskgate: warning: \(doing): nothing was done to keep this machine's LVM, mdadm, multipath and file "
            + "systems from what lies on the disk (unprotected=yes): they may start it, and write to it\n"
        _ = text.withCString { write(STDERR_FILENO, $0, strlen($0)) }
    }

    /// Has udev read its rules where they have just been changed, and it may not have looked yet.
    private func reloadIfFresh() {
        var status = stat()
        guard udev.isActive, stat(machine.path(UdevRules.path), &status) == 0 else { return }
        var now = timespec()
        clock_gettime(CLOCK_REALTIME, &now)
        let age = Double(now.tv_sec - status.st_ctim.tv_sec) + Double(now.tv_nsec - status.st_ctim.tv_nsec) / 1e9
        if age < Self.reloading { _ = try? machine.say("udevadm", ["control", "--reload"]) }
    }

    /// Waits until udev is done with a disk, and refuses one that it has not kept out.
    ///
    /// - Parameter doing: what is refused.
    /// - Throws: `.denied` when the disk passes for one of the machine's own, or udev has read what lies on it.
    public func confirm(_ disk: AttachedDisk, _ doing: String) throws(BlockError) {
        if !udev.isActive { return }
        let end = monotonicSeconds() + Self.patience
        while true {
            let entry = udev.entry(major: disk.major, minor: disk.minor)
            let refusal = Self.refusal(entry)
            // What is noted may still be about a disk that had this node before.
            guard let refusal else { return }
            if monotonicSeconds() > end { throw BlockError(.denied, "\(doing): \(disk.node) \(refusal)") }
            usleep(entry == nil ? 2000 : 20_000)
        }
    }

    /// Why a disk with this entry is not kept out; nil where it is.
    static func refusal(_ entry: UdevDatabase.Entry?) -> String? {
        guard let entry else { return "has not been looked at by udev within \(Int(patience)) s; is udev at work?" }
        if entry.properties[UdevRules.ownMark] != nil {
            return "passes for one of this machine's own disks (it has the name or the place of one: diskgate setup "
                + "--check lists them), so this machine's programs may act on it"
        }
        guard entry.properties[UdevRules.mark] != nil else {
            return "was not kept out by udev: the rule \(UdevRules.path) was not in force when it came; run diskgate "
                + "setup again"
        }
        if let type = entry.properties["ID_FS_TYPE"] {
            return "was read by udev all the same, which has found \(type) on it: another rule has it read; "
                + "diskgate setup --check tells which rules there are"
        }
        if let link = entry.links.first(where: { !"/dev/\($0)".hasPrefix(UdevRules.links) }) {
            return "has a link by udev all the same, /dev/\(link): another rule makes it"
        }
        if entry.properties["SYSTEMD_READY"] != "0" {
            return
                "was made known to systemd all the same: another rule says SYSTEMD_READY; diskgate setup --check tells "
                + "which rules there are"
        }
        return nil
    }
}
