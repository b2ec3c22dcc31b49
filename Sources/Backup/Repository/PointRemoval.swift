// Removes one doomed point: what it holds goes into the point that follows. Ended at any moment, it is done again.
import Block
import Formats
import Glibc
import LinuxIO

/// The removal of a point whose manifest has the doomed ending, so that nobody opens it any more.
///
/// For each disk that the next point continues, the next point's data is merged into the doomed point's file, in place;
/// the next point reads the same all the time, because it shadows all that is written. Then the file takes the next
/// point's name, and the next point's manifest is written anew. Every step leaves what the steps before it have made
/// recognisable: data that is merged twice is the same, and a file that is gone has its new name.
struct PointRemoval {
    private let repository: Repository
    private let doomed: RestorePoint
    private let layout: MachineLayout
    private let cancellation: Cancellation

    init(_ repository: Repository, _ doomed: RestorePoint, _ cancellation: Cancellation) {
        self.repository = repository
        self.doomed = doomed
        self.cancellation = cancellation
        layout = repository.layout(doomed.machine)
    }

    func run() throws(BlockError) {
        do throws(BlockError) {
            let next = try next()
            var allowed: Set<String> = []
            for disk in next?.manifest.disks ?? [] where disk.base == doomed.sequence {
                allowed.insert("\(layout.disk(disk.directory))/\(disk.file)")
            }
            try PrunePreflight.requireUnused(doomed, except: allowed, in: repository)
            if let next { try hand(to: next) }
            try clear()
        } catch {
            takeBack()
            throw error
        }
    }

    /// The point that continues the doomed one.
    private func next() throws(BlockError) -> RestorePoint? {
        let next = try repository.points(of: doomed.machine).filter { point in
            point.manifest.disks.contains { $0.base == doomed.sequence }
        }
        if next.count > 1 {
            throw BlockError(
                .corrupt, "removing \(doomed.description): several points are based on it; run diskgate verify")
        }
        return next.first
    }

    /// Makes the point one like the others again, if nothing of it was changed yet: what cannot be finished is not to
    /// be in the way.
    private func takeBack() {
        guard doomed.path.hasSuffix(Repository.doomedEnding),
            let names = try? repository.manifestNames(of: doomed.machine)
        else { return }
        // Where a manifest cannot be read, nobody knows whether it took the point over.
        var points: [RestorePoint] = []
        for name in names {
            let path = "\(layout.points)/\(name)"
            guard let point = try? repository.point(inManifest: path, of: doomed.machine) else { return }
            points.append(point)
        }
        for point in points {
            if point.manifest.merged.contains(where: { $0.uuid == doomed.uuid }) { return }
            for disk in point.manifest.disks where disk.base == doomed.sequence {
                let merged = hashesName(point.sequence, merges: point.manifest.merged.count + 1)
                if access(layout.hashes(disk.directory, merged), F_OK) == 0 || errno != ENOENT { return }
            }
        }
        for disk in doomed.manifest.disks {
            for name in [disk.file, disk.hashes.file]
            where access("\(layout.disk(disk.directory))/\(name)", F_OK) < 0 { return }
        }
        try? renameDurably(doomed.path, to: String(doomed.path.dropLast(Repository.doomedEnding.count)))
    }

    /// A disk that the next point continues.
    private struct Pair {
        let old: PointManifest.Disk
        let new: PointManifest.Disk
        let oldData: String
        let newData: String
        /// The name of the sidecar that has the hashes of both.
        let merged: String
    }

    private func hand(to next: RestorePoint) throws(BlockError) {
        var pairs: [Pair] = []
        for disk in next.manifest.disks where disk.base == doomed.sequence {
            guard let old = doomed.manifest.disk(disk.id) else {
                throw BlockError(.corrupt, "removing \(doomed.description): it does not have disk \(disk.id)")
            }
            let folder = layout.disk(disk.directory)
            pairs.append(
                Pair(
                    old: old, new: disk, oldData: "\(layout.disk(old.directory))/\(old.file)",
                    newData: "\(folder)/\(disk.file)",
                    merged: hashesName(next.sequence, merges: next.manifest.merged.count + 1)))
        }
        for pair in pairs where access(pair.oldData, F_OK) == 0 {
            try checkCancelled()
            // One after the other: when the data has its new name, the hashes are there.
            try mergeHashes(pair)
            Step.reached("prune.hashes-merged")
            if repository.driver == .qcow2 {
                try Qcow2Merge.merge(child: pair.newData, into: pair.oldData) { (_) throws(BlockError) in
                    try checkCancelled()
                }
            }
            Step.reached("prune.data-merged")
        }
        // Whoever opens or verifies a chain now waits until names and manifest agree again.
        let names = try repository.lockNames(of: doomed.machine, .exclusive)
        defer { withExtendedLifetime(names) {} }
        for pair in pairs where access(pair.oldData, F_OK) == 0 {
            switch repository.driver {
            case .qcow2: try renameDurably(pair.oldData, to: pair.newData)
            case .reflink: try removeDurably(pair.oldData)
            }
            Step.reached("prune.data-renamed")
        }
        try carryMarks(to: next)
        try rewrite(next, pairs)
        Step.reached("prune.manifest-rewritten")
    }

