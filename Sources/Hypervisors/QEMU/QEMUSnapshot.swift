// Makes a point in time of a QEMU's disks: scratch files and nodes first, then one transaction while the guest is
// frozen, then exports.
import Block
import Glibc
import LinuxIO
import Transports

/// A snapshot in the making. Used by one thread, for one call of `begin`.
///
/// For each disk, blocks that the guest overwrites are kept in a scratch qcow2 first (blockdev-backup with sync=none),
/// whose backing file is the disk itself: that is the point in time (QEMU, docs/interop/live-block-operations). The
/// checkpoint of before is never switched off: the changes since it are merged into a bitmap of the scratch node at the
/// same moment. So when the run fails, removing the new checkpoint is all, and nothing can be missed.
final class QEMUSnapshot {
    /// A disk that takes part.
    struct Part {
        let disk: QEMUDisk
        /// The checkpoint since which changes are known; nil where the whole disk has to be read.
        let since: String?
        let downgrade: String?
        /// The name of its scratch node, its job, and its export's id.
        let name: String
        let scratchPath: String
        /// The checkpoint that was asked for, usable or not.
        let wanted: String?
        /// The checkpoint to be made.
        let checkpoint: String
    }

    /// The bitmap of the scratch node that has what changed.
    static let changedBitmap = "changed"
    /// Bytes for each bit of a bitmap.
    static let granularity: Int64 = 65536

    let place: QEMUPlace
    let request: SnapshotRequest
    let ledger: RunLedger
    let short: String
    private(set) var made: [Obligation] = []
    private var warnings: [String] = []
    private var directory = ""
    private var socket: String?
    /// The process that runs the machine, which each obligation names.
    private var identity: QEMUIdentity?

    init(_ place: QEMUPlace, _ request: SnapshotRequest, _ ledger: RunLedger) {
        self.place = place
        self.request = request
        self.ledger = ledger
        short = OwnName.short(ledger.run.id)
    }

    /// Makes the snapshot; when that fails, takes back what was made.
    func begin() throws(BlockError) -> QEMUSession {
        let monitor = try place.connect()
        do throws(BlockError) { return try make(monitor) } catch {
            let release = QEMURelease(place, monitor)
            // What cannot be given back now stands in the ledger.
            try? release.settleAll(made, of: ledger, adopted: false)
            release.close()
            throw error.during("making a snapshot of \(place.name)")
        }
    }

    private func make(_ monitor: QMPClient) throws(BlockError) -> QEMUSession {
        identity = QEMUIdentity(monitor)
        let status = try monitor.execute("query-status")["status"]?.string ?? ""
        let parts = try plan(monitor)
        try makeDirectory(monitor)
        for part in parts { try makeScratch(part, monitor) }
        try startServer(monitor)
        let actions = try prepareActions(parts, isRunning: status == "running")
        let moment = try SnapshotMoment(
            freezer: place.agent.map { .agent(path: $0) }, request, ledger,
            obstacle: status == "running" ? nil : "the machine is not running, but \(status)",
            details: identity?.details ?? [:])
        var outcome = try moment.pass { () throws(BlockError) in
            Step.reached("qemu.before-transaction")
            try monitor.execute(
                "transaction", ["actions": .list(actions)], seconds: min(monitor.commandSeconds, 15))
            Step.reached("qemu.transaction")
        }
        outcome.warnings = warnings + outcome.warnings
        var disks: [SnapshotDisk] = []
        for part in parts { disks.append(try export(part, monitor)) }
        let offer = SnapshotOffer(
            disks: disks, outcome: outcome, ledger: ledger, obligations: made,
            watching: place.isLocal ? directory : nil, reserve: request.scratchReserve)
        return QEMUSession(place, monitor, offer, jobs: parts.map(\.name))
    }

    /// Offers a disk for reading.
    private func export(_ part: Part, _ monitor: QMPClient) throws(BlockError) -> SnapshotDisk {
        var export: [String: JSONValue] = [
            "type": "nbd", "id": .text(part.name), "node-name": .text(part.name), "name": .text(part.disk.id),
            "writable": false,
            // Whoever connects again is told whether this is still the same point in time.
            "description": .text("diskgate run \(short)"),
        ]
        if part.since != nil { export["bitmaps"] = [.text(Self.changedBitmap)] }
        try monitor.execute("block-export-add", .object(export))
        Step.reached("qemu.export")
        var disk = SnapshotDisk(
            id: part.disk.id, size: part.disk.size, source: try place.source(part.disk.id, socket: socket))
        disk.answerSeconds = place.answerSeconds
        disk.changedContext = part.since.map { _ in "qemu:dirty-bitmap:\(Self.changedBitmap)" }
        disk.downgrade = part.downgrade
        disk.checkpoint = part.checkpoint
        return disk
    }

