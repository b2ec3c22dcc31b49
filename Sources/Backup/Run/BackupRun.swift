// One backup: plan, snapshot, check of the unchanged, copy, seal, release; and the way back from each of these steps.
public import Block
import FoundationEssentials
import Glibc
import Hypervisors
import LinuxIO
import Transports

/// A backup of one machine into one repository.
///
/// Whatever is made on the hypervisor stands in the run's ledger first. A restore point comes to be with the rename of
/// its manifest; only then does the hypervisor's new checkpoint take the place of the old one. Whatever fails before
/// leaves the repository and the hypervisor's knowledge of changes as they were.
public final class BackupRun {
    private let request: BackupRequest
    private let progress: (String, CopyProgress) -> Void
    private let cancellation: Cancellation
    private let runID = UUID().uuidString.lowercased()
    private var report: RunReport

    /// A run that has not begun.
    ///
    /// - Parameters:
    ///   - cancellation: ends the run early; it then fails, and takes everything back.
    ///   - progress: is told, a few times a second, how far the copy of a disk is.
    public init(
        _ request: BackupRequest, cancellation: Cancellation,
        progress: @escaping (_ disk: String, CopyProgress) -> Void = { _, _ in }
    ) {
        self.request = request
        self.progress = progress
        self.cancellation = cancellation
        report = RunReport(
            run: runID, machine: request.machine, repository: request.repository,
            started: Date().timeIntervalSince1970)
    }

    /// Tells what a run would do, and does nothing.
    ///
    /// - Throws: `BlockError` when the machine or the repository cannot be asked, or the run would fail at once.
    public func plan() throws(BlockError) -> RunReport {
        let provider = try Hypervisors.open(request.machine)
        let machine = try inspect(provider)
        var points: [RestorePoint] = []
        var repository: Repository?
        if Repository.exists(at: request.repository) {
            let found = try Repository.open(at: request.repository)
            repository = found
            if let known = try found.machines().first(where: { $0.id == machine.id }) {
                points = try found.points(of: known)
            }
        } else {
            report.warnings.append("there is no repository at \(request.repository) yet: it would be made")
        }
        let plan = try makePlan(machine, points, repository)
        for disk in plan.disks {
            report.disks.append(RunReport.Disk(disk))
            report.noteChoice(disk.disk.choice, of: disk.disk.id)
        }
        report.outcome = .planned
        return report
    }

    /// Runs. Everything that goes wrong is in the report.
    public func run() -> RunReport {
        let start = monotonicSeconds()
        do throws(BlockError) {
            try perform()
            report.outcome = report.downgrades.isEmpty ? .done : .downgraded
        } catch {
            report.outcome = .failed
            report.error = error.message
        }
        report.seconds = monotonicSeconds() - start
        return report
    }

    // MARK: - The steps

    private func perform() throws(BlockError) {
        let provider = try Hypervisors.open(request.machine)
        report.machine = provider.name
        let deadline = monotonicSeconds() + Double(request.waitSeconds)
        // Not only for the lock: the machine itself may talk to nobody else while it is backed up.
        try awaitOthers(until: deadline)
        let (id, name) = try provider.identify()
        report.machineName = name
        let repository = try Repository.openOrCreate(at: request.repository)
        let place = try repository.enroll(id: id, name: name)
        let lock = try lockMachine(place, in: repository, until: deadline)
        giveBackEarlier(holding: lock)
        finishRemovals(of: place, in: repository, holding: lock)
        // Only now: who had the lock before, or what was given back, may have changed what is known of the disks.
        let machine = try inspect(provider)
        if machine.id != id {
            throw BlockError(.invalid, "backing up \(provider.name): another machine is there than a moment ago")
        }
        let points = try repository.points(of: place)
        let plan = try makePlan(machine, points, repository)
        try cancellation.check("backing up \(machine.name)")
        let ledger = try RunLedger.begin(
            stateDirectory: request.stateDirectory, machine: request.machine, repository: repository.path, runID: runID)
        Step.reached("run.ledger-begun")
        let context = RunContext(
            machine: machine, place: place, lock: lock, plan: plan, last: points.last, repository: repository,
            ledger: ledger)
        try settling(ledger) { () throws(BlockError) in try backUp(provider, context) }
        Step.reached("run.ledger-ended")
        prune(context)
    }

    /// Removes points that are not to stay. The run's own point is there whatever comes of it.
    private func prune(_ context: RunContext) {
        guard let rule = request.retention else { return }
        do throws(BlockError) {
            let decisions = try context.repository.prune(
                context.place, keeping: rule, holding: context.lock, cancellation: cancellation)
            report.removed = decisions.filter(\.isRemoved).map(\.point.sequence)
        } catch { report.warnings.append("removing points that are not to stay: \(error.message)") }
    }

    private func inspect(_ provider: any Provider) throws(BlockError) -> VirtualMachine {
        report.machine = provider.name
        let machine = try provider.inspect(where: request.disks.wants)
        report.machineName = machine.name
        return machine
    }

