// A snapshot of a running domain's disks while they are read, and its end; and the release after a crash.
import Block
import Glibc
import LinuxIO
import Transports

/// One point in time of a domain's disks.
final class LibvirtSession: OfferingSession {
    let offer: SnapshotOffer
    private let place: LibvirtPlace
    /// When libvirt was asked last.
    private let asked = Locked(monotonicSeconds())
    private static let askEverySeconds = 5.0

    init(_ place: LibvirtPlace, _ offer: SnapshotOffer) {
        self.place = place
        self.offer = offer
    }

    func check(isLast: Bool) throws(BlockError) {
        let doing = "keeping the snapshot of \(place.name)"
        try checkScratchSpace(doing: doing)
        let isDue = asked.withLock { last in
            guard isLast || monotonicSeconds() - last > Self.askEverySeconds else { return false }
            last = monotonicSeconds()
            return true
        }
        guard isDue else { return }
        guard let backup = try place.runningBackup() else {
            throw BlockError(.inputOutput, "\(doing): libvirt's backup has ended by itself")
        }
        let own = offer.obligations.first { $0.kind == "libvirt.backup" }
        if let own, !backup.isMeant(by: own.details) {
            throw BlockError(
                .inputOutput, "\(doing): libvirt's backup has ended, and another one has begun (\(backup.server))")
        }
    }

    func finish(adopting: Bool) throws(BlockError) {
        do throws(BlockError) {
            try LibvirtRelease(place).settleAll(offer.obligations, of: offer.ledger, adopted: adopting)
        } catch { throw error.during("ending the snapshot of \(place.name)") }
    }
}

/// Gives back what obligations of kinds `libvirt.*` stand for, in any state and as often as one likes.
struct LibvirtRelease: SnapshotRelease {
    private let place: LibvirtPlace
    /// Seconds that libvirt has to end a backup.
    private static let endSeconds = 60.0

    init(_ place: LibvirtPlace) { self.place = place }

    /// Gives back what one obligation stands for.
    func settle(_ obligation: Obligation, adopted: Bool) throws(BlockError) {
        let details = obligation.details
        switch (obligation.kind, details["server"] ?? details["checkpoint"] ?? details["path"]) {
        case ("guest.freeze", _):
            guard let freezer = Freezer(details) else { break }
            // A guest that runs no more is not frozen.
            guard try !isGone(), try LibvirtDomain(place).isRunning else { return }
            _ = try freezer.thawSurely(seconds: 60)
            return
        case ("libvirt.backup", _?): return try endBackup(details)
        case ("libvirt.checkpoint", let checkpoint?):
            if try isGone() { return }
            // A backup that is only just beginning makes its checkpoint later.
            if !adopted, try !place.isIdle() {
                throw BlockError(
                    .denied, "removing the checkpoint \(checkpoint) of \(place.name): a job of the domain goes on")
            }
            return try settleCheckpoint(
                checkpoint, replaced: OwnName.names(in: details["replaces"]), adopted: adopted)
        case ("libvirt.directory", let path?):
            if let backup = try place.runningBackup(),
                ([backup.server] + backup.files).contains(where: { $0.hasPrefix(path + "/") })
            {
                throw BlockError(
                    .denied, "removing the directory \(path): libvirt's backup still uses it: end that first")
            }
            return try removeScratchDirectory(path)
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

    /// Ends the backup of an obligation, also one that libvirt is only just beginning: the virsh that asked for it may
    /// have outlived who started it, or may have been ended too early.
    private func endBackup(_ details: [String: String]) throws(BlockError) {
        let deadline = monotonicSeconds() + Self.endSeconds
        var (wasSeen, idleLooks) = (false, 0)
        var delay = 0.001
        while true {
            if wasSeen, try place.isIdle() { return }
            if let backup = try place.runningBackup() {
                // There can be only one.
                if !backup.isMeant(by: details) { return }
                wasSeen = true
                _ = try place.virsh.attempt(["domjobabort", place.domain])
            } else if wasSeen {
                return
            } else {
                idleLooks = try place.isIdle() ? idleLooks + 1 : 0
                if idleLooks == 2 { return }
            }
            if monotonicSeconds() > deadline {
                throw BlockError(
                    .inputOutput, "ending libvirt's backup of \(place.name): it, or another job of the domain, goes on")
            }
            pause(seconds: idleLooks > 0 ? 1 : delay)
            delay = min(delay * 2, 0.05)
        }
    }

    private func settleCheckpoint(_ new: String, replaced: [String], adopted: Bool) throws(BlockError) {
        for name in try place.checkpointNames().reversed() {
            let goes = adopted ? name != new && replaced.contains(name) : name == new
            if goes { try place.deleteCheckpoint(name) }
        }
    }
}
