// A snapshot of a QEMU's disks while they are read: watched, and ended.
import Block
import Glibc
import LinuxIO
import Transports

/// One point in time of a QEMU's disks.
final class QEMUSession: SnapshotSession {
    let disks: [SnapshotDisk]
    let consistency: Consistency
    let freezeSeconds: Double?
    let time: Double
    let warnings: [String]

    private let place: QEMUPlace
    private let monitor: QMPClient
    private let ledger: RunLedger
    private let obligations: [Obligation]
    private let jobs: [String]
    private let watching: String?
    private let reserve: UInt64

    init(
        _ place: QEMUPlace, _ monitor: QMPClient, _ ledger: RunLedger, disks: [SnapshotDisk],
        outcome: SnapshotMoment.Outcome, warnings: [String], obligations: [Obligation], jobs: [String],
        watching: String?, reserve: UInt64
    ) {
        self.place = place
        self.monitor = monitor
        self.ledger = ledger
        self.disks = disks
        consistency = outcome.consistency
        freezeSeconds = outcome.freezeSeconds
        time = outcome.time
        self.warnings = warnings
        self.obligations = obligations
        self.jobs = jobs
        self.watching = watching
        self.reserve = reserve
    }

    func check(isLast: Bool) throws(BlockError) {
        let doing = "keeping the snapshot of \(place.name)"
        if let watching { try checkSpace(in: watching, reserve: reserve, doing: doing) }
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
        do throws(BlockError) { try release.settleAll(obligations, of: ledger, adopted: adopting) } catch {
            throw error.during("ending the snapshot of \(place.name)")
        }
    }
}
