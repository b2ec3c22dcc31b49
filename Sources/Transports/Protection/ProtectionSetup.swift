// diskgate setup: recording the machine's own disks, writing the settings that keep its programs from all others, and
// taking them away again.
public import Block
import Glibc
public import LinuxIO

/// What `setup` has done, and how it is now.
public struct SetupOutcome: Sendable, Codable, Equatable {
    /// The machine's own disks.
    public var ownDisks: [OwnDisk]
    /// Nodes of SCSI disks that are there and are kept out, with what uses them all the same.
    public var keptOut: [KeptOutDisk]
    /// What was changed.
    public var done: [String]
    /// What could not be done.
    public var problems: [String]
    /// How it is with each program.
    public var findings: [ProtectionFinding]

    /// A disk that is there and is not the machine's own.
    public struct KeptOutDisk: Sendable, Codable, Equatable {
        public var node: String
        public var wwid: String?
        public var serial: String?
        public var hctl: String?
        public var size: UInt64
        /// What uses it; nil where nothing does.
        public var use: String?
    }

    /// Whether every program that is here keeps away from disks that come.
    public var isInForce: Bool { problems.isEmpty && findings.isInForce }
}

/// Writes, checks and removes the settings of `HostProtection`.
public struct ProtectionSetup {
    private let protection: HostProtection
    private let machine: Machine
    private let inUse: (AttachedDisk, [AttachedDisk]) -> String?
    private let added: Set<String>

    /// - Parameters:
    ///   - protection: of which machine.
    ///   - added: serial numbers of disks that diskgate has added, which are nobody's own.
    ///   - inUse: what uses a disk, given all disks; nil where nothing does.
    public init(
        _ protection: HostProtection = HostProtection(), added: Set<String> = [],
        inUse: @escaping (AttachedDisk, [AttachedDisk]) -> String? = ProtectionSetup.use
    ) {
        (self.protection, self.added, self.inUse) = (protection, added, inUse)
        machine = protection.machine
    }

    // MARK: - Installing

    /// Records the machine's own disks and writes all settings.
    ///
    /// The first time, every SCSI disk that is in use is recorded; from then on only those that are named.
    ///
    /// - Parameters:
    ///   - keep: disks to record as the machine's own.
    ///   - drop: recorded disks that are the machine's own no more.
    /// - Throws: `.notFound` when there is no such disk, `.denied` for a disk to drop that is in use, or why the record
    ///   could not be written. What goes wrong with one program is in the outcome.
    public func install(keep: [DiskSelector] = [], drop: [DiskSelector] = []) throws(BlockError) -> SetupOutcome {
        var done: [String] = []
        var problems: [String] = []
        let before = try protection.ownDisks()
        let own = try record(before, keep: keep, drop: drop)
        func attempt(_ what: String, _ body: () throws(BlockError) -> Bool) {
            do throws(BlockError) { if try body() { done.append(what) } } catch { problems.append(error.message) }
        }
        if own != before {
            try protection.note(own)
            done.append("recorded \(own.count) of this machine's own disks in \(HostProtection.recordPath)")
        }
        attempt("wrote \(UdevRules.path)") { () throws(BlockError) in try installRule(own) }
        let lvm = LVMSetting(machine: machine)
        let arrays = ArrayAssembly(machine: machine)
        let multipath = MultipathBlacklist(machine: machine)
        if lvm.isNeeded {
            attempt("set LVM's filter in \(LVMFilter.path)") { () throws(BlockError) in try lvm.install() }
        }
        if arrays.isNeeded { attempt("wrote \(arrays.file.path)") { () throws(BlockError) in try arrays.install() } }
        if multipath.isNeeded {
            attempt("wrote \(multipath.file.path)") { () throws(BlockError) in try multipath.install() }
        }
        return try outcome(own, done, problems)
    }

    /// How it is, with nothing changed.
    ///
    /// - Throws: `BlockError` when something cannot be read.
    public func check() throws(BlockError) -> SetupOutcome { try outcome(try protection.ownDisks() ?? [], [], []) }

    private func outcome(_ own: [OwnDisk], _ done: [String], _ problems: [String]) throws(BlockError) -> SetupOutcome {
        let disks = try protection.scsiDisks()
        let all = try protection.inventory.disks()
        let others = disks.filter { disk in !own.contains { $0.isSame(as: disk) } }
        let keptOut = others.map { disk in
            SetupOutcome.KeptOutDisk(
                node: disk.node, wwid: disk.wwid, serial: disk.serial, hctl: disk.address.map { "\($0)" },
                size: disk.size, use: isAdded(disk) ? nil : inUse(disk, all))
        }
        let findings = try protection.findings()
        return SetupOutcome(ownDisks: own, keptOut: keptOut, done: done, problems: problems, findings: findings)
    }

    private func isAdded(_ disk: AttachedDisk) -> Bool { disk.serial.map { added.contains($0) } ?? false }

