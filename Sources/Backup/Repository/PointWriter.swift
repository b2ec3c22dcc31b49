// Makes a restore point: disks and sidecars under `.partial` names, then their names, then the manifest, the commit.
public import Block
import FoundationEssentials
import Glibc
import Hypervisors
public import LinuxIO
public import Transports

/// A restore point that is being made. Nothing of it counts before `seal` has returned, or, after a crash, before its
/// manifest is in `points/`.
public final class PointWriter: Sendable {
    /// The point's number.
    public let sequence: Int
    /// The point's UUID, in lower case.
    public let uuid: String
    private let repository: Repository
    private let layout: MachineLayout
    private let request: PointRequest
    private let disks: [Disk]
    private let obligation: Obligation?

    private struct Disk: Sendable {
        let id: String
        let directory: String
        let size: UInt64
        let base: Int?
        let data: String
        let hashes: String
        let target: PointTarget
    }

    fileprivate init(
        _ repository: Repository, _ request: PointRequest, sequence: Int, obligation: Obligation?
    ) throws(BlockError) {
        self.repository = repository
        self.request = request
        self.sequence = sequence
        self.obligation = obligation
        uuid = UUID().uuidString.lowercased()
        let layout = repository.layout(request.machine)
        self.layout = layout
        var disks: [Disk] = []
        for disk in request.disks { disks.append(try Self.open(disk, request, sequence, repository, layout)) }
        self.disks = disks
    }

    private static func open(
        _ disk: PointRequest.Disk, _ request: PointRequest, _ sequence: Int, _ repository: Repository,
        _ layout: MachineLayout
    ) throws(BlockError) -> Disk {
        let directory = try diskDirectory(id: disk.id)
        let base = disk.isIncremental ? request.parent?.manifest.disk(disk.id) : nil
        try makeDirectories(layout.disk(directory))
        let data = layout.data(directory, sequence, repository.driver)
        let hashes = layout.hashes(directory, hashesName(sequence, merges: 0))
        let file: any PointFile
        switch repository.driver {
        case .qcow2:
            file = try Qcow2PointFile(
                path: "\(data).partial", size: disk.size, backing: base?.file, compression: repository.compression)
        case .reflink:
            file = try ReflinkPointFile(
                path: "\(data).partial", size: disk.size, base: base.map { "\(layout.disk(directory))/\($0.file)" })
        }
        let target = PointTarget(
            name: "disk \(disk.id) of point \(sequence)", size: disk.size, isIncremental: base != nil, file: file,
            hashes: try ChunkHashWriter(path: "\(hashes).partial", diskSize: disk.size))
        return Disk(
            id: disk.id, directory: directory, size: disk.size,
            base: base == nil ? nil : request.parent?.sequence, data: data, hashes: hashes, target: target)
    }

    /// What a disk's content is to be written to: everything for a full disk (what is left out reads as zeros), what
    /// has changed for an incremental one.
    ///
    /// - Throws: `.invalid` for a disk that was not asked for.
    public func target(forDisk id: String) throws(BlockError) -> any CopyTarget {
        guard let disk = disks.first(where: { $0.id == id }) else {
            throw BlockError(.invalid, "writing point \(sequence): it has no disk \(id)")
        }
        return disk.target
    }

    /// Commits the point: when this returns, it survives whatever happens.
    ///
    /// - Throws: `BlockError` when something cannot be stored; then `abandon` removes what there is.
    public func seal(_ facts: PointFacts) throws(BlockError) -> RestorePoint {
        for suspect in facts.suspects { try repository.mark(suspect.point, .suspect, reason: suspect.reason) }
        for disk in disks { try disk.target.finish() }
        Step.reached("seal.disks-written")
        var entries: [PointManifest.Disk] = []
        for disk in disks {
            let sidecar = try sha256(ofFile: "\(disk.hashes).partial")
            try rename("\(disk.data).partial", to: disk.data)
            Step.reached("seal.data-renamed")
            // Which of them is durable first does not matter: neither counts before the manifest.
            try renameDurably("\(disk.hashes).partial", to: disk.hashes)
            Step.reached("seal.hashes-renamed")
            entries.append(entry(disk, sidecar, facts.disks[disk.id] ?? PointFacts.Disk()))
        }
        let documents = try write(facts.documents)
        Step.reached("seal.documents-written")
        var manifest = PointManifest(
            format: PointManifest.currentFormat, uuid: uuid, sequence: sequence, time: UTCTime(seconds: facts.time),
            machine: .init(id: request.machine.id, name: request.machine.name), run: request.run, tool: facts.tool,
            level: disks.contains { $0.base != nil } ? .incremental : .full,
            parent: request.parent.map { .init(uuid: $0.uuid, sequence: $0.sequence, root: $0.manifest.root) },
            root: "", disks: entries, documents: documents, consistency: facts.consistency,
            freezeSeconds: facts.freezeSeconds, warnings: facts.warnings, merged: [], checksum: "")
        manifest.root = try manifest.computedRoot()
        let path = layout.manifest(sequence, manifest.time)
        try writeDurably(path, try manifest.encoded()) { Step.reached("seal.manifest-written") }
        Step.reached("seal.manifest-renamed")
        try removeDurably(repository.reservation(request.machine, sequence, request.run))
        if let obligation { try request.ledger?.settle(obligation) }
        return RestorePoint(manifest: manifest, machine: request.machine, path: path)
    }

