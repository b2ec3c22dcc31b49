// What a run will do: which disks take part, and how much of each has to be read, and why.
import Block
import Hypervisors

/// The levels of a run's disks, decided before anything is touched.
struct BackupPlan {
    /// A disk and what is wanted of it.
    struct Disk {
        var disk: VirtualDisk
        /// The checkpoint since which changes are wanted; nil for all of the disk.
        var since: String?
        /// Why all of it is wanted.
        var reason: String?
        /// Whether that is less than what the user asked for.
        var isDowngrade = false
    }

    /// The disks that take part, in the machine's order.
    var disks: [Disk]
    /// The disks that do not.
    var leftOut: [(disk: VirtualDisk, reason: String)]
    /// Those of them that were backed up before and cannot be now, for people.
    var missed: [String]

    /// Decides on the levels.
    ///
    /// - Parameters:
    ///   - last: the newest point of the machine; nil where there is none.
    ///   - known: ids of all disks that are in any point of the machine.
    ///   - problem: what keeps a disk of that point from being built upon; nil where nothing does.
    init(
        _ machine: VirtualMachine, _ request: BackupRequest, last: RestorePoint?, known: Set<String>,
        problem: (_ disk: PointManifest.Disk) -> String?
    ) throws(BlockError) {
        let isTracked = machine.hasHypervisor
        let (chosen, others) = try request.disks.choose(from: machine)
        leftOut = others
        let failures = chosen.compactMap(\.failure)
        if let first = failures.first {
            throw BlockError(first.kind, failures.map(\.message).joined(separator: "; "))
        }
        // A disk that was backed up before and cannot be now is not left out without a word.
        missed = others.filter { $0.disk.obstacle == $0.reason && known.contains($0.disk.id) }.map {
            "disk \($0.disk.id) is left out: \($0.reason)"
        }
        disks = []
        for disk in chosen {
            var level = Self.level(of: disk, request, last, problem)
            // Nothing else was to be had, unless this is not the disk that it was.
            if !isTracked && last?.manifest.disk(disk.id)?.size == disk.size { level.isDowngrade = false }
            if let last, last.manifest.disk(disk.id) == nil, known.contains(disk.id), !request.isFull {
                level.isDowngrade = true
            }
            disks.append(level)
        }
    }

    private static func level(
        of disk: VirtualDisk, _ request: BackupRequest, _ last: RestorePoint?,
        _ problem: (PointManifest.Disk) -> String?
    ) -> Disk {
        if request.isFull { return Disk(disk: disk, reason: "asked for") }
        guard let last else { return Disk(disk: disk, reason: "the machine's first point") }
        guard let before = last.manifest.disk(disk.id) else {
            return Disk(disk: disk, reason: "the disk is not in point \(last.sequence)")
        }
        func downgraded(_ reason: String) -> Disk { Disk(disk: disk, reason: reason, isDowngrade: true) }
        if before.size != disk.size {
            return downgraded("it had \(before.size) bytes in point \(last.sequence) and has \(disk.size) now")
        }
        guard let checkpoint = before.checkpoint else {
            return downgraded(disk.trackingObstacle ?? "point \(last.sequence) has no checkpoint of it")
        }
        guard disk.checkpoints.contains(checkpoint) else {
            return downgraded(
                "the checkpoint \(checkpoint) of point \(last.sequence) is not there any more, is not consistent, or "
                    + "is another image's")
        }
        if let problem = problem(before) { return downgraded(problem) }
        return Disk(disk: disk, since: checkpoint)
    }
}