    /// Waits until no run of the machine is going on that keeps its ledger here, into whatever repository.
    private func awaitOthers(until deadline: Double) throws(BlockError) {
        let doctor = Doctor(stateDirectory: request.stateDirectory)
        while true {
            let runs = try doctor.list(machine: request.machine).findings.filter {
                $0.isGoingOn && $0.run.repository != nil
            }
            guard let other = runs.first else { return }
            if monotonicSeconds() >= deadline {
                throw BlockError(
                    .denied,
                    "backing up \(request.machine): another run of it is going on (\(other.run.id), process "
                        + "\(other.run.process)); --wait waits for it")
            }
            try cancellation.check("waiting for another run of \(request.machine)")
            usleep(200_000)
        }
    }

    private func lockMachine(
        _ machine: RepositoryMachine, in repository: Repository, until deadline: Double
    ) throws(BlockError) -> FileLock {
        while true {
            do throws(BlockError) { return try repository.lockMachine(machine) } catch {
                if error.kind != .denied || monotonicSeconds() >= deadline { throw error }
            }
            try cancellation.check("waiting for another run of \(machine.name)")
            usleep(200_000)
        }
    }

    /// Works off what earlier runs of the machine have left. What cannot be given back does not keep this run from
    /// trying: it stays in their ledgers, and the user is told.
    private func giveBackEarlier(holding lock: FileLock) {
        do throws(BlockError) {
            let doctor = Doctor(stateDirectory: request.stateDirectory)
            let (findings, problems) = try doctor.fix(machine: request.machine, holding: lock)
            report.warnings += problems
            for finding in findings where !finding.isGoingOn {
                if !finding.settled.isEmpty {
                    report.warnings.append(
                        "what the run \(finding.run.id) had left was given back (\(finding.settled.count) things)")
                }
                for problem in finding.problems {
                    report.warnings.append("what the run \(finding.run.id) has left: \(problem)")
                }
            }
        } catch { report.warnings.append("looking for what earlier runs have left: \(error.message)") }
    }

    /// Finishes the removal of points that a crash has interrupted. One that cannot be finished is no reason not to
    /// make a new point.
    private func finishRemovals(of place: RepositoryMachine, in repository: Repository, holding lock: FileLock) {
        do throws(BlockError) {
            _ = try repository.finishRemovals(of: place, holding: lock, cancellation: cancellation)
        } catch {
            report.warnings.append("finishing the removal of a point: \(error.message)")
        }
    }

    private func makePlan(_ machine: VirtualMachine, _ points: [RestorePoint], _ repository: Repository?)
        throws(BlockError) -> BackupPlan
    {
        let last = points.last
        let known = points.reduce(into: Set<String>()) { $0.formUnion($1.manifest.disks.map(\.id)) }
        let plan = try BackupPlan(machine, request, last: last, known: known) { disk in
            guard let last, let repository else { return nil }
            do throws(BlockError) {
                if try repository.marks(of: last).contains(where: { $0.kind == .suspect }) {
                    return "point \(last.sequence) is suspect of missing changes"
                }
                _ = try repository.chain(of: disk.id, at: last)
                return nil
            } catch { return error.message }
        }
        report.downgrades += plan.missed
        report.leftOut = plan.leftOut.map { RunReport.LeftOut(id: $0.disk.id, reason: $0.reason) }
        for disk in plan.disks where disk.isDowngrade {
            report.downgrades.append("disk \(disk.disk.id) is read whole: \(disk.reason ?? "")")
        }
        // How much there is to store is known with the snapshot; a full repository need not wait for that.
        try repository?.checkSpace(0)
        return plan
    }

    /// Takes the snapshot, stores it, and gives it back, whatever happened.
    private func backUp(_ provider: any Provider, _ context: RunContext) throws(BlockError) {
        var wanted = SnapshotRequest(
            disks: context.plan.disks.map { SnapshotRequest.Disk(id: $0.disk.id, since: $0.since) },
            checkpoint: try context.checkpoint(ofRun: runID))
        wanted.quiescing = request.quiescing
        wanted.freezeSecondsMax = request.freezeSecondsMax
        wanted.scratchDirectory = request.scratchDirectory
        wanted.scratchReserve = request.scratchReserve
        let session = try provider.begin(wanted, ledger: context.ledger)
        Step.reached("run.snapshot-made")
        report.consistency = session.consistency
        report.freezeSeconds = session.freezeSeconds
        report.warnings += session.warnings
        if session.consistency == .inconsistent {
            report.downgrades.append("the disks may have been written while they were read: no snapshot is stated")
        }
        let wasToFreeze = context.machine.hasHypervisor && request.quiescing != .never
        if session.consistency == .crashConsistent && wasToFreeze {
            report.downgrades.append("the guest's file systems were not frozen: the point is as after a power cut")
        }
        do throws(BlockError) {
            try store(session, context)
        } catch {
            finish(session, adopting: false)
            throw error
        }
        Step.reached("run.point-sealed")
        finish(session, adopting: true)
    }

