// Snapshots and checkpoints of writable exports: made, listed, released and dropped over the control socket.
public import Block
import LinuxIO
import Logging
public import NBD
import Transports

/// A checkpoint as the control socket tells of it.
public struct CheckpointStatus: Codable, Sendable {
    /// Its name.
    public var name: String
    /// When it was made, as 2026-11-21T04:20:00Z.
    public var created: String
    /// Bytes of the chunks of 64 KiB that have changed since.
    public var changedBytes: UInt64
    /// Why everything counts as changed since; nil where only what has really changed does.
    public var allDirty: String?

    init(_ checkpoint: Checkpoint) {
        name = checkpoint.name
        created = timeText(checkpoint.created)
        changedBytes = checkpoint.changedBytes
        allDirty = checkpoint.allDirty
    }
}

/// A snapshot as the control socket tells of it.
public struct SnapshotStatus: Codable, Sendable {
    /// The name of the snapshot's export.
    public var export: String
    /// The name of the export that it is a snapshot of.
    public var of: String
    /// The checkpoint that was made with it.
    public var checkpoint: String
    /// When it was made, as 2026-11-21T04:20:00Z.
    public var created: String
    /// Bytes that were copied to scratch space.
    public var copiedBytes: UInt64
    /// Why it can be read no more; nil while it can.
    public var failure: String?
    /// The older checkpoints, oldest first: each is a dirty bitmap (qemu:dirty-bitmap:NAME) of the snapshot's export.
    public var increments: [CheckpointStatus]
}

/// The checkpointed disks of a server, and their snapshots.
public final class Snapshots: Sendable {
    /// The most snapshots of one export at a time: each may have to be copied for when something changes.
    public static let countMax = 8

    private struct Snapshot {
        let export: Export
        let of: String
        let made: CheckpointSnapshot
    }

    private struct State {
        var disks: [String: CheckpointedDisk] = [:]
        var snapshots: [Snapshot] = []
    }

    /// One operation at a time; `state` is held for moments only.
    private let work = Lock()
    private let state = Locked(State())
    private let registry: ExportRegistry
    private let scratchDirectory: String
    private let reserve: UInt64?
    private let log: Logger

    /// No disks.
    ///
    /// - Parameters:
    ///   - scratchDirectory: where snapshots keep what is overwritten.
    ///   - reserve: bytes that are to stay free there; nil for 5 % of the file system, at most 1 GiB.
    init(_ registry: ExportRegistry, scratchDirectory: String, reserve: UInt64?, log: Logger) {
        self.registry = registry
        self.scratchDirectory = scratchDirectory
        self.reserve = reserve
        self.log = log
    }

    /// Takes over a disk that is exported under a name.
    func add(_ disk: CheckpointedDisk, export: String) { state.withLock { $0.disks[export] = disk } }

    private func disk(_ export: String, _ doing: String) throws(BlockError) -> CheckpointedDisk {
        if let disk = state.withLock({ $0.disks[export] }) { return disk }
        if registry.all.contains(where: { $0.name == export }) {
            throw BlockError(
                .invalid, "\(doing) the export \"\(export)\": it has no checkpoints (serve --writable --checkpoints)")
        }
        throw BlockError(.notFound, "\(doing) the export \"\(export)\": there is none of this name")
    }

    /// Makes a snapshot with a checkpoint and exports it.
    ///
    /// - Parameters:
    ///   - checkpoint: the checkpoint's name; nil for one made from the time.
    ///   - name: the name of the snapshot's export; nil for EXPORT@CHECKPOINT.
    /// - Throws: `BlockError`: a name is taken, there are too many, or there is no room.
    public func make(of export: String, checkpoint: String?, as name: String?) throws(BlockError) -> SnapshotStatus {
        try work.withLock { () throws(BlockError) in
            let disk = try disk(export, "making a snapshot of")
            let count = state.withLock { state in state.snapshots.count { $0.of == export } }
            if count >= Self.countMax {
                throw BlockError(
                    .tooLarge, "making a snapshot of \"\(export)\": it has \(count), the most at a time; release one")
            }
            guard let origin = registry.all.first(where: { $0.name == export }) else {
                throw BlockError(.notFound, "making a snapshot of \"\(export)\": it is being removed")
            }
            let wanted = name ?? checkpoint.map { "\(export)@\($0)" }
            if let wanted, registry.all.contains(where: { $0.name == wanted }) {
                throw BlockError(.invalid, "making a snapshot: the export name \"\(wanted)\" is taken; give another")
            }
            let space = try SpaceGuard(scratchDirectory, reserve: reserve)
            let log = log
            let failed = Locked<(@Sendable (BlockError) -> Void)?>(nil)
            let made = try disk.makeSnapshot(checkpoint: checkpoint, space: space) { error in
                log.error("a snapshot of the export \"\(export)\" is broken, its writers go on: \(error.message)")
                failed.withLock { $0 }?(error)
            }
            do throws(BlockError) {
                let snapshot = try publish(made, of: origin, as: name ?? "\(export)@\(made.checkpoint)")
                failed.withLock { $0 = { _ in Self.giveBack(made.device, log) } }
                // It may have failed before anybody was there to give the space back.
                if made.device.failure != nil { Self.giveBack(made.device, log) }
                return status(snapshot)
            } catch {
                disk.device.release(made.device)
                try? disk.drop(made.checkpoint)
                throw error
            }
        }
    }

