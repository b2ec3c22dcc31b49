// Takes back, one by one, what a snapshot has made in QEMU and beside it: after a run, or after its crash.
import Block
import Glibc
import LinuxIO
import Transports

/// Gives back what obligations of kinds `qemu.*` stand for. Each may be given back twice, and in any state: what is
/// gone is success. Used by one thread.
final class QEMURelease: SnapshotRelease {
    private let place: QEMUPlace
    private var monitor: QMPClient?
    /// The QEMU of the obligation that is given back; nil where it does not say.
    private var identity: QEMUIdentity?
    /// Why the monitor could not be reached: what does not answer once is not asked again for each thing.
    private(set) var silence: BlockError?
    /// Seconds that QEMU has to end a job or an export.
    private static let endSeconds = 60.0

    /// - Parameter silence: why the monitor could not be reached before.
    init(_ place: QEMUPlace, _ monitor: QMPClient? = nil, silence: BlockError? = nil) {
        self.place = place
        self.monitor = monitor
        self.silence = silence
    }

    /// The monitor; nil when it is certain that no QEMU runs there.
    private func connected() throws(BlockError) -> QMPClient? {
        if let monitor, monitor.isUsable, (try? monitor.execute("query-status")) != nil { return monitor }
        // A monitor talks to one program at a time: the old connection has to go first.
        close()
        if let silence, !place.isGone(identity) { throw silence }
        let start = monotonicSeconds()
        do throws(BlockError) {
            let new = try place.connect()
            monitor = new
            return new
        } catch {
            if place.isGone(identity) { return nil }
            if monotonicSeconds() - start > 0.5 { silence = error }
            throw error
        }
    }

    /// Lets go of the monitor.
    func close() {
        monitor?.close()
        monitor = nil
    }

    /// Gives back what one obligation stands for.
    func settle(_ obligation: Obligation, adopted: Bool) throws(BlockError) {
        let details = obligation.details
        identity = QEMUIdentity(details)
        switch obligation.kind {
        case "guest.freeze":
            guard let freezer = Freezer(details) else { throw unreadable(obligation) }
            // A guest that runs no more is not frozen. One whose monitor is silent may be: it is not asked first.
            let isGone: Bool
            do throws(BlockError) { isGone = try connected() == nil } catch { isGone = false }
            if !isGone { _ = try freezer.thawSurely(seconds: 60) }
        case "qemu.job":
            guard let job = details["job"] else { throw unreadable(obligation) }
            if let monitor = try connected() { try end(job: job, wasRunning: details["running"] == "true", monitor) }
        case "qemu.checkpoint": try settleCheckpoint(obligation, adopted: adopted)
        case "qemu.server":
            guard let run = details["run"] else { throw unreadable(obligation) }
            if let monitor = try connected() {
                try stopServer(
                    run: run, socket: details["socket"], wasStarted: details["started"] == "true", monitor)
            }
        case "qemu.node":
            guard let node = details["node"] else { throw unreadable(obligation) }
            if let monitor = try connected() { try remove(node: node, monitor) }
        case "qemu.directory":
            guard let path = details["path"], let run = details["run"] else { throw unreadable(obligation) }
            if let monitor = try connected() { try requireUnused(path, run: run, monitor) }
            try removeScratchDirectory(path)
        default:
            throw BlockError(.unsupported, "giving back \(obligation.kind): a QEMU has no such thing")
        }
        Step.reached("qemu.settled")
    }

    private func unreadable(_ obligation: Obligation) -> BlockError {
        BlockError(.corrupt, "giving back \(obligation.kind): the ledger does not say what it is")
    }

    /// Ends exports without a word where that fails: stopping their server does it, too, or says why not.
    func endExports(_ names: [String]) {
        guard let monitor = try? connected() else { return }
        for name in names { _ = try? end(export: name, monitor) }
    }

    private func end(export: String, _ monitor: QMPClient) throws(BlockError) {
        let deadline = monotonicSeconds() + Self.endSeconds
        var isTold = false
        while try monitor.execute("query-block-exports").elements.contains(where: { $0["id"]?.string == export }) {
            if !isTold { _ = try monitor.attempt("block-export-del", ["id": .text(export), "mode": "hard"]) }
            isTold = true
            if monotonicSeconds() > deadline {
                throw BlockError(.inputOutput, "ending the export \(export): QEMU does not end it")
            }
            pause(seconds: 0.002)
        }
    }

    private func end(job: String, wasRunning: Bool, _ monitor: QMPClient) throws(BlockError) {
        let deadline = monotonicSeconds() + Self.endSeconds
        var isTold = false
        while let found = try monitor.execute("query-jobs").elements.first(where: { $0["id"]?.string == job }) {
            if found["status"]?.string == "concluded" {
                _ = try monitor.attempt("job-dismiss", ["id": .text(job)])
            } else if !isTold {
                _ = try monitor.attempt("block-job-cancel", ["device": .text(job), "force": true])
                isTold = true
            }
            if monotonicSeconds() > deadline { throw BlockError(.inputOutput, "ending the job \(job): it goes on") }
            pause(seconds: 0.002)
        }
        // Where a full scratch space has stopped the guest, its write can be done now.
        if wasRunning, try monitor.execute("query-status")["status"]?.string == "io-error" {
            try monitor.execute("cont")
        }
    }

