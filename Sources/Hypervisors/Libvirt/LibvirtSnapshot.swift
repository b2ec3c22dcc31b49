// Makes a point in time of a running domain's disks, with the checkpoint that the next run asks for.
import Block
import CLinux
import Glibc
import LinuxIO
import Transports

/// A snapshot in the making. Used by one thread, for one call of `begin`.
///
/// libvirt keeps every checkpoint recording until it is removed, and a backup since one shows what it and all later
/// ones have recorded. So after a failed run, removing the new checkpoint is all.
final class LibvirtSnapshot {
    /// A disk that takes part.
    struct Part {
        let disk: LibvirtDomain.Disk
        let wanted: String?
        var since: String?
        var downgrade: String?
    }

    private let place: LibvirtPlace
    private let domain: LibvirtDomain
    private let request: SnapshotRequest
    private let ledger: RunLedger
    private let checkpoint: String
    private let directory: String
    private let filesDirectory: String
    private let short: String
    private let socket: String
    private var made: [Obligation] = []
    private var warnings: [String] = []

    init(_ place: LibvirtPlace, _ domain: LibvirtDomain, _ request: SnapshotRequest, _ ledger: RunLedger) {
        self.place = place
        self.domain = domain
        self.request = request
        self.ledger = ledger
        checkpoint = OwnName.checkpoint(request.checkpoint)
        short = OwnName.short(ledger.run.id)
        let base = request.scratchDirectory ?? place.scratch ?? "/var/tmp"
        filesDirectory = place.isLocal ? "\(base)/diskgate-\(short)" : base
        // A Unix socket's path has at most 107 bytes.
        let fits = "\(filesDirectory)/nbd.sock".utf8.count <= 107
        directory = fits ? filesDirectory : "/var/tmp/diskgate-\(short)"
        socket = "\(directory)/nbd.sock"
    }

    /// Makes the snapshot; when that fails, takes back what was made.
    func begin() throws(BlockError) -> LibvirtSession {
        do throws(BlockError) { return try make() } catch {
            let release = LibvirtRelease(place)
            // What cannot be given back now stands in the ledger.
            try? release.settleAll(made, of: ledger, adopted: false)
            throw error.during("making a snapshot of \(place.name)")
        }
    }

    private func make() throws(BlockError) -> LibvirtSession {
        try requireAbsolute(scratch: request.scratchDirectory ?? place.scratch)
        var parts = try plan()
        if let other = try place.runningBackup() {
            throw BlockError(.denied, "another backup of this domain goes on already (\(other.server))")
        }
        try makeDirectories()
        let wanted = parts.compactMap(\.wanted)
        let replaced = try place.checkpointNames().filter {
            OwnName.replaces(checkpoint, $0) || wanted.contains($0) && $0 != checkpoint
        }
        let served =
            place.address.map { ["server": "\($0.port)", "export": "\(short)-"] } ?? ["server": socket]
        made += try ledger.intend([
            ("libvirt.checkpoint", ["checkpoint": checkpoint, "replaces": OwnName.joined(replaced)]),
            ("libvirt.backup", served),
        ])
        Step.reached("libvirt.intended")
        let moment = try SnapshotMoment(
            freezer: domain.hasAgent ? .libvirt(place.virsh, domain: place.domain) : nil, request, ledger,
            obstacle: domain.state == "running" ? nil : "the machine is \(domain.state)")
        var outcome: SnapshotMoment.Outcome
        do throws(BlockError) { outcome = try moment.pass { () throws(BlockError) in try start(parts) } } catch {
            guard parts.contains(where: { $0.since != nil }), Self.isAboutCheckpoints(error) else { throw error }
            for index in parts.indices where parts[index].since != nil {
                parts[index].since = nil
                parts[index].downgrade =
                    "\(parts[index].disk.target) is read whole: its checkpoint \(parts[index].wanted ?? "") is of no "
                    + "use: \(error.message)"
            }
            outcome = try moment.pass { () throws(BlockError) in try start(parts) }
        }
        Step.reached("libvirt.begun")
        outcome.warnings = warnings + outcome.warnings
        return LibvirtSession(
            place,
            SnapshotOffer(
                disks: try parts.map { (part) throws(BlockError) in try offered(part) }, outcome: outcome,
                ledger: ledger, obligations: made, watching: place.isLocal ? filesDirectory : nil,
                reserve: request.scratchReserve))
    }

    private static func isAboutCheckpoints(_ error: BlockError) -> Bool {
        ["checkpoint inconsistent", "bitmap", "no domain checkpoint"].contains { error.message.contains($0) }
    }

    /// Finds the disks, and what is known of their changes.
    private func plan() throws(BlockError) -> [Part] {
        var parts: [Part] = []
        for wanted in request.disks {
            guard let disk = domain.disks.first(where: { $0.target == wanted.id }) else {
                let known = domain.disks.map(\.target).joined(separator: ", ")
                throw BlockError(.notFound, "there is no disk \(wanted.id) (there are: \(known))")
            }
            if let obstacle = disk.obstacle {
                throw BlockError(.unsupported, "the disk \(disk.target) cannot be backed up: \(obstacle)")
            }
            var part = Part(disk: disk, wanted: wanted.since.map(OwnName.checkpoint))
            if let since = part.wanted {
                if disk.checkpoints.contains(since) {
                    part.since = since
                } else {
                    let known = disk.checkpoints.joined(separator: ", ")
                    part.downgrade =
                        "\(disk.target) is read whole: its checkpoint \(since) is not there any more"
                        + (known.isEmpty ? "" : " (there are: \(known))")
                }
            }
            if !disk.isTracked {
                warnings.append(
                    "\(disk.target): it is read whole each time: libvirt keeps checkpoints of qcow2 images only")
            }
            parts.append(part)
        }
        if parts.isEmpty { throw BlockError(.invalid, "no disk takes part") }
        return parts
    }