    private func publish(_ made: CheckpointSnapshot, of origin: Export, as name: String) throws(BlockError) -> Snapshot
    {
        var options = origin.options
        options.isReadOnly = true
        let export = try Export(
            name: name, description: "\(origin.name) at \(timeText(made.created)), checkpoint \(made.checkpoint)",
            device: made.device, options: options)
        try registry.add(export)
        let snapshot = Snapshot(export: export, of: origin.name, made: made)
        state.withLock { $0.snapshots.append(snapshot) }
        log.notice("made the snapshot \"\(name)\" of \"\(origin.name)\" with the checkpoint \(made.checkpoint)")
        for increment in made.increments {
            if let reason = increment.allDirty {
                log.warning("everything counts as changed since the checkpoint \(increment.name): \(reason)")
            }
        }
        return snapshot
    }

    /// Gives the scratch space of a broken snapshot back: what others lack, and nobody can use.
    private static func giveBack(_ device: SnapshotDevice, _ log: Logger) {
        do throws(BlockError) {
            try startThread(name: "scratch") {
                do throws(BlockError) { try device.giveScratchBack() } catch { log.error("\(error.message)") }
            }
        } catch { log.error("giving scratch space back: \(error.message)") }
    }

    private func status(_ snapshot: Snapshot) -> SnapshotStatus {
        SnapshotStatus(
            export: snapshot.export.name, of: snapshot.of, checkpoint: snapshot.made.checkpoint,
            created: timeText(snapshot.made.created), copiedBytes: snapshot.made.device.copiedBytes,
            failure: snapshot.made.device.failure?.message,
            increments: snapshot.made.increments.map { CheckpointStatus($0) })
    }

    /// The snapshots, in the order they were made; of one export, or of all.
    public func snapshots(of export: String?) -> [SnapshotStatus] {
        state.withLock { $0.snapshots }.filter { export == nil || $0.of == export }.map { status($0) }
    }

    /// The checkpoints of an export, oldest first.
    ///
    /// - Throws: `.notFound` or `.invalid` when there is no such export, or it has no checkpoints.
    public func checkpoints(of export: String) throws(BlockError) -> [CheckpointStatus] {
        try disk(export, "listing the checkpoints of").checkpoints().map { CheckpointStatus($0) }
    }

    /// Drops a checkpoint; older ones keep what it knows.
    ///
    /// - Throws: `BlockError`: there is no such export or checkpoint, or it cannot be stored.
    public func drop(_ checkpoint: String, of export: String) throws(BlockError) {
        try work.withLock { () throws(BlockError) in
            try disk(export, "dropping a checkpoint of").drop(checkpoint)
            log.notice("dropped the checkpoint \(checkpoint) of the export \"\(export)\"")
        }
    }

    /// Ends a snapshot: its clients get what they have asked for and are disconnected, its scratch space is given back.
    /// The checkpoint stays.
    ///
    /// - Returns: false when there is no snapshot exported under this name.
    public func release(_ name: String, _ server: Server) -> Bool {
        work.withLock {
            let found = state.withLock { $0.snapshots.first { $0.export.name == name } }
            guard let found else { return false }
            end(found, server)
            return true
        }
    }

    private func end(_ snapshot: Snapshot, _ server: Server) {
        _ = registry.remove(snapshot.export.name)
        server.disconnectAll(from: snapshot.export, seconds: 10)
        let disk = state.withLock { state in
            state.snapshots.removeAll { $0.export === snapshot.export }
            return state.disks[snapshot.of]
        }
        disk?.device.release(snapshot.made.device)
        log.notice("released the snapshot \"\(snapshot.export.name)\"")
    }

    /// Ends the snapshots of an export that was removed and has no clients any more, and closes its checkpoints.
    ///
    /// - Throws: `BlockError` when they could not be stored: everything then counts as changed.
    func close(_ export: String, _ server: Server) throws(BlockError) {
        try work.withLock { () throws(BlockError) in
            for snapshot in state.withLock({ state in state.snapshots.filter { $0.of == export } }) {
                end(snapshot, server)
            }
            let disk = state.withLock { $0.disks.removeValue(forKey: export) }
            try disk?.close()
        }
    }

    /// Closes everything, when the server has stopped.
    ///
    /// - Returns: whether all checkpoints could be stored; what could not is in the log.
    func closeAll(_ server: Server) -> Bool {
        var isStored = true
        for export in state.withLock({ $0.disks.keys.sorted() }) {
            do throws(BlockError) { try close(export, server) } catch {
                log.error("closing the checkpoints of the export \"\(export)\": \(error.message)")
                isStored = false
            }
        }
        return isStored
    }
}
