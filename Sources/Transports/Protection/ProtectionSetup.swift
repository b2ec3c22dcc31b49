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
    /// What is left to do, and nothing that keeps disks from being added.
    public var warnings: [String]
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
    private let questions: DiskQuestions
    private let images: InitialImage

    init(_ protection: HostProtection, _ questions: DiskQuestions) {
        (self.protection, self.questions) = (protection, questions)
        machine = protection.machine
        images = InitialImage(machine: machine)
    }

    /// - Parameters:
    ///   - protection: of which machine.
    ///   - stateDirectory: where obligations are kept: disks that diskgate has added or holds are nobody's own. Nil
    ///     where that is of no account, because nothing is recorded.
    /// - Throws: `.corrupt` when a ledger cannot be read: nobody can tell then which disks these are.
    public init(_ protection: HostProtection, stateDirectory: String?) throws(BlockError) {
        var questions = protection.machine.root.isEmpty ? DiskQuestions() : .forTrees
        guard let stateDirectory else {
            self.init(protection, questions)
            return
        }
        let problems = try RunLedger.list(stateDirectory: stateDirectory).problems
        if !problems.isEmpty {
            throw BlockError(
                .corrupt,
                "telling which disks diskgate has added: \(problems.joined(separator: "; ")); diskgate doctor shows "
                    + "what is left of it")
        }
        let leases = try HotAddLeases(stateDirectory: stateDirectory)
        questions.isHeld = { leases.holds($0) }
        self.init(protection, questions)
    }

    // MARK: - Installing

    /// Records the machine's own disks and writes all settings.
    ///
    /// The first time, every SCSI disk that is in use, in fstab or crypttab, or in a volume group of the machine's own
    /// is recorded; from then on only those that are named.
    ///
    /// - Parameters:
    ///   - keep: disks to record as the machine's own.
    ///   - drop: recorded disks that are the machine's own no more.
    ///   - notMine: disks with something on them that nobody uses, and that are not the machine's own.
    ///   - updatesImages: whether to make the initramfs anew where it has not the rule as it is now.
    /// - Throws: `.notFound` when there is no such disk, `.denied` for a disk to drop that is in use, or, the first
    ///   time, while there are disks of which nobody can tell whose they are, or why the record could not be written.
    ///   What goes wrong with one program is in the outcome.
    public func install(
        keep: [DiskSelector] = [], drop: [DiskSelector] = [], notMine: [DiskSelector] = [], updatesImages: Bool = false
    ) throws(BlockError) -> SetupOutcome {
        var done: [String] = []
        var problems: [String] = []
        let before = try protection.ownDisks()
        let own = try record(before, keep: keep, drop: drop, notMine: notMine)
        func attempt(_ what: String, _ body: () throws(BlockError) -> Bool) {
            do throws(BlockError) { if try body() { done.append(what) } } catch { problems.append(error.message) }
        }
        if own != before {
            try protection.note(own)
            done.append("recorded \(own.count) of this machine's own disks in \(HostProtection.recordPath)")
        }
        var isNewRule = false
        attempt("wrote \(UdevRules.path)") { () throws(BlockError) in
            isNewRule = try installRule(own)
            return isNewRule
        }
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
        var warnings: [String] = []
        if isNewRule || images.warning() != nil {
            bringImages(isWanted: updatesImages, &done, &problems, &warnings)
        }
        return try outcome(own, done, problems, warnings)
    }

    /// Makes the initramfs anew, or says how.
    private func bringImages(
        isWanted: Bool, _ done: inout [String], _ problems: inout [String], _ warnings: inout [String]
    ) {
        do throws(BlockError) {
            if isWanted, let ran = try images.update() { return done.append(ran) }
        } catch { problems.append(error.message) }
        if let advice = images.advice { warnings.append(advice) }
    }

    /// How it is, with nothing changed.
    ///
    /// - Throws: `BlockError` when something cannot be read.
    public func check() throws(BlockError) -> SetupOutcome {
        let warning = images.warning().map { [$0] } ?? []
        return try outcome(try protection.ownDisks() ?? [], [], [], warning)
    }

    private func outcome(_ own: [OwnDisk], _ done: [String], _ problems: [String], _ warnings: [String])
        throws(BlockError) -> SetupOutcome
    {
        let all = try protection.inventory.disks()
        let keptOut = try others(than: own).map { disk in
            SetupOutcome.KeptOutDisk(
                node: disk.node, wwid: disk.wwid, serial: disk.serial, hctl: disk.address.map { "\($0)" },
                size: disk.size, use: questions.isHeld(disk) ? nil : questions.use(disk, all)?.reason)
        }
        return SetupOutcome(
            ownDisks: own, keptOut: keptOut, done: done, problems: problems, warnings: warnings,
            findings: try protection.findings())
    }

    /// The SCSI disks that are here and are not the machine's own.
    private func others(than own: [OwnDisk]) throws(BlockError) -> [AttachedDisk] {
        try protection.scsiDisks().filter { disk in !own.contains { $0.isSame(as: disk) } }
    }

    /// The machine's own disks, as they are to be recorded.
    private func record(
        _ before: [OwnDisk]?, keep: [DiskSelector], drop: [DiskSelector], notMine: [DiskSelector]
    ) throws(BlockError) -> [OwnDisk] {
        var record = OwnDiskRecord(
            machine, try protection.scsiDisks(), try protection.inventory.disks(), questions, before ?? [])
        let foreign = try record.foreign(notMine)
        if before == nil { try record.begin(foreign: foreign) }
        try record.keep(keep)
        if before == nil { try record.refuseUndecided(foreign: foreign) }
        try record.drop(drop)
        return record.own
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
    /// Disks that are there are not looked at anew, but what runs later would start what lies on them.
    ///
    /// - Parameters:
    ///   - force: takes it away although disks are here that are kept out.
    ///   - updatesImages: whether to make the initramfs anew.
    /// - Returns: what was removed, and what is left to do.
    /// - Throws: `.denied` while disks are kept out, or a file was changed by somebody; or why one cannot be removed:
    ///   the others are gone then.
    public func remove(force: Bool = false, updatesImages: Bool = false) throws(BlockError) -> [String] {
        if !force { try refuseWhileDisksAreKeptOut() }
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
        var isRuleGone = false
        attempt("removed \(rule.path)") { () throws(BlockError) in
            isRuleGone = try rule.remove()
            return isRuleGone
        }
        if protection.udev.isActive {
            attempt("") { () throws(BlockError) in
                _ = try machine.say("udevadm", ["control", "--reload"])
                return false
            }
        }
        if let failure { throw failure }
        if unlink(record) == 0 { done.append("removed \(record)") }
        if isRuleGone {
            var (problems, warnings): ([String], [String]) = ([], [])
            bringImages(isWanted: updatesImages, &done, &problems, &warnings)
            if let problem = problems.first { throw BlockError(.inputOutput, problem) }
            done += warnings.map { "to do: \($0)" }
        }
        return done
    }

    /// Whether anything is there that `install` has written.
    private func isSetUp() throws(BlockError) -> Bool {
        let files = [
            UdevSetting(machine, protection.udev, own: []).file, ArrayAssembly(machine: machine).file,
            MultipathBlacklist(machine: machine).file,
        ]
        if files.contains(where: { access($0.path, F_OK) == 0 }) || machine.has(HostProtection.recordPath) {
            return true
        }
        return ManagedText.block(in: try textIfThere(machine.path(LVMFilter.path)) ?? "") != nil
    }

    private func refuseWhileDisksAreKeptOut() throws(BlockError) {
        guard try isSetUp() else { return }
        let others = try others(than: try protection.ownDisks() ?? [])
        if others.isEmpty { return }
        let names = others.map { disk in
            "\(disk.node) (\(disk.wwid ?? disk.serial.map { "serial=\($0)" } ?? "without a name"))"
        }
        throw BlockError(
            .denied,
            "removing what keeps disks out: disks that are kept out are here, and this machine's programs would start "
                + "what lies on them: \(names.joined(separator: ", ")); nothing was removed. Detach them first, or say "
                + "--force")
    }
}
