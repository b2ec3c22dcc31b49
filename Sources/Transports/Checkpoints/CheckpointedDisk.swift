// A writable disk with checkpoints: snapshots of it, and what has changed since each checkpoint.
public import Block
import Glibc
public import LinuxIO

/// A checkpoint as its disk tells of it.
public struct Checkpoint: Sendable {
    /// Its name.
    public var name: String
    /// When it was made, in seconds since 1970.
    public var created: Int64
    /// Bytes of the chunks of 64 KiB that have changed since.
    public var changedBytes: UInt64
    /// Why everything counts as changed since; nil where only what has really changed does.
    public var allDirty: String?
}

/// A snapshot of a checkpointed disk.
public struct CheckpointSnapshot: Sendable {
    /// The disk as it was, with a dirty bitmap for each older checkpoint.
    public let device: SnapshotDevice
    /// The checkpoint that was made with it.
    public let checkpoint: String
    /// When it was made, in seconds since 1970.
    public let created: Int64
    /// The older checkpoints, and what has changed from each of them to the snapshot.
    public let increments: [Checkpoint]
}

/// A writable disk of this machine with checkpoints in a directory.
public final class CheckpointedDisk: Sendable {
    /// What to export: the disk, tracked.
    public let device: TrackedDevice

    private struct State {
        var chain: CheckpointChain
        var recorder: CheckpointRecorder?
        var isClosed = false
    }

    private let state: Locked<State>
    /// The disk itself, whatever its path leads to later.
    private let file: Descriptor
    private let path: String
    private let realPath: String
    private let log: @Sendable (String) -> Void

    /// A disk with the checkpoints that a directory has of it.
    ///
    /// - Parameters:
    ///   - base: the disk, opened for writing.
    ///   - file: the file or block node that it is, or is a part of, opened before the disk.
    ///   - path: where that was found.
    ///   - part: which part it is; "" for all of it.
    ///   - directory: a directory for the checkpoints of many disks.
    ///   - log: told what people have to know.
    /// - Throws: `BlockError`: nothing tells the disk's states apart, the path leads to another file by now, or the
    ///   disk's checkpoints cannot be used.
    public init(
        _ base: any BlockDevice, file: Descriptor, path: String, part: String, directory: String,
        log: @escaping @Sendable (String) -> Void
    ) throws(BlockError) {
        let real = try Transports.realPath(path)
        guard try DiskIdentity.leads(real, to: file) else {
            throw BlockError(.invalid, "keeping checkpoints of \(path): it was replaced while it was opened; try again")
        }
        let identity = try DiskIdentity(of: file, path: real)
        let label = identity.path.split(separator: "/").last.map(String.init) ?? "disk"
        let name = String(label.map { CheckpointChain.isName("x\($0)") ? $0 : "_" }.prefix(100))
        let disk = "\(directory)/\(name)-\(try CheckpointFile.digest(ofText: identity.path).prefix(16))"
        let own = part.isEmpty ? disk : "\(disk)-\(try CheckpointFile.digest(ofText: part).prefix(16))"
        // One user of a disk, whatever its part: what another one changes would not be noted.
        var chain = try CheckpointChain(own, lock: "\(disk).lock", size: base.info.size, identity: identity) {
            log("checkpoints of \(path): everything counts as changed since the newest one, and so since all: \($0)")
        }
        var recorder: CheckpointRecorder?
        if let last = chain.entries.indices.last {
            recorder = try Self.recorder(chain, last, try chain.bits(last), log)
        }
        let device = TrackedDevice(base)
        device.switchRecorder { recorder }
        state = Locked(State(chain: chain, recorder: recorder))
        self.device = device
        self.file = file
        self.path = path
        realPath = real
        self.log = log
    }

    /// What notes changes since a checkpoint of the chain.
    private static func recorder(
        _ chain: borrowing CheckpointChain, _ index: Int, _ bits: DirtyBitmap,
        _ log: @escaping @Sendable (String) -> Void
    ) throws(BlockError) -> CheckpointRecorder {
        var header = chain.entries[index].header
        header.isClosed = false
        header.identity = nil
        let path = chain.path(header.name)
        let open = header
        return try CheckpointRecorder(
            path: path, bits: bits,
            begin: { () throws(BlockError) in try CheckpointFile.write(path, open, bits) },
            onFailure: { error in
                log("\(error.message): changes are noted in memory only; everything counts as changed after a crash")
            })
    }

    private func requireOpen(_ state: State, _ doing: String) throws(BlockError) {
        if state.isClosed { throw BlockError(.shutdown, "\(doing) \(path): it is being closed") }
    }