    private func finish(_ session: any SnapshotSession, adopting: Bool) {
        do throws(BlockError) {
            try session.finish(adopting: adopting)
            Step.reached("run.snapshot-released")
        } catch {
            report.downgrades.append(
                "something was left on the hypervisor (\(error.message)); run diskgate doctor --fix "
                    + "--state-directory \(request.stateDirectory)")
        }
    }

    private func settling(_ ledger: RunLedger, _ body: () throws(BlockError) -> Void) throws(BlockError) {
        defer { endLedger(ledger) }
        try body()
    }

    private func endLedger(_ ledger: RunLedger) {
        do throws(BlockError) { try ledger.end() } catch { report.warnings.append(error.message) }
    }

    // MARK: - Storing

    /// Copies the disks of a snapshot into a new point and seals it.
    private func store(_ session: any SnapshotSession, _ context: RunContext) throws(BlockError) {
        let guardian = try SessionGuardian(session, cancellation)
        defer { guardian.stop() }
        do throws(BlockError) {
            var disks: [DiskRun] = []
            for (disk, plan) in zip(session.disks, context.plan.disks) {
                try cancellation.check("backing up \(context.machine.name)")
                let run = try DiskRun.open(disk, plan, context, request, cancellation)
                report.note(run)
                disks.append(run)
            }
            try store(disks, session, guardian, context)
        } catch {
            // What made the snapshot useless is the reason, not the copy that was ended for it.
            if let failure = guardian.failure { throw failure }
            if cancellation.isCancelled { throw error }
            do throws(BlockError) { try guardian.verdict() } catch let reason { throw reason.followed(by: error) }
            throw error
        }
    }

    private func store(
        _ disks: [DiskRun], _ session: any SnapshotSession, _ guardian: SessionGuardian, _ context: RunContext
    ) throws(BlockError) {
        try context.repository.checkSpace(disks.reduce(0) { $0.addingReportingOverflow($1.bytesAtMost).partialValue })
        let writer = try context.repository.begin(
            PointRequest(
                machine: context.place, parent: context.last, disks: disks.map(\.request), run: runID,
                ledger: context.ledger), holding: context.lock)
        do throws(BlockError) {
            for (index, disk) in disks.enumerated() {
                let options = copyOptions(disk)
                let copier = try Copier(
                    source: disk.source, changed: disk.changed, target: try writer.target(forDisk: disk.id),
                    options: options, cancellation: cancellation)
                let result = try copier.run { progress(disk.id, $0) }
                report.disks[index].note(result)
                Step.reached("run.disk-copied")
            }
            try guardian.verdict()
            let point = try seal(writer, facts(session, context, disks), context)
            report.point = RunReport.Point(sequence: point.sequence, id: point.uuid, manifest: point.path)
        } catch {
            do throws(BlockError) { try writer.abandon() } catch {
                report.warnings.append("removing what was written of the point: \(error.message)")
            }
            throw error
        }
    }

    /// Seals the point. Where something goes wrong behind the commit, the point is there all the same.
    private func seal(_ writer: PointWriter, _ facts: PointFacts, _ context: RunContext) throws(BlockError)
        -> RestorePoint
    {
        do throws(BlockError) { return try writer.seal(facts) } catch {
            guard let point = try? context.repository.point(ofRun: runID, machine: context.place) else { throw error }
            report.warnings.append("after the point was sealed: \(error.message)")
            return point
        }
    }

    private func copyOptions(_ disk: DiskRun) -> CopyOptions {
        var options = CopyOptions()
        options.workers = request.workers
        return options
    }

    private func facts(_ session: any SnapshotSession, _ context: RunContext, _ disks: [DiskRun]) -> PointFacts {
        var facts = PointFacts(time: session.time, consistency: session.consistency, tool: request.tool)
        facts.freezeSeconds = session.freezeSeconds
        facts.documents = context.machine.documents
        facts.warnings = report.downgrades + report.warnings
        for (index, disk) in disks.enumerated() {
            var known = disk.facts
            known.bytesRead = report.disks[index].read
            facts.disks[disk.id] = known
        }
        return facts
    }
}

/// What all steps of a run work with.
struct RunContext {
    var machine: VirtualMachine
    var place: RepositoryMachine
    var lock: FileLock
    var plan: BackupPlan
    var last: RestorePoint?
    var repository: Repository
    var ledger: RunLedger

    /// The name of a run's checkpoint. Two repositories have names of their own, so that neither takes the other's
    /// checkpoints for its earlier ones.
    func checkpoint(ofRun run: String) throws(BlockError) -> String {
        "diskgate-\(try repository.identity().prefix(8))-\(run.filter { $0 != "-" }.prefix(12))"
    }
}
