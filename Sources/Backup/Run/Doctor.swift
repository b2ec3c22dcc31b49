// What runs that are over have left behind, and its undoing: for `diskgate doctor`, and for the next run of a machine.
public import Block
import Hypervisors
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
    /// - Throws: `BlockError` when the ledgers cannot be read.
    public func list(machine: String? = nil) throws(BlockError) -> [Finding] {
        try RunLedger.list(stateDirectory: stateDirectory).filter { machine == nil || $0.run.machine == machine }.map {
            Finding(run: $0.run, isGoingOn: $0.isGoingOn, obligations: $0.obligations)
        }
    }

    /// Gives back what runs that are over have left, the latest first.
    ///
    /// - Parameter machine: only runs of this machine; nil for all.
    /// - Throws: `BlockError` when the ledgers cannot be read; what cannot be given back is in the findings.
    public func fix(machine: String? = nil) throws(BlockError) -> [Finding] {
        var findings = try list(machine: machine).filter(\.isGoingOn)
        for ledger in try RunLedger.takeAbandoned(stateDirectory: stateDirectory, machine: machine) {
            findings.append(settle(ledger))
        }
        return findings
    }

    /// Gives back what one run has left, in the reverse order of its making.
    func settle(_ ledger: RunLedger) -> Finding {
        var finding = Finding(run: ledger.run, isGoingOn: false, obligations: ledger.obligations)
        var provider: (any Provider)?
        do throws(BlockError) {
            let repository: Repository? =
                if let path = ledger.run.repository, Repository.exists(at: path) {
                    try Repository.open(at: path)
                } else { nil }
            // Only the repository knows whether the run's point is durable; without it nothing may be decided.
            if repository == nil, let path = ledger.run.repository,
                ledger.obligations.contains(where: { needsPoint($0) })
            {
                throw BlockError(.notFound, "there is no repository at \(path) to ask whether the run was finished")
            }
            let adopted =
                try repository.map { (known) throws(BlockError) in try isSealed(ledger.run, in: known) } ?? false
            for obligation in ledger.obligations.reversed() {
                do throws(BlockError) {
                    if obligation.kind.hasPrefix("repository.") {
                        try repository?.settle(obligation)
                    } else {
                        if provider == nil { provider = try Hypervisors.open(ledger.run.machine) }
                        try provider?.settle(obligation, adopted: adopted)
                    }
                    try ledger.settle(obligation)
                    finding.settled.append(obligation)
                } catch { finding.problems.append("\(obligation.kind): \(error.message)") }
            }
            try ledger.end()
        } catch { finding.problems.append(error.message) }
        finding.obligations = ledger.obligations
        return finding
    }

    private func isSealed(_ run: RunIdentity, in repository: Repository) throws(BlockError) -> Bool {
        for machine in try repository.machines() {
            if try repository.point(ofRun: run.id, machine: machine) != nil { return true }
        }
        return false
    }

    private func needsPoint(_ obligation: Obligation) -> Bool { !obligation.kind.hasPrefix("repository.") }
}
