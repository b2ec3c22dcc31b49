// A machine of disks that the user names: hot-added, on LUNs, behind servers. No hypervisor is asked about it.
import Block
import FoundationEssentials
import LinuxIO
import Transports

/// Disks that are there already, at a point in time that somebody else has made, as a machine that can be backed up.
final class GivenDisks: Provider {
    static let scheme = "disks"

    let name: String
    private let place: GivenDisksPlace
    /// What is open already: a disk that is added for its backup is added once, not for each look at it.
    private let opened = Locked<[String: OpenDisk]>([:])

    /// A disk that is open, from the source that was taken.
    fileprivate struct OpenDisk {
        let id: String
        let source: SourceReference
        let device: any BlockDevice
        /// Why it is this source; nil where there is but one.
        var choice: TransportChoice?
    }

    init(_ place: GivenDisksPlace) {
        self.place = place
        name = "\(Self.scheme):\(place.name)"
    }

    func identify() throws(BlockError) -> (id: String, name: String) { (name, place.name) }

    func inspect() throws(BlockError) -> VirtualMachine {
        var machine = VirtualMachine(id: name, name: place.name, isRunning: false)
        machine.hasHypervisor = false
        for disk in try open(place.disks) {
            let info = disk.device.info
            var described = VirtualDisk(
                id: disk.id, size: info.size, name: disk.source.description, format: info.format)
            described.trackingObstacle = "nobody tells what changes on it"
            machine.disks.append(described)
        }
        return machine
    }

    /// Opens disks that are not open yet; those that have to be added to this proxy first are added together.
    private func open(_ disks: [GivenDisksPlace.Disk]) throws(BlockError) -> [OpenDisk] {
        try opened.withLock { (opened) throws(BlockError) in
            let missing = disks.filter { opened[$0.id] == nil }
            let single = missing.filter(\.others.isEmpty)
            var added = try addTogether(missing)
            if added.isEmpty {
                for (disk, device) in zip(single, try SourceReference.open(single.map(\.source))) {
                    added[disk.id] = device
                }
            }
            for disk in single {
                guard let device = added[disk.id] else { continue }
                opened[disk.id] = OpenDisk(id: disk.id, source: disk.source, device: device)
            }
            for disk in missing where !disk.others.isEmpty {
                var specification = DiskSpecification(disk.source)
                specification.alternatives = disk.others
                // The first source is tried first: it is open already where it was added with the others.
                var ready = added.removeValue(forKey: disk.id)
                let chosen = try specification.openFirst(
                    { (wanted) throws(BlockError) in
                        defer { ready = nil }
                        if let ready { return ready }
                        return try wanted.open()
                    }, device: { $0 })
                opened[disk.id] = OpenDisk(
                    id: disk.id, source: chosen.disk.source, device: chosen.opened, choice: chosen.choice)
            }
            return disks.compactMap { opened[$0.id] }
        }
    }

    /// Opens the disks without other ways to them, and those whose first source has to be added to this proxy, all that
    /// have to be added in one request.
    ///
    /// - Returns: what was opened, by the disks' ids; nothing where no disk with other ways is to be added with others,
    ///   or where that was tried and one of them cannot be: then each takes its own way.
    private func addTogether(_ disks: [GivenDisksPlace.Disk]) throws(BlockError) -> [String: any BlockDevice] {
        let images = disks.filter { if case .hotAdd(.image) = $0.source.kind { true } else { false } }
        guard images.count > 1, images.contains(where: { !$0.others.isEmpty }) else { return [:] }
        let ids = Set(images.map(\.id))
        let together = disks.filter { $0.others.isEmpty || ids.contains($0.id) }
        guard let devices = try? SourceReference.open(together.map(\.source)) else { return [:] }
        return Dictionary(zip(together.map(\.id), devices)) { first, _ in first }
    }

    func begin(_ request: SnapshotRequest, ledger: RunLedger) throws(BlockError) -> any SnapshotSession {
        if request.quiescing == .required {
            throw BlockError(
                .unsupported,
                "backing up \(name): its file systems cannot be frozen from here: freeze them when the snapshot is "
                    + "made, and say quiesced=yes instead of --quiesce required")
        }
        var chosen: [GivenDisksPlace.Disk] = []
        for wanted in request.disks {
            guard let disk = place.disks.first(where: { $0.id == wanted.id }) else {
                throw BlockError(.notFound, "backing up \(name): there is no disk \(wanted.id)")
            }
            chosen.append(disk)
        }
        let disks = try open(chosen)
        // What does not take part is given back now, the rest with the session.
        opened.withLock { $0.removeAll() }
        return GivenDisksSession(place, disks)
    }

    func settle(_ obligation: Obligation, adopted: Bool) throws(BlockError) {
        throw BlockError(
            .unsupported, "giving back \(obligation.kind) of \(name): nothing is ever made for given disks")
    }

    func protect() throws(BlockError) -> [String] { throw untracked("protecting") }
    func unprotect() throws(BlockError) -> [String] { throw untracked("unprotecting") }
    func resetTracking() throws(BlockError) -> [String] { throw untracked("resetting the change tracking of") }

    private func untracked(_ doing: String) -> BlockError {
        BlockError(.unsupported, "\(doing) \(name): nobody tracks changes on disks that are given by their sources")
    }
}

/// The disks as they are, for as long as the session is held.
private final class GivenDisksSession: SnapshotSession {
    let consistency: Consistency
    let freezeSeconds: Double? = nil
    let time = Date().timeIntervalSince1970
    let warnings: [String]
    private let name: String
    private let held: Locked<[SnapshotDisk]>

    init(_ place: GivenDisksPlace, _ disks: [GivenDisks.OpenDisk]) {
        name = place.name
        let doubtful = disks.filter { $0.source.parameter("inconsistent") == "yes" }.map(\.id)
        switch place.moment {
        case .inconsistent: consistency = .inconsistent
        case _ where !doubtful.isEmpty: consistency = .inconsistent
        case .offline: consistency = .offline
        case .snapshot(_, let isQuiesced): consistency = isQuiesced ? .quiesced : .crashConsistent
        }
        var warnings: [String] = []
        if case .snapshot(let snapshot, _) = place.moment {
            warnings.append("the disks are of the snapshot \(snapshot), by the word of who started this run")
        }
        self.warnings = warnings
        held = Locked(
            disks.map { disk in
                var offered = SnapshotDisk(id: disk.id, size: disk.device.info.size, source: disk.source)
                offered.device = disk.device
                offered.choice = disk.choice
                return offered
            })
    }

    var disks: [SnapshotDisk] { held.withLock { $0 } }

    func check(isLast: Bool) throws(BlockError) {
        // While they are read, those that have to look again do so by themselves.
        if isLast { for disk in disks { try disk.device?.confirm() } }
    }

    func finish(adopting: Bool) throws(BlockError) { held.withLock { $0.removeAll() } }
}