    /// Throws when the user does not want to wait for the rest. Up to the new names, everything is done again by the
    /// next one; what follows is short.
    private func checkCancelled() throws(BlockError) {
        try cancellation.check(
            "removing \(doomed.description), which the next backup, prune or diskgate doctor --fix finishes")
    }

    private func mergeHashes(_ pair: Pair) throws(BlockError) {
        let path = layout.hashes(pair.new.directory, pair.merged)
        unlink("\(path).partial")
        try ChunkHashes.merge(
            base: layout.hashes(pair.old.directory, pair.old.hashes.file),
            child: layout.hashes(pair.new.directory, pair.new.hashes.file), into: "\(path).partial")
        try renameDurably("\(path).partial", to: path)
    }

    /// What may be wrong in the doomed point's data may be wrong in the next one's now.
    private func carryMarks(to next: RestorePoint) throws(BlockError) {
        guard let mark = try repository.marks(of: doomed).first(where: { $0.kind == .suspect }),
            try !repository.marks(of: next).contains(where: { $0.kind == .suspect })
        else { return }
        try repository.mark(next, .suspect, reason: mark.reason)
    }

    private func rewrite(_ next: RestorePoint, _ pairs: [Pair]) throws(BlockError) {
        var manifest = next.manifest
        for index in manifest.disks.indices {
            guard let pair = pairs.first(where: { $0.new.id == manifest.disks[index].id }) else { continue }
            let sidecar = try sha256(ofFile: layout.hashes(pair.new.directory, pair.merged))
            manifest.disks[index].base = pair.old.base
            if pair.old.base == nil { manifest.disks[index].level = .full }
            manifest.disks[index].hashes = .init(file: pair.merged, bytes: sidecar.bytes, sha256: sidecar.digest)
        }
        if manifest.disks.allSatisfy({ $0.base == nil }) { manifest.level = .full }
        manifest.merged =
            doomed.manifest.merged + [.init(uuid: doomed.uuid, sequence: doomed.sequence, time: doomed.time)]
            + manifest.merged
        try writeDurably(next.path, try manifest.encoded()) { Step.reached("prune.manifest-written") }
    }

    /// Removes what nobody needs any more; the manifest last, so that this is done again where it was interrupted.
    private func clear() throws(BlockError) {
        let sequence = doomed.sequence
        try PrunePreflight.requireUnused(doomed, except: [], in: repository)
        for point in try repository.points(of: doomed.machine)
        where point.manifest.merged.contains(where: { $0.uuid == doomed.uuid }) {
            for disk in point.manifest.disks {
                let old = "\(sequenceText(point.sequence))."
                try repository.removeFiles(in: layout.disk(disk.directory)) {
                    $0.hasPrefix(old) && $0.hasSuffix(".hashes") && $0 != disk.hashes.file
                }
            }
        }
        Step.reached("prune.hashes-removed")
        for disk in doomed.manifest.disks {
            let text = "\(sequenceText(sequence))."
            try repository.removeFiles(in: layout.disk(disk.directory)) { $0.hasPrefix(text) }
            Step.reached("prune.disk-cleared")
        }
        try repository.removeFiles(in: layout.documents) { Backup.sequence(ofName: $0) == sequence }
        try repository.removeFiles(in: layout.marks) { Backup.sequence(ofName: $0) == sequence }
        Step.reached("prune.documents-removed")
        unlink(layout.pointLock(sequence))
        try removeDurably(doomed.path)
        Step.reached("prune.cleared")
    }
}
