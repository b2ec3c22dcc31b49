// Adding disks to this proxy and taking them off again, in the order that leaves nothing behind.
public import Block
import Glibc
import LinuxIO

/// A disk that was added to this proxy, with what has to be known to take it off.
public struct HotAddAttachment: Sendable, Codable, Equatable {
    /// What the hypervisor calls it.
    public var id: String
    /// The serial number by which it is found.
    public var serial: String
    /// What it shows.
    public var image: String
    /// Who added it.
    public var controller: String
    /// Its node and SCSI address, once the kernel has seen it.
    public var node: String?
    public var hctl: String?
    /// Whether this machine's own programs may act on it, because it was added with `unprotected=yes`; nil where they
    /// may not.
    public var isUnprotected: Bool?
}

/// Adds disks to this proxy's own virtual machine, and takes them off.
///
/// One task at a time uses a controller, all disks of a task go in one request, and each is an obligation from before
/// it is asked for until the hypervisor has let go of it.
public struct HotAddTask: Sendable {
    /// The kind of the obligations.
    static let kind = "hotadd.disk"
    /// How long to wait for other tasks of this controller, for the kernel to see a disk, and to let go of one.
    private static let waits = (turn: 120.0, coming: 30.0, going: 15.0)
    /// When a disk does not come by itself, every adapter is told to look.
    private static let scanAfter = 2.0

    private let stateDirectory: String

    /// - Parameter stateDirectory: where obligations are kept.
    public init(stateDirectory: String = defaultStateDirectory()) { self.stateDirectory = stateDirectory }

    // MARK: - Attaching

    /// Adds disks and waits until the kernel has them.
    ///
    /// - Parameters:
    ///   - isByHand: whether they stay when this process ends, until somebody says otherwise.
    ///   - begun: called with the ledger before the first disk is asked for.
    /// - Returns: the disks in the order of the images, and the ledger that they have to be given back with.
    /// - Throws: `BlockError`; nothing stays added then.
    public func attach(_ images: [HotAddImage], isWritable: Bool, isByHand: Bool, begun: (RunLedger) -> Void = { _ in })
        throws(BlockError) -> (disks: [HotAddAttachment], ledger: RunLedger)
    {
        guard let first = images.first, images.allSatisfy({ $0.controller == first.controller }) else {
            throw BlockError(.invalid, "adding disks: give images of one controller")
        }
        let doing = "adding \(images.map(\.path).joined(separator: ", ")) to this machine"
        let isUnprotected = images.allSatisfy(\.isUnprotected)
        if isUnprotected { HostProtection.warn(doing) } else { try HostProtection().require(doing) }
        let controller = try HotAddControllers.open(first.controller)
        let turn = try turn(at: first.controller)
        defer { withExtendedLifetime(turn) {} }
        // Before anything is noted: a controller that cannot be asked has added nothing.
        let free = try controller.freeSlots()
        if free < images.count {
            throw BlockError(
                .noSpace,
                "adding \(images.count) disks by \(first.controller): only \(free) places are free on its SCSI adapters"
            )
        }
        let ledger = try RunLedger.begin(stateDirectory: stateDirectory, machine: first.controller, repository: nil)
        begun(ledger)
        let run = ledger.run.id.filter { $0 != "-" }.prefix(12)
        var obligations: [Obligation] = []
        do throws(BlockError) {
            var requests: [HotAddRequest] = []
            for (index, image) in images.enumerated() {
                let request = HotAddRequest(
                    id: "dg-\(run)-\(index)", serial: "dg\(run)\(index)", image: image.path, format: image.format,
                    isWritable: isWritable)
                obligations.append(
                    try ledger.intend(
                        Self.kind,
                        [
                            "controller": image.controller, "id": request.id, "serial": request.serial,
                            "image": image.path,
                        ]))
                requests.append(request)
            }
            Step.reached("hotadd.intended")
            _ = try controller.attach(requests)
            Step.reached("hotadd.added")
            var disks: [HotAddAttachment] = []
            for obligation in obligations {
                let disk = try waitForDisk(obligation)
                if !isUnprotected { try HostProtection().confirm(disk, doing) }
                var facts = ["node": disk.node, "hctl": disk.address.map { "\($0)" } ?? ""]
                if isUnprotected { facts["unprotected"] = "yes" }
                if isByHand { facts["held"] = "by hand" }
                try ledger.learn(obligation, facts)
                disks.append(HotAddAttachment(obligation, facts))
            }
            return (disks, ledger)
        } catch {
            var problem = error
            for obligation in obligations.reversed() {
                do throws(BlockError) {
                    try giveBack(obligation, force: true, controller)
                    try ledger.settle(obligation)
                } catch { problem = problem.followed(by: error) }
            }
            try? ledger.end()
            throw problem
        }
    }