    // MARK: - Snapshots

    /// Makes a snapshot and a checkpoint in one step.
    ///
    /// - Parameters:
    ///   - name: the checkpoint's name; nil for one made from the time.
    ///   - space: where the snapshot keeps what is overwritten.
    ///   - onFailure: told once when the snapshot can be read no more. It must not block.
    /// - Throws: `BlockError`: the name is taken or malformed, there are too many checkpoints, there is no room for
    ///   the snapshot, or the disk cannot be flushed. There is then neither a snapshot nor a checkpoint.
    public func makeSnapshot(
        checkpoint name: String?, space: SpaceGuard, onFailure: @escaping @Sendable (BlockError) -> Void
    ) throws(BlockError) -> CheckpointSnapshot {
        try state.withLock { (state) throws(BlockError) in
            try requireOpen(state, "making a snapshot of")
            let created = Int64(time(nil))
            let name = try newName(name, created, state.chain)
            try space.check()
            let size = device.info.size
            let scratch = try NamelessFile.scratch(size: size, directory: space.directory)
            let header = CheckpointHeader(name: name, created: created, size: size)
            let bits = try DirtyBitmap(size: size, granularity: CheckpointFile.granularity)
            try state.chain.append(header, bits)
            let older = state.chain.entries.count - 1
            let snapshot: SnapshotDevice
            let next: CheckpointRecorder
            do throws(BlockError) {
                next = try Self.recorder(state.chain, older, bits, log)
                snapshot = try device.makeSnapshot(
                    scratch: scratch, bitmaps: state.chain.entries[..<older].map(\.header.name), recorder: next,
                    mayGrow: { () throws(BlockError) in try space.check() }, onFailure: onFailure)
            } catch {
                withdraw(older, &state.chain)
                throw error
            }
            state.recorder = next
            if older > 0 { close(older - 1, &state.chain) }
            do throws(BlockError) {
                // The new checkpoint's own bits stay out: they are what came after.
                let increments = try increments(&state.chain, upTo: older)
                snapshot.freeze(increments.map(\.bits))
                return CheckpointSnapshot(
                    device: snapshot, checkpoint: name, created: created, increments: increments.map(\.checkpoint))
            } catch {
                device.release(snapshot)
                do throws(BlockError) { try drop(older, &state) } catch { log("\(error.message): it stays") }
                throw error
            }
        }
    }

    /// Takes out a checkpoint that nobody has recorded for. Where it has to stay, everything counts as changed since.
    private func withdraw(_ index: Int, _ chain: inout CheckpointChain) {
        do throws(BlockError) { try chain.remove(index) } catch {
            chain.distrust(index, "no snapshot was made with it, and it could not be removed")
            log("\(error.message): the checkpoint \(chain.entries[index].header.name) stays, and all counts as changed")
        }
    }

    private func newName(_ wanted: String?, _ created: Int64, _ chain: CheckpointChain) throws(BlockError) -> String {
        if chain.entries.count >= CheckpointChain.countMax {
            throw BlockError(
                .tooLarge,
                "making a checkpoint of \(path): it has \(chain.entries.count), the most; drop some "
                    + "(snapshot --drop-checkpoint)")
        }
        if let wanted {
            guard CheckpointChain.isName(wanted) else {
                throw BlockError(
                    .invalid, "\(wanted) is no name of a checkpoint: 1 to 64 letters, digits and -_. (not first)")
            }
            if chain.index(of: wanted) != nil {
                throw BlockError(.invalid, "making the checkpoint \(wanted) of \(path): there is one of this name")
            }
            return wanted
        }
        let stem = timeText(created, format: "%Y%m%dT%H%M%SZ")
        var name = stem
        var count = 2
        while chain.index(of: name) != nil {
            name = "\(stem)-\(count)"
            count += 1
        }
        return name
    }

    /// Stores the final bits of the checkpoint before the newest. What cannot be stored stays in memory until the disk
    /// is closed.
    private func close(_ index: Int, _ chain: inout CheckpointChain) {
        do throws(BlockError) {
            try chain.store(index, bits: try chain.bits(index), isClosed: true)
        } catch { log("\(error.message); it is tried again when the disk is closed") }
    }

