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

        /// What it has not given back, and nobody holds by hand.
        public var left: [Obligation] { obligations.filter { !$0.isHeldByHand } }
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
        let findings = runs.filter { Self.isMeant($0.run, machine) }.map {
            Finding(run: $0.run, isGoingOn: $0.isGoingOn, obligations: $0.obligations)
        }
        return (findings, problems)
    }

    private static func isMeant(_ run: RunIdentity, _ machine: String?) -> Bool {
        machine.map { Hypervisors.areSame(run.machine, $0) } ?? true
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
        let (ledgers, problems) = try RunLedger.takeAbandoned(stateDirectory: stateDirectory) {
            Self.isMeant($0, machine)
        }
        for ledger in ledgers { findings.append(settle(ledger, lock)) }
        return (findings, problems)
    }

    /// Gives up what a run has left, without giving it back: where the machine or the repository is gone for good,
    /// nobody could.
    ///
    /// - Parameter text: RUN:NUMBER for one obligation, or RUN for all of a run and its ledger; RUN is the whole UUID.
    /// - Returns: what was given up.
    /// - Throws: `.notFound` when no ledger has it, `.denied` when the run is going on, or `BlockError` when the ledger
    ///   cannot be written.
    public func forget(_ text: String) throws(BlockError) -> [Obligation] {
        let parts = text.split(separator: ":", maxSplits: 1, omittingEmptySubsequences: false).map(String.init)
        let doing = "forgetting \(text)"
        guard let run = parts.first, !run.isEmpty, parts.count == 1 || Int(parts[1]) != nil else {
            throw BlockError(.invalid, "\(doing): give RUN:NUMBER or RUN, as diskgate doctor lists them")
        }
        if try list().findings.contains(where: { $0.run.id == run && $0.isGoingOn }) {
            throw BlockError(.denied, "\(doing): the run is going on")
        }
        let (ledgers, _) = try RunLedger.takeAbandoned(stateDirectory: stateDirectory) { $0.id == run }
        guard let ledger = ledgers.first else {
            throw BlockError(.notFound, "\(doing): no run \(run) has left anything in \(stateDirectory)")
        }
        var forgotten: [Obligation] = []
        for obligation in ledger.obligations.reversed() where parts.count == 1 || obligation.id == Int(parts[1]) {
            try ledger.settle(obligation)
            forgotten.append(obligation)
        }
        if forgotten.isEmpty && parts.count == 2 {
            throw BlockError(.notFound, "\(doing): the run has left nothing of that number")
        }
        try ledger.end(forgettingDamage: parts.count == 1)
        return forgotten
    }

    /// Gives back what one run has left, in the reverse order of its making. What cannot be given back keeps only what
    /// it may still use from it: a guest is thawed even where the repository is gone.
    private func settle(_ ledger: RunLedger, _ lock: FileLock?) -> Finding {
        var finding = Finding(run: ledger.run, isGoingOn: false, obligations: ledger.obligations)
        if let damage = ledger.damage { finding.problems.append(damage) }
        var giver = ObligationGiver(run: ledger.run, lock: lock, stateDirectory: stateDirectory)
        var left: [Obligation] = []
        for obligation in ledger.obligations.reversed() where !obligation.isHeldByHand {
            if let user = left.first(where: { $0.holdsBack(obligation) }) {
                finding.problems.append("\(obligation.kind): it waits for \(user.kind), which may still use it")
                continue
            }
            do throws(BlockError) {
                try giver.giveBack(obligation)
                try ledger.settle(obligation)
                finding.settled.append(obligation)
            } catch {
                finding.problems.append("\(obligation.kind): \(error.message)")
                left.append(obligation)
            }
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
    let stateDirectory: String
    private var provider: (any Provider)?
    private var repository: Repository?
    private var sealed: Bool?

    init(run: RunIdentity, lock: FileLock?, stateDirectory: String) {
        self.run = run
        self.lock = lock
        self.stateDirectory = stateDirectory
    }

    mutating func giveBack(_ obligation: Obligation) throws(BlockError) {
        if obligation.kind == "hotadd.disk" {
            return try HotAddTask(stateDirectory: stateDirectory).giveBack(obligation, force: false)
        }
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
