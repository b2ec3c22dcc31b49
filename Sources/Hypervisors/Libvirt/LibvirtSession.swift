// A snapshot of a running domain's disks while they are read, and its end; and the release after a crash.
import Block
import Glibc
import LinuxIO
import Transports

/// One point in time of a domain's disks.
final class LibvirtSession: SnapshotSession {
    let disks: [SnapshotDisk]
    let consistency: Consistency
    let freezeSeconds: Double?
    let time: Double
    let warnings: [String]

    private let place: LibvirtPlace
    private let ledger: RunLedger
    private let obligations: [Obligation]
    private let watching: String?
    private let reserve: UInt64
    /// When libvirt was asked last: each time is a process.
    private let asked = Locked(monotonicSeconds())
    private static let askEverySeconds = 5.0

    init(
        _ place: LibvirtPlace, _ ledger: RunLedger, disks: [SnapshotDisk], outcome: SnapshotMoment.Outcome,
        warnings: [String], obligations: [Obligation], watching: String?, reserve: UInt64
    ) {
        self.place = place
        self.ledger = ledger
        self.disks = disks
        consistency = outcome.consistency
        freezeSeconds = outcome.freezeSeconds
        time = outcome.time
        self.warnings = warnings
        self.obligations = obligations
        self.watching = watching
        self.reserve = reserve
    }

    func check(isLast: Bool) throws(BlockError) {
        let doing = "keeping the snapshot of \(place.name)"
        if let watching { try checkSpace(in: watching, reserve: reserve, doing: doing) }
        let isDue = asked.withLock { last in
            guard isLast || monotonicSeconds() - last > Self.askEverySeconds else { return false }
            last = monotonicSeconds()
            return true
        }
        if isDue, try place.runningBackup() == nil {
            throw BlockError(.inputOutput, "\(doing): libvirt's backup has ended by itself")
        }
    }

    func finish(adopting: Bool) throws(BlockError) {
        let release = LibvirtRelease(place)
        var failure: BlockError?
        for obligation in obligations.reversed() {
            do throws(BlockError) {
                try release.settle(obligation, adopted: adopting)
                try ledger.settle(obligation)
            } catch { failure = failure ?? error }
        }
        if let failure { throw failure.during("ending the snapshot of \(place.name)") }
    }
}

/// Gives back what obligations of kinds `libvirt.*` stand for, in any state and as often as one likes.
struct LibvirtRelease {
    private let place: LibvirtPlace
    /// Seconds that libvirt has to end a backup.
    private static let endSeconds = 60.0

    init(_ place: LibvirtPlace) { self.place = place }

    func settle(_ obligation: Obligation, adopted: Bool) throws(BlockError) {
        let details = obligation.details
        switch (obligation.kind, details["server"] ?? details["checkpoint"] ?? details["path"]) {
        case ("guest.freeze", _):
            guard let freezer = Freezer(details) else { break }
            // A guest that runs no more is not frozen.
            guard try !isGone(), try LibvirtDomain(place).isRunning else { return }
            _ = try freezer.thawSurely(seconds: 60)
            return
        case ("libvirt.backup", let server?): return try endBackup(server)
        case ("libvirt.checkpoint", let checkpoint?):
            if try isGone() { return }
            return try settleCheckpoint(checkpoint, before: details["before"] ?? "", adopted: adopted)
        case ("libvirt.directory", let path?): return try removeScratchDirectory(path)
        default: break
        }
        throw BlockError(.unsupported, "giving back \(obligation.kind) \(details): libvirt has no such thing")
    }

    /// Whether libvirt answers and does not know the domain any more.
    private func isGone() throws(BlockError) -> Bool {
        do throws(BlockError) { _ = try place.virsh.run(["domstate", place.domain]) } catch {
            if error.kind == .notFound { return true }
            throw error
        }
        return false
    }

    /// Ends the backup that is served where ours was.
    private func endBackup(_ server: String) throws(BlockError) {
        let deadline = monotonicSeconds() + Self.endSeconds
        while try place.runningBackup() == server {
            _ = try place.virsh.attempt(["domjobabort", place.domain])
            if monotonicSeconds() > deadline {
                throw BlockError(.inputOutput, "ending libvirt's backup of \(place.name): it goes on")
            }
            pause(seconds: 0.05)
        }
    }

    private func settleCheckpoint(_ new: String, before: String, adopted: Bool) throws(BlockError) {
        for name in try place.checkpointNames().reversed() {
            let goes = adopted ? name != new && (OwnName.replaces(new, name) || name == before) : name == new
            if goes { try place.deleteCheckpoint(name) }
        }
    }
}
