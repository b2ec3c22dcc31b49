// `diskgate snapshot` and `diskgate checkpoints`: snapshots of a running server's writable exports.
import ArgumentParser
import Gateway
import Glibc

struct SnapshotCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "snapshot",
        abstract: "Make a point-in-time export and a checkpoint of a writable export, in one step.",
        discussion: """
            The server has to be started with --writable --checkpoints. The snapshot is a read-only export of its own, \
            EXPORT@CHECKPOINT, until it is released or the server stops. What has changed from an older checkpoint to \
            the snapshot is its meta context qemu:dirty-bitmap:OLDER. The checkpoint stays until it is dropped.
            """)

    @Argument(help: "Name of the writable export; \"\" for the default one.")
    var export: String?

    @Option(help: "Name of the checkpoint; otherwise one is made from the time.")
    var checkpoint: String?

    @Option(name: .customLong("as"), help: ArgumentHelp("Name of the snapshot's export.", valueName: "name"))
    var name: String?

    @Option(help: ArgumentHelp("End the snapshot of this export name; its checkpoint stays.", valueName: "name"))
    var release: String?

    @Option(
        help: ArgumentHelp(
            "Drop a checkpoint of the export; older ones keep what it knows.", valueName: "checkpoint"))
    var dropCheckpoint: String?

    @OptionGroup var server: ControlArguments
    @OptionGroup var report: ReportArguments

    func validate() throws {
        let makes = checkpoint != nil || name != nil
        if release != nil && (export != nil || makes || dropCheckpoint != nil) {
            throw ValidationError("--release takes the name of a snapshot's export, and nothing else.")
        }
        if dropCheckpoint != nil && makes { throw ValidationError("--drop-checkpoint makes no snapshot.") }
        if export == nil && release == nil { throw ValidationError("Give the name of a writable export.") }
    }

    func run() throws {
        if let release {
            var request = ControlRequest(command: "release")
            request.name = release
            _ = try server.send(request)
        } else if let dropCheckpoint {
            var request = ControlRequest(command: "drop-checkpoint")
            request.export = export
            request.checkpoint = dropCheckpoint
            _ = try server.send(request)
        } else {
            var request = ControlRequest(command: "snapshot")
            request.export = export
            request.checkpoint = checkpoint
            request.name = name
            let snapshots = try server.send(request).snapshots ?? []
            if report.json { return try printJSON(snapshots) }
            for snapshot in snapshots { show(snapshot) }
        }
    }

    private func show(_ snapshot: SnapshotStatus) {
        print("\(snapshot.export)")
        for increment in snapshot.increments {
            if let reason = increment.allDirty {
                writeError("everything counts as changed since \(increment.name): \(reason)")
            } else {
                writeError("\(increment.changedBytes) bytes have changed since \(increment.name)")
            }
        }
    }
}

struct CheckpointsCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "checkpoints", abstract: "List the checkpoints and snapshots of a writable export.")

    @Argument(help: "Name of the writable export.")
    var export = ""

    @OptionGroup var server: ControlArguments
    @OptionGroup var report: ReportArguments

    /// What is printed as JSON.
    private struct Report: Encodable {
        var checkpoints: [CheckpointStatus]
        var snapshots: [SnapshotStatus]
    }

    func run() throws {
        var request = ControlRequest(command: "checkpoints")
        request.export = export
        let checkpoints = try server.send(request).checkpoints ?? []
        request.command = "snapshots"
        let snapshots = try server.send(request).snapshots ?? []
        if report.json { return try printJSON(Report(checkpoints: checkpoints, snapshots: snapshots)) }
        for checkpoint in checkpoints {
            let changed =
                checkpoint.allDirty.map { "everything counts as changed: \($0)" }
                ?? "\(checkpoint.changedBytes) bytes changed since"
            print("checkpoint \(checkpoint.name) \(checkpoint.created) \(changed)")
        }
        for snapshot in snapshots {
            let state = snapshot.failure ?? "\(snapshot.copiedBytes) bytes in scratch space"
            print("snapshot \"\(snapshot.export)\" \(snapshot.created) checkpoint \(snapshot.checkpoint), \(state)")
        }
    }
}
