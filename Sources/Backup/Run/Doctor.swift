// What runs that are over have left behind, and its undoing: for `diskgate doctor`, and for the next run of a machine.
public import Block
import Hypervisors
public import LinuxIO
public import Transports

/// Lists and works off the ledgers of runs.
public struct Doctor: Sendable {
    /// What was found of one run.
    public struct Finding: Codable, Sendable {
        /// The run.
        public var run: RunIdentity
        /// Whether it is going on: then nothing of it is touched.
        public var isGoingOn: Bool
        /// What it has not given back.
        public var obligations: [Obligation]
        /// What was given back just now.
        public var settled: [Obligation] = []
        /// Why something could not be.
        public var problems: [String] = []
    }

    private let stateDirectory: String

    /// A doctor for the ledgers of a state directory.
    public init(stateDirectory: String) { self.stateDirectory = stateDirectory }

    /// What all runs have to give back.
    ///
    /// - Parameter machine: only runs of this machine; nil for all.
    /// - Returns: the findings, and why ledgers could not be read.
    /// - Throws: `BlockError` when the ledgers' directory cannot be read.
    public func list(machine: String? = nil) throws(BlockError) -> (findings: [Finding], problems: [String]) {
        let (runs, problems) = try RunLedger.list(stateDirectory: stateDirectory)
        let findings = runs.filter { machine == nil || $0.run.machine == machine }.map {
            Finding(run: $0.run, isGoingOn: $0.isGoingOn, obligations: $0.obligations)
        }
        return (findings, problems)
    }

    /// Gives back what runs that are over have left, the latest first.
    ///
    /// - Parameters:
    ///   - machine: only runs of this machine; nil for all.
    ///   - lock: of the machine in its repository, where the caller has it.
    /// - Returns: the findings, and why ledgers could not be read; what cannot be given back is in the findings.
    /// - Throws: `BlockError` when the ledgers' directory cannot be read.
    public func fix(machine: String? = nil, holding lock: FileLock? = nil) throws(BlockError) -> (
        findings: [Finding], problems: [String]
    ) {
        var findings = try list(machine: machine).findings.filter(\.isGoingOn)
        let (ledgers, problems) = try RunLedger.takeAbandoned(stateDirectory: stateDirectory, machine: machine)
        for ledger in ledgers { findings.append(settle(ledger, lock)) }
        return (findings, problems)
    }

    /// Gives back what one run has left, in the reverse order of its making. What cannot be given back does not keep
    /// the rest from it: a guest is thawed even where the repository is gone.
    private func settle(_ ledger: RunLedger, _ lock: FileLock?) -> Finding {
        var finding = Finding(run: ledger.run, isGoingOn: false, obligations: ledger.obligations)
        if let damage = ledger.damage { finding.problems.append(damage) }
        var giver = ObligationGiver(run: ledger.run, lock: lock)
        for obligation in ledger.obligations.reversed() where !obligation.isHeldByHand {
            do throws(BlockError) {
                try giver.giveBack(obligation)
                try ledger.settle(obligation)
                finding.settled.append(obligation)
            } catch { finding.problems.append("\(obligation.kind): \(error.message)") }
        }
        do throws(BlockError) { try ledger.end() } catch { finding.problems.append(error.message) }
        finding.obligations = ledger.obligations
        return finding
    }
}

/// Knows whom to ask for what a run has left. Machine and repository are opened when they are needed first.
private struct ObligationGiver {
    let run: RunIdentity
    let lock: FileLock?
    private var provider: (any Provider)?
    private var repository: Repository?
    private var sealed: Bool?

    init(run: RunIdentity, lock: FileLock?) {
        self.run = run
        self.lock = lock
    }

    mutating func giveBack(_ obligation: Obligation) throws(BlockError) {
        if obligation.kind == "hotadd.disk" { return try HotAddTask().giveBack(obligation, force: false) }
        if obligation.kind == "node.read-only" { return try obligation.makeNodeWritable() }
        if obligation.kind.hasPrefix("repository.") {
            return try openRepository().settle(obligation, holding: lock)
        }
        // Only a checkpoint's fate hangs on the restore point: it takes the place of the one before, or goes.
        let adopted = obligation.kind.hasSuffix(".checkpoint") ? try isSealed() : false
        if provider == nil { provider = try Hypervisors.open(run.machine) }
        try provider?.settle(obligation, adopted: adopted)
    }

    private mutating func openRepository() throws(BlockError) -> Repository {
        if let repository { return repository }
        guard let path = run.repository else {
            throw BlockError(.notFound, "the run \(run.id) does not say which repository it wrote to")
        }
        let opened = try Repository.open(at: path)
        repository = opened
        return opened
    }

    /// Whether the run's point is durable.
    ///
    /// - Throws: `BlockError` when that cannot be told: no repository, or manifests that cannot be read.
    private mutating func isSealed() throws(BlockError) -> Bool {
        if let sealed { return sealed }
        let repository = try openRepository()
        var unknown: BlockError?
        for machine in try repository.machines() {
            do throws(BlockError) {
                if try repository.point(ofRun: run.id, machine: machine) != nil {
                    sealed = true
                    return true
                }
            } catch { unknown = error }
        }
        if let unknown { throw unknown.during("asking whether the run's point is durable") }
        sealed = false
        return false
    }
}