    /// Refuses to remove a directory whose files QEMU still uses.
    private func requireUnused(_ path: String, run: String, _ monitor: QMPClient) throws(BlockError) {
        let jobs = try monitor.execute("query-jobs").elements.compactMap { $0["id"]?.string }
        let exports = try monitor.execute("query-block-exports").elements.compactMap { $0["id"]?.string }
        let nodes = try monitor.execute("query-named-block-nodes", ["flat": true]).elements
            .compactMap { $0["node-name"]?.string }
        let socket = "\(path)/nbd.sock"
        var user = (jobs + exports + nodes).first { $0.hasPrefix("dg-\(run)-") }
        if access(socket, F_OK) == 0 && !isAbandonedSocket(socket) { user = user ?? "its NBD server" }
        if let user {
            throw BlockError(
                .denied, "removing the directory \(path): QEMU still uses it (\(user)): that has to be given back first"
            )
        }
    }

    /// Stops the NBD server if it is ours: if it listens at our socket, or has our exports; or if it was started, its
    /// socket's file has been removed by somebody, and nobody has exports.
    private func stopServer(run: String, socket: String?, wasStarted: Bool, _ monitor: QMPClient) throws(BlockError) {
        let exports = try monitor.execute("query-block-exports").elements.compactMap { $0["id"]?.string }
        let ours = exports.filter { $0.hasPrefix("dg-\(run)-") }
        for export in ours { try end(export: export, monitor) }
        let listens =
            if let socket {
                access(socket, F_OK) == 0 ? !isAbandonedSocket(socket) : wasStarted
            } else if case .network(let host, let port) = place.serving {
                (try? connect(to: .tcp(host: host, port: port), deadline: monotonicSeconds() + 5)) != nil
            } else {
                false
            }
        let others = try monitor.execute("query-block-exports").elements.filter { $0["type"]?.string == "nbd" }
        if !listens { return }
        if let other = others.first?["id"]?.string {
            // At a port it may be somebody else's server by now; at our socket it is ours.
            guard socket != nil else { return }
            throw BlockError(
                .denied, "stopping QEMU's NBD server: somebody else serves an export with it (\(other)): end that first"
            )
        }
        if case .failure(let refusal) = try monitor.attempt("nbd-server-stop"),
            !refusal.description.contains("not running")
        {
            throw BlockError(.inputOutput, "stopping QEMU's NBD server: \(refusal.description)")
        }
    }

    /// Removes a scratch node, the node of its file, and the job that made them.
    private func remove(node: String, _ monitor: QMPClient) throws(BlockError) {
        try end(job: "\(node)c", wasRunning: false, monitor)
        let nodes = try monitor.execute("query-named-block-nodes", ["flat": true]).elements
        for name in [node, "\(node)f"] where nodes.contains(where: { $0["node-name"]?.string == name }) {
            try monitor.execute("blockdev-del", ["node-name": .text(name)])
        }
    }

    /// Keeps the new checkpoint and removes those that it replaces; or removes the new one: the one before has never
    /// stopped counting.
    private func settleCheckpoint(_ obligation: Obligation, adopted: Bool) throws(BlockError) {
        let details = obligation.details
        guard let disk = details["disk"], let node = details["node"], let new = details["checkpoint"] else {
            throw unreadable(obligation)
        }
        let replaced = OwnName.names(in: details["replaces"])
        guard let monitor = try connected() else {
            // Bitmaps that are nowhere but in QEMU's memory went with it.
            if details["persistent"] != "true" { return }
            throw BlockError(
                .shutdown,
                "\(adopted ? "replacing checkpoints by" : "removing the checkpoint") \(new) on \(disk) of "
                    + "\(place.name): no QEMU runs there, and the bitmap is in the disk's image; start it, then run "
                    + "diskgate doctor --fix; where the machine is gone for good, nothing is lost with diskgate doctor "
                    + "--forget")
        }
        for (node, bitmaps) in try places(of: new, disk: disk, node: node, monitor) {
            for bitmap in bitmaps {
                // Those that were there when it was made, and no later ones.
                let goes = adopted ? replaced.contains(bitmap.name) && bitmap.name != new : bitmap.name == new
                guard goes, OwnName.isOwn(bitmap.name) else { continue }
                try monitor.removeBitmap(bitmap.name, of: node)
            }
        }
    }

    /// The nodes that may have a disk's checkpoints: the disk's own, as the machine is now; and the one that had it,
    /// which lies below another after an external snapshot.
    private func places(of checkpoint: String, disk: String, node: String, _ monitor: QMPClient) throws(BlockError)
        -> [(String, [QEMUBitmap])]
    {
        var places: [(String, [QEMUBitmap])] = []
        if let now = try monitor.disks().first(where: { $0.id == disk }), !now.node.isEmpty {
            places.append((now.node, now.bitmaps))
        }
        if places.first?.0 != node {
            for named in try monitor.execute("query-named-block-nodes", ["flat": true]).elements
            where named["node-name"]?.string == node {
                let bitmaps = (named["dirty-bitmaps"]?.elements ?? []).compactMap(QEMUBitmap.init)
                // Names of nodes are used again by other machines, those of checkpoints are not.
                if bitmaps.contains(where: { $0.name == checkpoint }) { places.append((node, bitmaps)) }
            }
        }
        return places
    }
}