    /// Waits for this process's turn with a controller.
    private func turn(at controller: String) throws(BlockError) -> FileLock {
        let directory = "\(stateDirectory)/locks"
        try makeDirectories(directory)
        let name = controller.utf8.reduce(into: "") { text, byte in
            let isPlain = (48...57).contains(byte) || (97...122).contains(byte | 32)
            text += isPlain ? String(UnicodeScalar(byte)) : "_"
        }
        let path = "\(directory)/hotadd-\(name.suffix(200)).lock"
        if let lock = try FileLock.take(path, seconds: Self.waits.turn) { return lock }
        throw BlockError(
            .denied,
            "adding disks by \(controller): another task has been adding or removing disks for "
                + "\(Int(Self.waits.turn)) s")
    }

    private func waitForDisk(_ obligation: Obligation) throws(BlockError) -> AttachedDisk {
        let serial = obligation.details["serial"] ?? ""
        let selector = DiskSelector.serial(serial)
        let watch = DiskWatch()
        if let disk = try watch.wait(seconds: Self.scanAfter, { $0.first(where: selector.matches) }) { return disk }
        // Not every adapter tells the kernel.
        try? SCSIHosts().scan()
        if let disk = try watch.wait(seconds: Self.waits.coming, { $0.first(where: selector.matches) }) { return disk }
        throw BlockError(
            .notFound,
            "adding \(obligation.details["image"] ?? "a disk"): the hypervisor has added it, but no disk with the "
                + "serial \(serial) has come within \(Int(Self.waits.coming)) s; is the controller "
                + "\(obligation.details["controller"] ?? "") that of this very machine?")
    }

    // MARK: - Detaching

    /// Disks that were added and not taken off yet, by whichever process.
    ///
    /// - Throws: `BlockError` when the ledgers cannot be listed.
    public func attachments() throws(BlockError) -> [HotAddAttachment] {
        try RunLedger.list(stateDirectory: stateDirectory).runs.flatMap { run in
            run.obligations.filter { $0.kind == Self.kind }.map { HotAddAttachment($0, [:]) }
        }
    }

    /// Takes disks off that were added by hand.
    ///
    /// - Parameters:
    ///   - isMeant: picks them out.
    ///   - force: takes them off even where somebody has them open, who gets errors then.
    /// - Returns: those that are gone.
    /// - Throws: `.notFound` when there is none, or why one could not be taken off.
    public func detach(force: Bool = false, where isMeant: (HotAddAttachment) -> Bool) throws(BlockError)
        -> [HotAddAttachment]
    {
        var gone: [HotAddAttachment] = []
        var failure: BlockError?
        func meant(in ledger: RunLedger) -> [Obligation] {
            ledger.obligations.filter { $0.kind == Self.kind && isMeant(HotAddAttachment($0, [:])) }
        }
        let (ledgers, problems) = try abandoned { !meant(in: $0).isEmpty }
        if ledgers.isEmpty, let problem = problems.first {
            throw BlockError(.inputOutput, "taking disks off: \(problem)")
        }
        for ledger in ledgers {
            let (settled, problem) = giveBack(meant(in: ledger), of: ledger, force: force)
            gone += settled.map { HotAddAttachment($0, [:]) }
            failure = failure ?? problem
            try ledger.end()
        }
        if let failure { throw failure }
        return gone
    }