    private func rename(_ old: String, to new: String) throws(BlockError) {
        if Glibc.rename(old, new) < 0 { throw BlockError(errno: errno, "renaming \(old) to \(new)") }
    }

    private func entry(_ disk: Disk, _ sidecar: (digest: String, bytes: UInt64), _ facts: PointFacts.Disk)
        -> PointManifest.Disk
    {
        PointManifest.Disk(
            id: disk.id, directory: disk.directory, size: disk.size, level: disk.base == nil ? .full : .incremental,
            reason: facts.reason, file: dataName(sequence, repository.driver), base: disk.base,
            hashes: .init(file: hashesName(sequence, merges: 0), bytes: sidecar.bytes, sha256: sidecar.digest),
            sealedHashes: sidecar.digest, source: facts.source, transport: facts.transport,
            checkpoint: facts.checkpoint, bytesRead: facts.bytesRead, bytesWritten: disk.target.bytesWritten,
            bytesVerified: facts.bytesVerified, checkedFrom: facts.checked?.lowerBound,
            checkedTo: facts.checked?.upperBound)
    }

    private func write(_ documents: [ConfigurationDocument]) throws(BlockError) -> [PointManifest.Document] {
        var entries: [PointManifest.Document] = []
        for (index, document) in documents.enumerated() {
            // Two names may become the same when unsafe characters are replaced.
            let file = "\(sequenceText(sequence))-\(index + 1)-\(safeName(document.name, or: "document"))"
            try writeDurably(layout.document(file), document.content)
            entries.append(
                .init(
                    name: document.name,
                    content: .init(
                        file: file, bytes: UInt64(document.content.count), sha256: try sha256(document.content))))
        }
        return entries
    }

    /// Gives the point up and removes all that was written of it.
    ///
    /// - Throws: `BlockError` when something cannot be removed, or the repository is not where it was; it then stands
    ///   in the ledger.
    public func abandon() throws(BlockError) {
        if !Repository.exists(at: repository.path) {
            throw BlockError(
                .notFound,
                "the repository \(repository.path) is not there any more; when it is back, diskgate doctor --fix "
                    + "removes point \(sequence), which was not finished")
        }
        try repository.removePartial(request.machine, sequence: sequence, run: request.run)
        if let obligation { try request.ledger?.settle(obligation) }
    }
}

extension Repository {
    /// The kind of the obligation that stands for a restore point that is being made.
    public static let partialObligation = "repository.partial"

    /// Begins a restore point.
    ///
    /// - Parameter lock: of `lockMachine`; it has to be held until the point is sealed or abandoned.
    /// - Throws: `.invalid` for a request that cannot be fulfilled, or `BlockError` when the files cannot be made;
    ///   nothing is left behind then, or it stands in the ledger.
    public func begin(_ request: PointRequest, holding lock: FileLock) throws(BlockError) -> PointWriter {
        guard lock.path == layout(request.machine).machineLock else {
            throw BlockError(.invalid, "beginning a point of \(request.machine.name): \(lock.path) is not its lock")
        }
        try check(request)
        let sequence = try nextSequence(request.machine)
        let obligation = try request.ledger?.intend(
            Self.partialObligation,
            [
                "repository": path, "id": try identity(), "machine": request.machine.directory,
                "sequence": String(sequence), "run": request.run,
            ])
        Step.reached("point.intended")
        do throws(BlockError) {
            // Until it is removed, nobody takes this number for another point.
            try writeDurably(reservation(request.machine, sequence, request.run), Array(request.run.utf8))
            Step.reached("point.reserved")
            let writer = try PointWriter(self, request, sequence: sequence, obligation: obligation)
            Step.reached("point.begun")
            return writer
        } catch {
            do throws(BlockError) {
                try removePartial(request.machine, sequence: sequence, run: request.run)
                if let obligation { try request.ledger?.settle(obligation) }
            } catch {
                // It stands in the ledger; the first error is what the user has to know.
            }
            throw error
        }
    }

    private func check(_ request: PointRequest) throws(BlockError) {
        let place = "beginning a point of \(request.machine.name)"
        if request.disks.isEmpty { throw BlockError(.invalid, "\(place): it has no disks") }
        if Set(request.disks.map(\.id)).count != request.disks.count {
            throw BlockError(.invalid, "\(place): two of its disks have the same id")
        }
        if request.run.isEmpty || safeName(request.run, or: "") != request.run {
            throw BlockError(.invalid, "\(place): \"\(request.run)\" is no id of a run")
        }
        if let parent = request.parent, let newest = try points(of: request.machine).last, newest.uuid != parent.uuid {
            throw BlockError(
                .invalid, "\(place): it cannot follow point \(parent.sequence), \(newest.sequence) is newer")
        }
        for disk in request.disks {
            if disk.size == 0 || disk.size > UInt64(Int64.max) {
                throw BlockError(.invalid, "\(place): disk \(disk.id) has \(disk.size) bytes")
            }
            guard disk.isIncremental else { continue }
            guard let parent = request.parent, let before = parent.manifest.disk(disk.id) else {
                throw BlockError(.invalid, "\(place): there is no earlier point of disk \(disk.id); make a full one")
            }
            if disk.size < before.size {
                throw BlockError(
                    .invalid,
                    "\(place): disk \(disk.id) has become smaller since point \(parent.sequence); make a full one")
            }
            let file = "\(layout(request.machine).disk(before.directory))/\(before.file)"
            if access(file, R_OK) < 0 {
                throw BlockError(errno: errno, "\(place): opening \(file) of the point before")
            }
        }
    }