    /// The machine's own disks, as they are to be recorded.
    private func record(_ before: [OwnDisk]?, keep: [DiskSelector], drop: [DiskSelector]) throws(BlockError)
        -> [OwnDisk]
    {
        let disks = try protection.scsiDisks()
        let all = try protection.inventory.disks()
        var own = before ?? []
        func add(_ disk: AttachedDisk, _ reason: String) {
            if own.contains(where: { $0.isSame(as: disk) }) { return }
            if let disk = OwnDisk(disk, reason: reason) { own.append(disk) }
        }
        if before == nil {
            for disk in disks where !isAdded(disk) { if let use = inUse(disk, all) { add(disk, use) } }
        }
        for selector in keep {
            let meant = disks.filter { selector.matches($0) }
            if meant.isEmpty {
                throw BlockError(
                    .notFound, "recording \(selector): there is no such SCSI disk (diskgate disks lists them)")
            }
            for disk in meant { add(disk, "named by \(selector)") }
        }
        for selector in drop {
            let meant = disks.filter { selector.matches($0) }
            if let disk = meant.first(where: { inUse($0, all) != nil }) {
                throw BlockError(
                    .denied,
                    "dropping \(selector): \(disk.node) is in use (\(inUse(disk, all) ?? "")): release it first")
            }
            let count = own.count
            own.removeAll { recorded in
                meant.contains { recorded.isSame(as: $0) } || Self.means(selector, recorded)
            }
            if own.count == count {
                throw BlockError(.notFound, "dropping \(selector): no such disk is recorded")
            }
        }
        return own
    }

    /// Whether a recorded disk is meant, which may not be there any more.
    private static func means(_ selector: DiskSelector, _ disk: OwnDisk) -> Bool {
        switch selector {
        case .serial(let serial): disk.serial == serial
        case .name(let name): disk.wwid == name
        case .address(let address): disk.hctl == "\(address)"
        }
    }

    /// Writes the rule, and has udev look anew at the disks for which it changes something.
    private func installRule(_ own: [OwnDisk]) throws(BlockError) -> Bool {
        let setting = UdevSetting(machine, protection.udev, own: own)
        let isNew = try setting.file.write(UdevRules.text(own))
        guard protection.udev.isActive else { return isNew }
        _ = try machine.say("udevadm", ["control", "--reload"])
        let disks = try protection.scsiDisks()
        let nodes = disks.filter { setting.notLookedAt([$0]) != nil }
            .flatMap { disk in [disk.name] + disk.partitions.map(\.name) }
        if nodes.isEmpty { return isNew }
        let words = ["trigger", "--action=change", "--settle"] + nodes.map { "/sys/class/block/\($0)" }
        _ = try machine.say("udevadm", words, seconds: 180)
        return isNew
    }

    // MARK: - Removing

    /// Takes away what `install` has written, and the record.
    ///
    /// Disks that are there are not looked at anew: what lies on them would be started.
    ///
    /// - Returns: what was removed.
    /// - Throws: `BlockError` when a file was changed by somebody, or cannot be removed; the others are gone then.
    public func remove() throws(BlockError) -> [String] {
        var done: [String] = []
        var failure: BlockError?
        func attempt(_ what: String, _ body: () throws(BlockError) -> Bool) {
            do throws(BlockError) { if try body() { done.append(what) } } catch {
                failure = failure?.followed(by: error) ?? error
            }
        }
        let multipath = MultipathBlacklist(machine: machine)
        let record = machine.path(HostProtection.recordPath)
        for file in [multipath.file, ArrayAssembly(machine: machine).file] {
            attempt("removed \(file.path)") { () throws(BlockError) in try file.remove() }
        }
        multipath.reload()
        attempt("removed LVM's filter from \(LVMFilter.path)") { () throws(BlockError) in
            try LVMSetting(machine: machine).remove()
        }
        let rule = UdevSetting(machine, protection.udev, own: []).file
        attempt("removed \(rule.path)") { () throws(BlockError) in try rule.remove() }
        if protection.udev.isActive {
            attempt("") { () throws(BlockError) in
                _ = try machine.say("udevadm", ["control", "--reload"])
                return false
            }
        }
        if let failure { throw failure }
        if unlink(record) == 0 { done.append("removed \(record)") }
        return done
    }

    // MARK: - Who uses a disk

    /// What uses a disk of this machine: where it is mounted, what lies over it, or that the kernel says so.
    public static func use(_ disk: AttachedDisk, _ all: [AttachedDisk]) -> String? {
        let report = DiskReport(disk, among: all, users: NodeUsers(), readsContent: false)
        let mounts = report.uses.filter { $0.hasPrefix("/") }
        if !mounts.isEmpty { return "mounted at \(mounts.joined(separator: ", "))" }
        if let other = report.uses.first { return other }
        if let map = report.multipath { return "a path of \(map)" }
        if !report.holders.isEmpty { return "held by \(report.holders.joined(separator: ", "))" }
        // File systems of several disks, and whatever else has no place in sysfs.
        let number = open(disk.node, O_RDONLY | O_NONBLOCK | O_EXCL | O_CLOEXEC)
        if number >= 0 { close(number) }
        return number < 0 && errno == EBUSY ? "in use" : nil
    }
}