    /// Notes that something is about to be made.
    private func intend(_ kind: String, _ details: [String: String]) throws(BlockError) {
        try intend([(kind, details)])
    }

    private func intend(_ things: [(kind: String, details: [String: String])]) throws(BlockError) {
        made += try ledger.intend(things.map { ($0.kind, $0.details.merging(identity?.details ?? [:]) { $1 }) })
    }

    /// Finds the disks, and what is known of their changes.
    private func plan(_ monitor: QMPClient) throws(BlockError) -> [Part] {
        let disks = try monitor.disks()
        try requireAbsolute(scratch: request.scratchDirectory)
        let base = request.scratchDirectory ?? place.scratch ?? "/var/tmp"
        directory = place.isLocal ? "\(base)/diskgate-\(short)" : base
        var parts: [Part] = []
        for (index, wanted) in request.disks.enumerated() {
            guard let disk = disks.first(where: { $0.id == wanted.id }) else {
                let known = disks.map(\.id).joined(separator: ", ")
                throw BlockError(.notFound, "there is no disk \(wanted.id) (there are: \(known))")
            }
            if let obstacle = disk.obstacle {
                throw BlockError(.unsupported, "the disk \(disk.id) cannot be backed up: \(obstacle)")
            }
            let checkpoint = OwnName.checkpoint(request.checkpoint, of: disk.id)
            if let old = disk.bitmaps.first(where: { $0.name == checkpoint }) {
                throw BlockError(.invalid, "the disk \(disk.id) has a checkpoint \(old.name) already")
            }
            let since = wanted.since.map { OwnName.checkpoint($0, of: disk.id) }
            let problem = since.flatMap { disk.problem(since: $0) }
            if !disk.keepsBitmaps {
                warnings.append(
                    "\(disk.id): its changes are known only as long as QEMU runs: "
                        + "a \(disk.format) image keeps no bitmaps"
                )
            }
            // A machine at the other end of a network keeps one scratch file, which nobody here can remove.
            let path =
                "\(directory)/" + (place.isLocal ? "scratch-\(index).qcow2" : "diskgate-scratch-\(disk.id).qcow2")
            parts.append(
                Part(
                    disk: disk, since: problem == nil ? since : nil,
                    downgrade: problem.map { "\(disk.id) is read whole: \($0)" }, name: "dg-\(short)-\(index)",
                    scratchPath: path, wanted: since, checkpoint: checkpoint))
        }
        if parts.isEmpty { throw BlockError(.invalid, "no disk takes part") }
        return parts
    }

    /// Makes the private directory of scratch files and the server's socket.
    private func makeDirectory(_ monitor: QMPClient) throws(BlockError) {
        guard place.isLocal else {
            return warnings.append("the scratch files in \(directory) stay on QEMU's machine: remove them by hand")
        }
        try makePrivate(directory, monitor)
        var place = directory
        // A Unix socket's path has at most 107 bytes.
        if "\(directory)/nbd.sock".utf8.count > 107 {
            place = "/var/tmp/diskgate-\(short)"
            try makePrivate(place, monitor)
        }
        socket = "\(place)/nbd.sock"
    }

    private func makePrivate(_ path: String, _ monitor: QMPClient) throws(BlockError) {
        try intend("qemu.directory", ["path": path, "run": short])
        Step.reached("qemu.directory-intended")
        if mkdir(path, 0o700) < 0 { throw BlockError(errno: errno, "making the scratch directory \(path)") }
        if let peer = monitor.peer, peer.user != geteuid() {
            // QEMU has to make files here, as whoever it runs.
            if chown(path, peer.user, peer.group) < 0 {
                throw BlockError(
                    errno: errno,
                    "giving the scratch directory \(path) to QEMU's user \(peer.user) "
                        + "(run diskgate as that user, or root)"
                )
            }
        }
        Step.reached("qemu.directory")
    }

    /// Makes a disk's scratch file and its nodes.
    private func makeScratch(_ part: Part, _ monitor: QMPClient) throws(BlockError) {
        try intend("qemu.node", ["node": part.name])
        Step.reached("qemu.node-intended")
        let file: [String: JSONValue] = ["driver": "file", "filename": .text(part.scratchPath)]
        try monitor.create(.object(file.merging(["size": 0]) { $1 }), job: "\(part.name)c")
        Step.reached("qemu.scratch-file")
        try monitor.execute("blockdev-add", .object(file.merging(["node-name": .text("\(part.name)f")]) { $1 }))
        try monitor.create(
            ["driver": "qcow2", "file": .text("\(part.name)f"), "size": .integer(Int64(clamping: part.disk.size))],
            job: "\(part.name)c")
        try monitor.execute(
            "blockdev-add",
            [
                "driver": "qcow2", "node-name": .text(part.name), "file": .text("\(part.name)f"),
                "backing": .text(part.disk.node),
            ])
        Step.reached("qemu.node")
    }