    private func increments(_ chain: inout CheckpointChain, upTo end: Int) throws(BlockError) -> [(
        bits: DirtyBitmap, checkpoint: Checkpoint
    )] {
        var sums: [DirtyBitmap] = []
        var reason: String?
        var found: [(bits: DirtyBitmap, checkpoint: Checkpoint)] = []
        for index in (0..<end).reversed() {
            let sum = try DirtyBitmap(size: chain.size, granularity: CheckpointFile.granularity)
            try sum.merge(try chain.bits(index))
            if let newer = sums.last { try sum.merge(newer) }
            sums.append(sum)
            let header = chain.entries[index].header
            reason = header.allDirty ?? reason
            let changed = min(
                UInt64(sum.setCount).multipliedReportingOverflow(by: sum.granularity).partialValue, sum.size)
            found.append(
                (
                    sum,
                    Checkpoint(name: header.name, created: header.created, changedBytes: changed, allDirty: reason)
                ))
        }
        return found.reversed()
    }

    // MARK: - Checkpoints

    /// The checkpoints, oldest first, and what has changed from each of them until now.
    ///
    /// - Throws: `.noMemory` or the like when the bits cannot be put together.
    public func checkpoints() throws(BlockError) -> [Checkpoint] {
        try state.withLock { (state) throws(BlockError) in
            try increments(&state.chain, upTo: state.chain.entries.count).map(\.checkpoint)
        }
    }

    /// Drops a checkpoint. Older ones keep what it knows; snapshots keep their bitmaps.
    ///
    /// - Throws: `BlockError`: there is none of this name, or its directory cannot be written.
    public func drop(_ name: String) throws(BlockError) {
        try state.withLock { (state) throws(BlockError) in
            try requireOpen(state, "dropping a checkpoint of")
            guard let index = state.chain.index(of: name) else {
                throw BlockError(.notFound, "dropping the checkpoint \(name) of \(path): there is none of this name")
            }
            try drop(index, &state)
        }
    }

    private func drop(_ index: Int, _ state: inout State) throws(BlockError) {
        let isNewest = index == state.chain.entries.count - 1
        guard index > 0 else {
            try state.chain.remove(index)
            if isNewest {
                device.switchRecorder { nil }
                state.recorder = nil
            }
            return
        }
        let bits = try state.chain.bits(index - 1)
        try bits.merge(try state.chain.bits(index))
        state.chain.note(index - 1, allDirty: state.chain.entries[index].header.allDirty)
        if !isNewest {
            try state.chain.store(index - 1, bits: bits, isClosed: true)
            return try state.chain.remove(index)
        }
        // Before anybody records for it: whoever finds it after a crash does not trust it.
        try state.chain.store(index - 1, bits: bits, isClosed: false)
        let next: CheckpointRecorder
        do throws(BlockError) {
            next = try Self.recorder(state.chain, index - 1, bits, log)
            try state.chain.remove(index)
        } catch {
            // The one that stays goes on recording.
            close(index - 1, &state.chain)
            throw error
        }
        let last = state.recorder
        // What was recorded since the bits were merged.
        device.switchRecorder {
            if let last { next.adopt(last.bits) }
            return next
        }
        state.recorder = next
    }

    /// Lets nobody change the disk any more, flushes it and closes the newest checkpoint, which is then trusted as long
    /// as nobody else changes the disk. Its snapshots are to be released before.
    ///
    /// - Throws: `BlockError` when the disk or its checkpoints could not be stored: then everything counts as changed.
    public func close() throws(BlockError) {
        try state.withLock { (state) throws(BlockError) in
            if state.isClosed { return }
            state.isClosed = true
            try device.close()
            guard let last = state.chain.entries.indices.last else { return }
            for index in state.chain.entries.indices.dropLast() where state.chain.entries[index].bits != nil {
                try state.chain.store(index, bits: try state.chain.bits(index), isClosed: true)
            }
            guard try DiskIdentity.leads(path, to: file) else {
                throw BlockError(
                    .invalid,
                    "closing the checkpoints of \(path): another file has taken its place while it was served, so "
                        + "everything counts as changed")
            }
            try state.chain.store(
                last, bits: try state.chain.bits(last), isClosed: true,
                identity: try DiskIdentity(of: file, path: realPath))
        }
    }
}

/// A time as text, by default as in 2026-11-21T04:20:00Z.
///
/// - Parameters:
///   - seconds: since 1970.
///   - format: as strftime(3) has it.
public func timeText(_ seconds: Int64, format: String = "%Y-%m-%dT%H:%M:%SZ") -> String {
    var time = time_t(seconds)
    var parts = tm()
    gmtime_r(&time, &parts)
    var text = [CChar](repeating: 0, count: 64)
    let count = strftime(&text, text.count, format, &parts)
    return String(decoding: text[..<count].map { UInt8(bitPattern: $0) }, as: UTF8.self)
}
