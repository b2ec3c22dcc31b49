// Looks whether all that a removal touches or leans on is whole, before it begins: merging cannot be undone.
import Block
import Formats
import Glibc
import LinuxIO

/// The look before points are removed. What was looked at once is not looked at again.
struct PrunePreflight {
    private let repository: Repository
    private let layout: MachineLayout
    private let place: String
    private let points: [Int: RestorePoint]
    private var seen: Set<String> = []

    /// - Parameter points: all of the machine.
    init(_ repository: Repository, _ machine: RepositoryMachine, _ points: [RestorePoint]) {
        self.repository = repository
        layout = repository.layout(machine)
        place = "pruning \(machine.name)"
        self.points = Dictionary(points.map { ($0.sequence, $0) }) { first, _ in first }
    }

    /// Looks at a point and at all that it reads from.
    ///
    /// - Throws: `.corrupt`, naming point and disk, when something is missing or is not what it was; or what reading
    ///   throws.
    mutating func check(_ point: RestorePoint) throws(BlockError) {
        for disk in point.manifest.disks {
            var (point, disk) = (point, disk)
            while seen.insert("\(point.sequence) \(disk.id)").inserted {
                try check(point, disk)
                guard let base = disk.base else { break }
                guard let next = points[base] else {
                    throw damaged(point, disk, "the manifest of point \(base), which it is based on, is missing")
                }
                guard let below = next.manifest.disk(disk.id) else {
                    throw damaged(point, disk, "point \(base), which it is based on, does not have the disk")
                }
                (point, disk) = (next, below)
            }
        }
    }

    private func damaged(_ point: RestorePoint, _ disk: PointManifest.Disk, _ what: String) -> BlockError {
        BlockError(
            .corrupt,
            "\(place): point \(point.sequence), disk \(disk.id), is damaged: \(what); nothing was removed (diskgate "
                + "verify tells more)")
    }

    private func check(_ point: RestorePoint, _ disk: PointManifest.Disk) throws(BlockError) {
        if let damage = try point.manifest.damages().first { throw damaged(point, disk, damage) }
        do throws(BlockError) {
            let sidecar = layout.hashes(disk.directory, disk.hashes.file)
            if try sha256(ofFile: sidecar) != (disk.hashes.sha256, disk.hashes.bytes) {
                throw BlockError(.corrupt, "\(sidecar) is not the file that the manifest names (SHA-256)")
            }
            let data = "\(layout.disk(disk.directory))/\(disk.file)"
            if access(data, R_OK | W_OK) < 0 { throw BlockError(errno: errno, "opening \(data)") }
            if repository.driver == .qcow2 {
                try Qcow2Merge.check(data)
                let (found, expected) = (try BackingName.read(from: data), disk.base.map { dataName($0, .qcow2) })
                if found != expected {
                    throw BlockError(
                        .corrupt, "\(data) is backed by \(found ?? "nothing"), not by \(expected ?? "nothing")")
                }
            }
        } catch {
            throw damaged(point, disk, error.message)
        }
    }

    /// Looks whether there is space to merge a point into the one below, at most as much as the point takes.
    ///
    /// - Returns: bytes that it may take.
    /// - Throws: `.noSpace`.
    func checkSpace(toMerge point: RestorePoint, into base: Int) throws(BlockError) -> UInt64 {
        var needed: UInt64 = 0
        for disk in point.manifest.disks where disk.base == base {
            var files = [layout.hashes(disk.directory, disk.hashes.file)]
            if repository.driver == .qcow2 { files.append("\(layout.disk(disk.directory))/\(disk.file)") }
            for file in files {
                var status = stat()
                if stat(file, &status) < 0 {
                    throw BlockError(errno: errno, "\(place): asking for the size of \(file)")
                }
                needed = needed.addingReportingOverflow(UInt64(clamping: status.st_size)).partialValue
            }
        }
        let free = try repository.freeSpace()
        if needed > free {
            throw BlockError(
                .noSpace,
                "\(place): merging point \(point.sequence) into point \(base), before its own file goes, may take "
                    + "\(needed >> 20) MiB, and \(free >> 20) MiB are free in \(repository.path); give it more space")
        }
        return needed
    }

    /// Refuses to take a point's files away while an image that is not the next point's is backed by one of them: its
    /// manifest may be missing, not its owner's wish to have it.
    ///
    /// - Throws: `.corrupt`, naming the image.
    static func requireUnused(
        _ doomed: RestorePoint, except allowed: Set<String>, in repository: Repository
    ) throws(BlockError) {
        if repository.driver != .qcow2 { return }
        let layout = repository.layout(doomed.machine)
        for disk in doomed.manifest.disks {
            let folder = layout.disk(disk.directory)
            for name in try namesIfThere(folder) where name.hasSuffix(".qcow2") {
                let path = "\(folder)/\(name)"
                if name == disk.file || allowed.contains(path) { continue }
                let backing: String?
                do throws(BlockError) { backing = try BackingName.read(from: path) } catch {
                    if error.kind != .corrupt { throw error }
                    continue
                }
                if backing == disk.file {
                    throw BlockError(
                        .corrupt,
                        "removing \(doomed.description): \(path) is backed by its file \(disk.file), and no manifest "
                            + "says so; nothing was removed (diskgate verify tells more)")
                }
            }
        }
    }
}