    /// Takes over ledgers of tasks that are over; others are free for others again when this returns.
    private func abandoned(where isMeant: (RunLedger) -> Bool) throws(BlockError) -> (
        ledgers: [RunLedger], problems: [String]
    ) {
        let (ledgers, problems) = try RunLedger.takeAbandoned(stateDirectory: stateDirectory)
        return (ledgers.filter(isMeant), problems)
    }

    /// Gives back what a task has added, and strikes it out.
    ///
    /// - Parameter force: takes them off even where somebody has them open.
    func release(_ ledger: RunLedger, force: Bool) throws(BlockError) {
        // The process is ending: what it is just adding goes, too, once it is there.
        if force { withExtendedLifetime(try turn(at: ledger.run.machine)) {} }
        let failure = giveBack(ledger.obligations.filter { $0.kind == Self.kind }, of: ledger, force: force).failure
        try ledger.end()
        if let failure { throw failure }
    }

    /// Takes disks of a ledger off, the last first, and strikes them out.
    ///
    /// - Returns: those that are gone, and why the first of the others is not.
    private func giveBack(_ obligations: [Obligation], of ledger: RunLedger, force: Bool) -> (
        settled: [Obligation], failure: BlockError?
    ) {
        var settled: [Obligation] = []
        var failure: BlockError?
        for obligation in obligations.reversed() {
            do throws(BlockError) {
                try giveBack(obligation, force: force)
                try ledger.settle(obligation)
                settled.append(obligation)
            } catch { failure = failure ?? error }
        }
        return (settled, failure)
    }

    /// Takes a disk off: the kernel lets go of it first, and only then the hypervisor.
    ///
    /// - Throws: `.denied` when somebody uses it, and `force` is not said; or why it stays.
    public func giveBack(_ obligation: Obligation, force: Bool) throws(BlockError) {
        guard let controller = obligation.details["controller"] else { return }
        let turn = try turn(at: controller)
        defer { withExtendedLifetime(turn) {} }
        try giveBack(obligation, force: force, try HotAddControllers.open(controller))
    }

    private func giveBack(_ obligation: Obligation, force: Bool, _ controller: any HotAddController) throws(BlockError)
    {
        let (id, serial) = (obligation.details["id"] ?? "", obligation.details["serial"] ?? "")
        let selector = DiskSelector.serial(serial)
        for disk in try DiskInventory().disks() where !serial.isEmpty && selector.matches(disk) && disk.address != nil {
            try letGo(of: disk, force: force)
        }
        Step.reached("hotadd.node-gone")
        try controller.detach([id])
        Step.reached("hotadd.removed")
    }

    private func letGo(of disk: AttachedDisk, force: Bool) throws(BlockError) {
        let doing = "taking \(disk.node) off"
        var claim: Descriptor?
        if !force {
            var options = RawOptions()
            options.isExclusive = true
            do throws(BlockError) { claim = try BlockNodeDevice.openNode(disk.node, options) } catch {
                if error.kind != .notFound { throw error.during(doing) }
            }
        }
        // Nobody can mount it until it is gone.
        defer { withExtendedLifetime(claim) {} }
        try SCSIHosts().remove(disk)
        let isGone = try DiskWatch().wait(seconds: Self.waits.going) { disks in
            disks.contains { $0.name == disk.name && $0.diskSequence == disk.diskSequence } ? nil : true
        }
        if isGone == nil {
            throw BlockError(
                .inputOutput, "\(doing): the kernel does not let go of it within \(Int(Self.waits.going)) s")
        }
    }
}

extension HotAddAttachment {
    fileprivate init(_ obligation: Obligation, _ more: [String: String]) {
        let details = obligation.details.merging(more) { $1 }
        func value(_ key: String) -> String? { details[key].flatMap { $0.isEmpty ? nil : $0 } }
        self.init(
            id: value("id") ?? "", serial: value("serial") ?? "", image: value("image") ?? "",
            controller: value("controller") ?? "", node: value("node"), hctl: value("hctl"),
            isUnprotected: value("unprotected").map { _ in true })
    }
}

extension Obligation {
    /// Whether somebody holds it by hand: it is no leftover, and goes only when told.
    public var isHeldByHand: Bool { details["held"] != nil }
}