    /// Makes the private directories of scratch files and the server's socket, for the domain's QEMU.
    private func makeDirectories() throws(BlockError) {
        guard place.isLocal else { return }
        for path in directory == filesDirectory ? [directory] : [filesDirectory, directory] {
            made.append(try ledger.intend("libvirt.directory", ["path": path]))
            Step.reached("libvirt.directory-intended")
            if mkdir(path, 0o700) < 0 { throw BlockError(errno: errno, "making the scratch directory \(path)") }
            if let owner = domain.owner, owner.user != geteuid(), chown(path, owner.user, owner.group) < 0 {
                throw BlockError(
                    errno: errno,
                    "giving the scratch directory \(path) to QEMU's user \(owner.user) (run diskgate as root)")
            }
        }
    }

    /// Begins the backup and the checkpoint, which libvirt does in one step.
    private func start(_ parts: [Part]) throws(BlockError) {
        // virsh reads descriptions from files only.
        let backup = try TemporaryText(backupDescription(parts))
        let checkpoint = try TemporaryText(checkpointDescription(parts))
        Step.reached("libvirt.before-begin")
        do throws(BlockError) {
            defer { withExtendedLifetime((backup, checkpoint)) {} }
            _ = try place.virsh.run(["backup-begin", place.domain, backup.path, checkpoint.path], seconds: 30)
        } catch {
            let isDenied = error.message.contains("Permission denied")
            throw isDenied
                ? error.during(
                    "QEMU may not write to \(directory) (file permissions, or AppArmor's or SELinux's rules)")
                : error
        }
    }

    private func backupDescription(_ parts: [Part]) -> String {
        func quoted(_ text: String) -> String { "'\(XMLElement.escaped(text))'" }
        let server =
            if let address = place.address {
                "<server transport='tcp' name=\(quoted(address.host)) port='\(address.port)'"
                    + (place.hasTLS ? " tls='yes'" : "") + "/>"
            } else {
                "<server transport='unix' socket=\(quoted(socket))/>"
            }
        var disks = ""
        for disk in domain.disks {
            let target = quoted(disk.target)
            guard let part = parts.first(where: { $0.disk.target == disk.target }) else {
                disks += "<disk name=\(target) backup='no'/>"
                continue
            }
            let mode =
                part.since.map {
                    " backupmode='incremental' incremental=\(quoted($0)) "
                        + "exportbitmap=\(quoted(QEMUSnapshot.changedBitmap))"
                } ?? " backupmode='full'"
            // What a scratch file is called on another machine is never seen here: one for each disk is used again.
            let file = "\(filesDirectory)/\(place.isLocal ? "" : "diskgate-")scratch-\(disk.target).qcow2"
            disks +=
                "<disk name=\(target) backup='yes' type='file' exportname=\(quoted(exportName(disk)))\(mode)>"
                + "<driver type='qcow2'/><scratch file=\(quoted(file))/></disk>"
        }
        return "<domainbackup mode='pull'>\(server)<disks>\(disks)</disks></domainbackup>"
    }

    /// What a disk's export is called. Over TCP the name is all that tells this run's from another's.
    private func exportName(_ disk: LibvirtDomain.Disk) -> String {
        place.isLocal ? disk.target : "\(short)-\(disk.target)"
    }

    private func checkpointDescription(_ parts: [Part]) -> String {
        let disks = domain.disks.map { disk in
            let takesPart = disk.isTracked && parts.contains { $0.disk.target == disk.target }
            return "<disk name='\(XMLElement.escaped(disk.target))' checkpoint='\(takesPart ? "bitmap" : "no")'/>"
        }
        return "<domaincheckpoint><name>\(XMLElement.escaped(checkpoint))</name><disks>\(disks.joined())</disks>"
            + "</domaincheckpoint>"
    }

    /// A disk as it is offered.
    private func offered(_ part: Part) throws(BlockError) -> SnapshotDisk {
        var disk = SnapshotDisk(
            id: part.disk.target, size: part.disk.size,
            source: try place.source(exportName(part.disk), socket: socket))
        disk.changedContext = part.since.map { _ in "qemu:dirty-bitmap:\(QEMUSnapshot.changedBitmap)" }
        disk.downgrade = part.downgrade
        disk.checkpoint = part.disk.isTracked ? checkpoint : nil
        return disk
    }
}

/// A text in memory that a program can read as a file, as long as this process lives: a crash leaves nothing behind.
private final class TemporaryText {
    private let file: Descriptor

    var path: String { "/proc/\(getpid())/fd/\(file.number)" }

    init(_ text: String) throws(BlockError) {
        let number = dg_memfd("diskgate")
        if number < 0 { throw BlockError(errno: -number, "making a text for virsh") }
        file = Descriptor(owning: number)
        let bytes = Array(text.utf8)
        if write(file.number, bytes, bytes.count) != bytes.count {
            throw BlockError(errno: errno, "writing a text for virsh")
        }
    }
}