    /// Starts QEMU's NBD server, of which there can be only one.
    private func startServer(_ monitor: QMPClient) throws(BlockError) {
        var address: JSONValue
        var arguments: [String: JSONValue] = [:]
        if case .network(let host, let port) = place.serving {
            address = ["type": "inet", "data": ["host": .text(host), "port": .text("\(port)")]]
            if let credentials = place.credentials { arguments["tls-creds"] = .text(credentials) }
        } else {
            address = ["type": "unix", "data": ["path": .text(socket ?? "")]]
        }
        arguments["addr"] = address
        let exports = try monitor.execute("query-block-exports").elements
        if let other = exports.first(where: { $0["type"]?.string == "nbd" }) {
            throw BlockError(
                .denied,
                "QEMU serves NBD exports already (\(other["id"]?.string ?? "")), and has only one server: "
                    + "end that first"
            )
        }
        try intend("qemu.server", ["run": short].merging(socket.map { ["socket": $0] } ?? [:]) { $1 })
        Step.reached("qemu.server-intended")
        try monitor.execute("nbd-server-start", .object(arguments))
        Step.reached("qemu.server")
        if let server = made.indices.last {
            made[server].details["started"] = "true"
            try ledger.learn(made[server], ["started": "true"])
        }
    }

    /// What the transaction does, noted in the ledger.
    private func prepareActions(_ parts: [Part], isRunning: Bool) throws(BlockError) -> [JSONValue] {
        // All copying away comes first: it holds the guest's writes up, on all disks, until the transaction is done.
        // A bitmap that was merged before would miss what the guest writes in between.
        var (backups, merges, checkpoints): ([JSONValue], [JSONValue], [JSONValue]) = ([], [], [])
        var intended: [(kind: String, details: [String: String])] = []
        for part in parts {
            let replaced = part.disk.bitmaps.map(\.name).filter {
                OwnName.replaces(part.checkpoint, $0) || $0 == part.wanted && OwnName.isOwn($0)
            }
            let checkpoint = [
                "disk": part.disk.id, "node": part.disk.node, "checkpoint": part.checkpoint,
                "replaces": OwnName.joined(replaced), "persistent": "\(part.disk.keepsBitmaps)",
            ]
            intended += [
                ("qemu.checkpoint", checkpoint), ("qemu.job", ["job": part.name, "running": "\(isRunning)"]),
            ]
            if let since = part.since {
                merges.append(
                    action(
                        "block-dirty-bitmap-add",
                        [
                            "node": .text(part.name), "name": .text(Self.changedBitmap),
                            "granularity": .integer(Self.granularity), "disabled": true,
                        ]))
                merges.append(
                    action(
                        "block-dirty-bitmap-merge",
                        [
                            "node": .text(part.name), "target": .text(Self.changedBitmap),
                            "bitmaps": [["node": .text(part.disk.node), "name": .text(since)]],
                        ]))
            }
            checkpoints.append(
                action(
                    "block-dirty-bitmap-add",
                    [
                        "node": .text(part.disk.node), "name": .text(part.checkpoint),
                        "granularity": .integer(Self.granularity), "persistent": .bool(part.disk.keepsBitmaps),
                    ]))
            // A block that cannot be copied away fails the guest's write (on-cbw-error=break-guest-write, the default):
            // the reserve is there to end the run before that. With break-snapshot the write would be done, and what
            // reads through the scratch node, over the live disk, would see new data without an error.
            let backup: [String: JSONValue] = [
                "job-id": .text(part.name), "device": .text(part.disk.node), "target": .text(part.name),
                "sync": "none",
            ]
            backups.append(action("blockdev-backup", backup))
        }
        try intend(intended)
        return backups + merges + checkpoints
    }

    private func action(_ type: String, _ data: [String: JSONValue]) -> JSONValue {
        ["type": .text(type), "data": .object(data)]
    }
}

extension QMPClient {
    /// Runs blockdev-create to its end.
    func create(_ options: JSONValue, job: String) throws(BlockError) {
        try execute("blockdev-create", ["job-id": .text(job), "options": options])
        let deadline = monotonicSeconds() + commandSeconds
        while true {
            let jobs = try execute("query-jobs").elements
            guard let found = jobs.first(where: { $0["id"]?.string == job }) else {
                throw BlockError(.inputOutput, "making a scratch file: its job \(job) is gone")
            }
            if found["status"]?.string == "concluded" {
                try execute("job-dismiss", ["id": .text(job)])
                guard let problem = found["error"]?.string else { return }
                throw BlockError(
                    .inputOutput, "making the scratch file \(options["filename"]?.string ?? ""): \(problem)")
            }
            if monotonicSeconds() > deadline {
                throw BlockError(.inputOutput, "making a scratch file: its job \(job) does not end")
            }
            pause(seconds: 0.002)
        }
    }
}
