// The moment of a snapshot: frozen by a guard where that is wanted and possible, and thawed right after it.
import Block
import FoundationEssentials
import LinuxIO
import Transports

/// Freezes, lets the snapshot be made, thaws; says what became of it.
struct SnapshotMoment {
    /// What the session says of the moment.
    struct Outcome {
        var consistency = Consistency.crashConsistent
        var freezeSeconds: Double?
        var time = 0.0
        var warnings: [String] = []
    }

    private let freezer: Freezer?
    private let obstacle: String?
    private let request: SnapshotRequest
    private let ledger: RunLedger
    private let details: [String: String]

    /// - Parameters:
    ///   - freezer: who freezes; nil where nobody can.
    ///   - obstacle: why freezing cannot be tried; nil when it can.
    ///   - details: what the obligation says besides who freezes.
    init(
        freezer: Freezer?, _ request: SnapshotRequest, _ ledger: RunLedger, obstacle: String?,
        details: [String: String] = [:]
    ) throws(BlockError) {
        self.details = details
        self.freezer = freezer
        self.obstacle = freezer == nil ? "no guest agent is known" : obstacle
        self.request = request
        self.ledger = ledger
        if request.quiescing == .required, let reason = self.obstacle {
            throw BlockError(.unsupported, "the guest's file systems cannot be frozen: \(reason)")
        }
    }

    /// Makes the snapshot between freezing and thawing.
    func pass(_ snapshot: () throws(BlockError) -> Void) throws(BlockError) -> Outcome {
        var outcome = Outcome()
        guard request.quiescing != .never, let freezer, obstacle == nil else {
            if request.quiescing == .ifPossible, let obstacle { outcome.warnings.append(Self.notFrozen(obstacle)) }
            try snapshot()
            outcome.time = Date().timeIntervalSince1970
            return outcome
        }
        let obligation = try ledger.intend("guest.freeze", details.merging(freezer.details) { $1 })
        Step.reached("guest.freeze-intended")
        var started: FreezeGuard?
        let held: FreezeGuard
        do throws(BlockError) {
            held = try FreezeGuard(freezer, seconds: request.freezeSecondsMax)
            started = held
            try held.freeze(seconds: Double(request.freezeSecondsMax))
        } catch {
            // A guard that was killed, or has given up, may leave a frozen guest: then the obligation stays.
            if started != nil && error.kind != .unsupported { try thaw(freezer, after: error) }
            try ledger.settle(obligation)
            if request.quiescing == .required { throw error }
            outcome.warnings.append(Self.notFrozen(error.message))
            try snapshot()
            outcome.time = Date().timeIntervalSince1970
            return outcome
        }
        Step.reached("guest.frozen")
        let began = monotonicSeconds()
        var failure: BlockError?
        do throws(BlockError) { try snapshot() } catch { failure = error }
        outcome.time = Date().timeIntervalSince1970
        let wasFrozen = try held.thaw()
        outcome.freezeSeconds = monotonicSeconds() - began
        Step.reached("guest.thawed")
        try ledger.settle(obligation)
        if let failure { throw failure }
        if wasFrozen {
            outcome.consistency = .quiesced
        } else {
            let problem =
                "the file systems were thawed before the snapshot was made: it took too long, or the guest did it"
            if request.quiescing == .required { throw BlockError(.inputOutput, problem) }
            outcome.warnings.append(Self.notFrozen(problem))
        }
        return outcome
    }

    /// Makes sure that nothing is frozen after freezing has failed.
    private func thaw(_ freezer: Freezer, after failure: BlockError) throws(BlockError) {
        do throws(BlockError) { _ = try freezer.thawSurely(seconds: 60) } catch {
            throw BlockError(
                error.kind,
                "thawing the guest's file systems, after this: \(failure.message): \(error.message); they may still be "
                    + "frozen: thaw them in the guest, then run diskgate doctor --fix")
        }
    }

    private static func notFrozen(_ reason: String) -> String { "not quiesced, only as after a power cut: \(reason)" }
}
