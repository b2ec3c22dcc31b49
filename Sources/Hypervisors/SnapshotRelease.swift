// Giving back what a snapshot has made on a hypervisor, all of it, in the order that is safe.
import Block
import Transports

/// Knows how to give back what a hypervisor's obligations stand for.
protocol SnapshotRelease {
    /// Gives back what one obligation stands for; what is gone already is success.
    ///
    /// - Throws: `BlockError` when it is still there, or that cannot be told.
    func settle(_ obligation: Obligation, adopted: Bool) throws(BlockError)
}

extension SnapshotRelease {
    /// Gives back all that a run has made, the last first, and strikes it out.
    ///
    /// - Throws: the first error. What could not be given back stays in the ledger, with all that it may still use: as
    ///   long as a backup may go on, so do its checkpoint and its directories.
    func settleAll(_ obligations: [Obligation], of ledger: RunLedger, adopted: Bool) throws(BlockError) {
        var failure: BlockError?
        var left: [Obligation] = []
        for obligation in obligations.reversed() where !left.contains(where: { $0.holdsBack(obligation) }) {
            do throws(BlockError) {
                try settle(obligation, adopted: adopted)
                try ledger.settle(obligation)
            } catch {
                failure = failure ?? error
                left.append(obligation)
            }
        }
        if let failure { throw failure }
    }
}
