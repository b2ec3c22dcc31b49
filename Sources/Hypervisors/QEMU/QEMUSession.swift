// A snapshot of a QEMU's disks while they are read: watched, and ended.
import Block
import Glibc
import LinuxIO
import Transports

/// One point in time of a QEMU's disks.
final class QEMUSession: OfferingSession {
    let offer: SnapshotOffer
    private let place: QEMUPlace
    private let monitor: QMPClient
    private let jobs: [String]

    init(_ place: QEMUPlace, _ monitor: QMPClient, _ offer: SnapshotOffer, jobs: [String]) {
        self.place = place
        self.monitor = monitor
        self.offer = offer
        self.jobs = jobs
    }

    func check(isLast: Bool) throws(BlockError) {
        let doing = "keeping the snapshot of \(place.name)"
        try checkScratchSpace(doing: doing)
        do throws(BlockError) { try askQEMU(doing) } catch {
            throw error.message.hasPrefix(doing) ? error : error.during(doing)
        }
    }

    private func askQEMU(_ doing: String) throws(BlockError) {
        let known = try monitor.execute("query-jobs").elements
        for job in jobs {
            guard let found = known.first(where: { $0["id"]?.string == job }) else {
                throw BlockError(.inputOutput, "\(doing): the job that keeps overwritten blocks has ended by itself")
            }
            let status = found["status"]?.string ?? ""
            if !["created", "running", "paused", "ready", "standby"].contains(status) || found["error"] != nil {
                throw BlockError(
                    .inputOutput,
                    "\(doing): the job that keeps overwritten blocks is \(status): "
                        + (found["error"]?.string ?? "QEMU does not say why"))
            }
        }
        if try monitor.execute("query-status")["status"]?.string == "io-error" {
            throw BlockError(.inputOutput, "\(doing): the guest stands still after an error of its storage")
        }
    }

    func finish(adopting: Bool) throws(BlockError) {
        let release = QEMURelease(place, monitor)
        // First of all nobody may read any more: what is read from now on is of no point in time.
        release.endExports(jobs)
        defer { release.close() }
        do throws(BlockError) { try release.settleAll(offer.obligations, of: offer.ledger, adopted: adopting) } catch {
            throw error.during("ending the snapshot of \(place.name)")
        }
    }
}