    /// The file that keeps a number for a run.
    func reservation(_ machine: RepositoryMachine, _ sequence: Int, _ run: String) -> String {
        "\(layout(machine).points)/\(sequenceText(sequence))-\(run).partial"
    }

    /// A number greater than all that appear in the machine's directory, in whatever way.
    private func nextSequence(_ machine: RepositoryMachine) throws(BlockError) -> Int {
        let layout = layout(machine)
        var greatest = 0
        var directories = [layout.points, layout.documents]
        for name in try namesIfThere(layout.disks) { directories.append(layout.disk(name)) }
        for directory in directories {
            for name in try namesIfThere(directory) {
                greatest = max(greatest, Backup.sequence(ofName: name) ?? 0)
            }
        }
        if greatest >= 999_999_999_999 {
            throw BlockError(.tooLarge, "beginning a point of \(machine.name): there are no numbers left")
        }
        return greatest + 1
    }

    /// Gives back what an obligation of the kind `partialObligation` stands for: what a run has left of a point that
    /// was not committed. A point that was committed stays. Done again, it changes nothing.
    ///
    /// - Parameter lock: of `lockMachine` for the obligation's machine, where the caller has it; otherwise it is taken.
    /// - Throws: `.denied` while a run or pruning of the machine is going on, or when another repository is where the
    ///   obligation's was: the obligation stays; `.invalid` for an obligation of another kind, or `BlockError` when a
    ///   file stays.
    public func settle(_ obligation: Obligation, holding lock: FileLock? = nil) throws(BlockError) {
        let details = obligation.details
        guard obligation.kind == Self.partialObligation, let directory = details["machine"],
            let number = details["sequence"], let sequence = Int(number), let run = details["run"],
            !directory.isEmpty, !directory.utf8.contains(UInt8(ascii: "/")), directory != "..",
            safeName(run, or: "") == run
        else { throw BlockError(.invalid, "removing what a run has left: \(obligation) is no such obligation") }
        if let id = details["id"], try identity() != id {
            throw BlockError(
                .denied,
                "removing what a run has left of point \(sequence): another repository is at \(path) now; is the file "
                    + "system of the right one mounted?")
        }
        let machine = RepositoryMachine(id: "", name: directory, directory: directory)
        if access(layout(machine).path, F_OK) < 0 && errno == ENOENT { return }
        let own = lock?.path == layout(machine).machineLock ? lock : try lockMachine(machine)
        defer { withExtendedLifetime(own) {} }
        try removePartial(machine, sequence: sequence, run: run)
    }

    /// Removes what a run has written of a point that was not committed.
    func removePartial(_ machine: RepositoryMachine, sequence: Int, run: String) throws(BlockError) {
        let layout = layout(machine)
        let reservation = reservation(machine, sequence, run)
        try removeDurably("\(reservation).partial")
        // Without it nothing was made, or everything is removed: what has this number now is another run's.
        if access(reservation, F_OK) < 0 && errno == ENOENT { return }
        // A point that somebody has begun to remove was committed, too: its file is another one's by now, perhaps.
        let isCommitted = try namesIfThere(layout.points).contains {
            Backup.sequence(ofName: $0) == sequence
                && ($0.hasSuffix(".json") || $0.hasSuffix(".json\(Self.doomedEnding)"))
        }
        if !isCommitted {
            var directories = [layout.documents]
            for name in try namesIfThere(layout.disks) { directories.append(layout.disk(name)) }
            for directory in directories {
                try removeFiles(in: directory) { Backup.sequence(ofName: $0) == sequence }
                Step.reached("settle.directory-cleared")
            }
        }
        try removeFiles(in: layout.points) {
            Backup.sequence(ofName: $0) == sequence && $0.hasSuffix(".partial")
                && "\(layout.points)/\($0)" != reservation
        }
        try removeDurably(reservation)
    }

    /// Removes the files of a directory whose names are meant.
    func removeFiles(in directory: String, _ isMeant: (String) -> Bool) throws(BlockError) {
        let names = try namesIfThere(directory).filter(isMeant)
        for name in names where unlink("\(directory)/\(name)") < 0 && errno != ENOENT {
            throw BlockError(errno: errno, "removing \(directory)/\(name)")
        }
        if !names.isEmpty { try syncDirectory(directory) }
    }
}
