// What a session of a running machine holds, whatever the hypervisor: its disks, its moment, what has to be given back.
import Block
import Transports

/// The disks of a point in time, and what was made for it.
struct SnapshotOffer: Sendable {
    let disks: [SnapshotDisk]
    let outcome: SnapshotMoment.Outcome
    let ledger: RunLedger
    /// In the order of making.
    let obligations: [Obligation]
    /// The directory of scratch files; nil where it is not on this machine.
    let watching: String?
    /// Bytes that must stay free there.
    let reserve: UInt64
}

/// A session over an offer.
protocol OfferingSession: SnapshotSession {
    var offer: SnapshotOffer { get }
}

extension OfferingSession {
    var disks: [SnapshotDisk] { offer.disks }
    var consistency: Consistency { offer.outcome.consistency }
    var freezeSeconds: Double? { offer.outcome.freezeSeconds }
    var time: Double { offer.outcome.time }
    var warnings: [String] { offer.outcome.warnings }

    /// Fails the run before the guest suffers.
    func checkScratchSpace(doing: String) throws(BlockError) {
        if let directory = offer.watching { try checkSpace(in: directory, reserve: offer.reserve, doing: doing) }
    }
}
