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
    /// The disks and where they are: an inventory is asked once.
    private let known = Locked<GivenDisksPlace.Found?>(nil)

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

    func identify() throws(BlockError) -> (id: String, name: String) {
        // Before anything is made for a machine that nobody knows.
        _ = try found()
        return (name, place.name)
    }

    private func found() throws(BlockError) -> GivenDisksPlace.Found {
        try known.withLock { (known) throws(BlockError) in
            if let known { return known }
            let found = try place.found()
            known = found
            return found
        }
    }

    func inspect() throws(BlockError) -> VirtualMachine { try inspect { _ in true } }

    func inspect(where isWanted: (VirtualDisk) -> Bool) throws(BlockError) -> VirtualMachine {
        var machine = VirtualMachine(id: name, name: place.name, isRunning: false)
        machine.hasHypervisor = false
        func closed(_ disk: GivenDisksPlace.Disk) -> VirtualDisk {
            VirtualDisk(id: disk.id, size: disk.capacity ?? 0, name: disk.name, format: "raw")
        }
        let disks = try found().disks
        // What does not take part is neither added to this proxy nor takes a session of its host.
        let wanted = disks.filter { isWanted(closed($0)) }
        let results = Dictionary(zip(wanted.map(\.id), open(wanted))) { first, _ in first }
        for disk in disks {
            var described = closed(disk)
            switch results[disk.id] {
            case nil: break
            case .success(let opened):
                let info = opened.device.info
                described = VirtualDisk(
                    id: disk.id, size: info.size, name: opened.source.description, format: info.format)
                described.choice = opened.choice
            case .failure(let error): described.failure = error
            }
            described.trackingObstacle = "nobody tells what changes on it"
            machine.disks.append(described)
        }
        return machine
    }

    /// Opens disks that are not open yet; those that have to be added to this proxy first are added together.
    ///
    /// - Returns: for each disk, in their order, what was opened or why that failed.
    private func open(_ disks: [GivenDisksPlace.Disk]) -> [Result<OpenDisk, BlockError>] {
        opened.withLock { opened in
            let missing = disks.filter { opened[$0.id] == nil }
            // Two runs that have a part each of what both need would wait for each other.
            let turn =
                missing.count > 1 ? SiteSessions.turn(for: missing.compactMap { try? $0.specification.get() }) : nil
            defer { withExtendedLifetime(turn) {} }
            var added = addTogether(missing)
            var failures: [String: BlockError] = [:]
            for disk in missing {
                do throws(BlockError) {
                    try SiteSessions.checkEnding("backing up \(name)")
                    let specification = try disk.specification.get()
                    // What was added with the others is open already when it is tried first.
                    var ready = added.removeValue(forKey: disk.id)
                    let chosen = try specification.openFirst(
                        { (wanted) throws(BlockError) in
                            defer { ready = nil }
                            if let ready { return ready }
                            return try wanted.open()
                        }, device: { $0 })
                    let hasChoice = specification.sources.count > 1 || specification.site != nil
                    opened[disk.id] = OpenDisk(
                        id: disk.id, source: chosen.disk.source, device: chosen.opened,
                        choice: hasChoice ? chosen.choice : nil)
                } catch { failures[disk.id] = error }
            }
            return disks.map { disk in
                if let open = opened[disk.id] { return .success(open) }
                return .failure(
                    failures[disk.id] ?? BlockError(.notFound, "backing up \(name): the disk \(disk.id) is not open"))
            }
        }
    }

    /// Adds the disks whose first source has to be added to this proxy, in one request.
    ///
    /// - Returns: those that are open, by their ids; none where the request fails: then each takes its own way, which
    ///   may be another one.
    private func addTogether(_ disks: [GivenDisksPlace.Disk]) -> [String: any BlockDevice] {
        var images: [(id: String, source: SourceReference)] = []
        for disk in disks {
            guard let specification = try? disk.specification.get(),
                let first = try? specification.sourcesLeft().first, case .hotAdd(.image) = first.kind
            else { continue }
            images.append((disk.id, first))
        }
        guard images.count > 1, let devices = try? SourceReference.openTogether(images.map(\.source)) else {
            return [:]
        }
        return Dictionary(zip(images.map(\.id), devices)) { first, _ in first }
    }

    func begin(_ request: SnapshotRequest, ledger: RunLedger) throws(BlockError) -> any SnapshotSession {
        if request.quiescing == .required {
            throw BlockError(
                .unsupported,
                "backing up \(name): its file systems cannot be frozen from here: freeze them when the snapshot is "
                    + "made, and say quiesced=yes instead of --quiesce required")
        }
        let found = try found()
        var chosen: [GivenDisksPlace.Disk] = []
        for wanted in request.disks {
            guard let disk = found.disks.first(where: { $0.id == wanted.id }) else {
                throw BlockError(.notFound, "backing up \(name): there is no disk \(wanted.id)")
            }
            chosen.append(disk)
        }
        var disks: [OpenDisk] = []
        for result in open(chosen) { disks.append(try result.get()) }
        // What does not take part is given back now, the rest with the session.
        opened.withLock { $0.removeAll() }
        return GivenDisksSession(place, disks, warnings: found.warnings)
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

    init(_ place: GivenDisksPlace, _ disks: [GivenDisks.OpenDisk], warnings known: [String]) {
        name = place.name
        let doubtful = disks.filter { $0.source.parameter("inconsistent") == "yes" }.map(\.id)
        switch place.moment {
        case .inconsistent: consistency = .inconsistent
        case _ where !doubtful.isEmpty: consistency = .inconsistent
        case .offline: consistency = .offline
        case .snapshot(_, let isQuiesced): consistency = isQuiesced ? .quiesced : .crashConsistent
        }
        var warnings = known
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
