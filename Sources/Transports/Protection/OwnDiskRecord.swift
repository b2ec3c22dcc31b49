// Which disks setup records as the machine's own: the first time those that it uses, later only those that are named.
import Block
import LinuxIO

/// Makes the record of the machine's own disks.
struct OwnDiskRecord {
    let machine: Machine
    /// The disks that the rule is about, and all disks.
    let disks: [AttachedDisk]
    let all: [AttachedDisk]
    let questions: DiskQuestions
    private(set) var own: [OwnDisk]

    init(
        _ machine: Machine, _ disks: [AttachedDisk], _ all: [AttachedDisk], _ questions: DiskQuestions, _ own: [OwnDisk]
    ) {
        (self.machine, self.disks, self.all, self.questions, self.own) = (machine, disks, all, questions, own)
    }

    private func isOwn(_ disk: AttachedDisk) -> Bool { own.contains { $0.isSame(as: disk) } }

    private mutating func add(_ disk: AttachedDisk, _ reason: String, isSystem: Bool) {
        if isOwn(disk) { return }
        if let disk = OwnDisk(disk, reason: reason, isSystem: isSystem) { own.append(disk) }
    }

    // MARK: - What is named

    /// The disks that are here and meant.
    ///
    /// - Throws: `.notFound` when there is none.
    private func meant(by selector: DiskSelector) throws(BlockError) -> [AttachedDisk] {
        let meant = disks.filter { selector.matches($0) }
        if meant.isEmpty {
            throw BlockError(.notFound, "recording \(selector): there is no such SCSI disk (diskgate disks lists them)")
        }
        return meant
    }

    /// Records disks that somebody has named.
    mutating func keep(_ selectors: [DiskSelector]) throws(BlockError) {
        for selector in selectors {
            for disk in try meant(by: selector) {
                let use = questions.use(disk, all)
                add(disk, "named by \(selector)", isSystem: use?.kind == .system)
            }
        }
    }

    /// The nodes of disks that somebody says are not the machine's own.
    ///
    /// - Throws: `.denied` for one that is in use, or recorded.
    func foreign(_ selectors: [DiskSelector]) throws(BlockError) -> Set<String> {
        var nodes: Set<String> = []
        for selector in selectors {
            for disk in try meant(by: selector) {
                if isOwn(disk) {
                    throw BlockError(.denied, "leaving \(disk.node) out: it is recorded; say --drop \(selector)")
                }
                if let use = questions.use(disk, all) {
                    throw BlockError(
                        .denied, "leaving \(disk.node) out: it is in use (\(use.reason)): release it first")
                }
                nodes.insert(disk.node)
            }
        }
        return nodes
    }

    // MARK: - The first time

    /// Records what the machine uses, now or at its next boot.
    ///
    /// - Parameter foreign: nodes of disks that are not its own.
    mutating func begin(foreign: Set<String>) throws(BlockError) {
        let isTree = !machine.root.isEmpty
        let tables = try BootTables(machine, mounted: isTree ? [] : Set(NodeUsers().uses.map(\.purpose)))
        // What other disks than those that the rule is about say of volume groups.
        var anchors: Set<String> = []
        for disk in all where disk.isBuiltIn && questions.use(disk, all) != nil {
            anchors.formUnion(disk.stackNames(all))
        }
        for disk in disks where !questions.isHeld(disk) && !foreign.contains(disk.node) {
            if let use = questions.use(disk, all) {
                // Without a name it would be known by its slot for ever, whoever's it is.
                if use.kind == .held && disk.kernelName == nil { continue }
                add(disk, use.reason, isSystem: use.kind == .system)
            } else if let reason = tables.reason(disk, all) {
                add(disk, reason, isSystem: false)
            }
            if isOwn(disk) { anchors.formUnion(disk.stackNames(all)) }
        }
        let members = questions.members(machine)
        let groups = Set(members.filter { anchors.contains($0.node) }.map(\.group))
        for disk in disks where !questions.isHeld(disk) && !foreign.contains(disk.node) && !isOwn(disk) {
            let names = disk.stackNames(all)
            if let member = members.first(where: { names.contains($0.node) && groups.contains($0.group) }) {
                add(disk, "in the volume group \(member.title) with others", isSystem: false)
            }
        }
    }

    /// Refuses while nobody has said of a disk with something on it whose it is.
    func refuseUndecided(foreign: Set<String>) throws(BlockError) {
        var words: [String] = []
        for disk in disks where !isOwn(disk) && !questions.isHeld(disk) && !foreign.contains(disk.node) {
            let use = questions.use(disk, all).map { "\($0.reason), without a name of its own" }
            guard let content = use ?? questions.content(disk) else { continue }
            let who = [disk.wwid ?? disk.serial.map { "serial=\($0)" }, disk.model].compactMap(\.self)
            words.append("\(disk.node) (\((who + ["\(disk.size >> 20) MiB"]).joined(separator: ", ")): \(content))")
        }
        if words.isEmpty { return }
        throw BlockError(
            .denied,
            "recording this machine's own disks: nothing was changed, because there are disks that it does not use, "
                + "with something on them: \(words.joined(separator: "; ")). For each, say --keep DISK if it is this "
                + "machine's own, or --not-mine DISK to keep it out; or detach it first")
    }

    // MARK: - Dropping

    /// Strikes disks out.
    ///
    /// - Throws: `.notFound` where none is recorded, `.denied` where what is in use would be kept out.
    mutating func drop(_ selectors: [DiskSelector]) throws(BlockError) {
        for selector in selectors {
            let entries = entries(selector)
            if entries.isEmpty { throw BlockError(.notFound, "dropping \(selector): no such disk is recorded") }
            for disk in disks where entries.contains(where: { $0.isSame(as: disk) }) {
                guard let use = questions.use(disk, all) else { continue }
                throw BlockError(
                    .denied, "dropping \(selector): \(disk.node) is in use (\(use.reason)): release it first")
            }
            own.removeAll(where: entries.contains)
        }
    }

    /// What is recorded of the disk that is meant, which may not be here any more: by its name, else by its serial
    /// number, and only then by its place.
    private func entries(_ selector: DiskSelector) -> [OwnDisk] {
        let meant = disks.filter { selector.matches($0) }
        let named = own.filter { disk in
            guard let wwid = disk.wwid else { return false }
            if case .name(let name) = selector, DiskSelector.bareName(name) == DiskSelector.bareName(wwid) {
                return true
            }
            return meant.contains { $0.kernelName == wwid }
        }
        if !named.isEmpty { return named }
        let numbered = own.filter { disk in
            guard let serial = disk.serial else { return false }
            return selector == .serial(serial) || meant.contains { $0.serial == serial }
        }
        if !numbered.isEmpty { return numbered }
        if !meant.isEmpty { return own.filter { disk in meant.contains { disk.isSame(as: $0) } } }
        guard case .address(let address) = selector else { return [] }
        return own.filter { $0.hctl == "\(address)" }
    }
}

extension AttachedDisk {
    /// Whether it is of a kind that the rule is not about, and that no guest's disk comes as.
    fileprivate var isBuiltIn: Bool { ["vd", "nvme", "xvd", "mmcblk"].contains(where: name.hasPrefix) }
}
