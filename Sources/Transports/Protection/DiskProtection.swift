// Of each SCSI disk that is here, whether this machine's own programs are kept from it, for `diskgate disks`; and
// whether that is so while diskgate has disks attached, for `diskgate doctor`.
public import Block
public import LinuxIO

/// Whether this machine's own programs are kept from a disk.
public enum DiskProtection: String, Sendable, Codable {
    /// It is recorded as this machine's own, and they use it.
    case own
    /// They are.
    case keptOut = "kept out"
    /// They are not, or nobody can tell.
    case notKeptOut = "not kept out"
}

/// What the machine's settings make of the disks that are here.
public struct DiskProtections: Sendable {
    private let own: [OwnDisk]
    private let udev: UdevDatabase
    /// Whether all programs keep away, where udev's notes of a disk do not tell.
    private let othersKeepAway: Bool

    /// Reads the record and the settings.
    ///
    /// - Returns: nil where `setup` was never run and no udev is at work: there is nothing to tell then.
    /// - Throws: `BlockError` when something cannot be read.
    public init?(of protection: HostProtection = HostProtection()) throws(BlockError) {
        udev = protection.udev
        let recorded = try protection.ownDisks()
        if recorded == nil && !udev.isActive { return nil }
        own = recorded ?? []
        // udev notes of each disk what it has made of it, whatever its rules are now.
        let isNoted = udev.isActive
        othersKeepAway = try protection.findings(asks: false).filter { $0.part != .udev || !isNoted }.isInForce
    }

    /// How it is with a disk.
    ///
    /// - Returns: nil for disks that are no SCSI disks: nothing is said about them anywhere.
    public func state(of disk: AttachedDisk) -> DiskProtection? {
        guard disk.isSubjectToRule else { return nil }
        if own.contains(where: { $0.isSame(as: disk) }) { return .own }
        if !othersKeepAway { return .notKeptOut }
        if !udev.isActive { return .keptOut }
        let entry = udev.entry(major: disk.major, minor: disk.minor)
        return HostProtection.refusal(entry) == nil ? .keptOut : .notKeptOut
    }
}

extension AttachedDisk {
    /// Whether the rule is about it: it is a SCSI disk.
    var isSubjectToRule: Bool { address != nil && name.hasPrefix("sd") }
}

extension HostProtection {
    /// What is to be said of disks that diskgate has attached, or holds, while this machine's own programs may act on
    /// them; nil where there are none, or the programs keep away.
    ///
    /// - Parameter obligations: what runs have not given back.
    public func warning(about obligations: [Obligation]) -> String? {
        // A disk that was added and is read has two: that of the addition, and that of its node.
        let nodes = obligations.filter { [HotAddTask.kind, HotAddedDisk.kind].contains($0.kind) }
            .map { $0.details["node"] ?? $0.details["serial"] ?? "" }
        let count = Set(nodes).count
        if count == 0 { return nil }
        let disks = count == 1 ? "1 disk is attached, and" : "\(count) disks are attached, and"
        do throws(BlockError) {
            let missing = try findings(asks: false).filter { $0.state == .missing }
            if missing.isEmpty { return nil }
            let names = missing.map { "\($0.part.rawValue): \($0.detail)" }.joined(separator: "; ")
            return "\(disks) this machine's own programs may act on what lies there (\(names)); diskgate setup --check "
                + "tells what to do"
        } catch {
            return "\(disks) whether this machine's own programs may act on what lies there cannot be told: "
                + error.message
        }
    }
}
