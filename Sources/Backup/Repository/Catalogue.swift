// The catalogue: an index of all points in SQLite, so that listing thousands does not read thousands of manifests.
public import Block
import Glibc
import Hypervisors
import LinuxIO

/// What a list of points tells of one.
public struct PointSummary: Codable, Sendable, Equatable {
    public var machine: String
    public var machineDirectory: String
    public var sequence: Int
    public var uuid: String
    public var time: UTCTime
    public var level: PointManifest.Level
    public var consistency: String
    /// The disks' ids.
    public var disks: [String]
    /// Bytes on all disks, and bytes of data that were stored when the point was made.
    public var size: UInt64
    public var bytesWritten: UInt64
    /// The files that have the point's own data, in the machine's directory, and the bytes that they take up now, when
    /// earlier points may have been merged into them.
    public var files: [String]
    public var bytesHeld: UInt64
    /// What was said of it since.
    public var isPinned: Bool
    public var isSuspect: Bool
}

/// The index. It is never trusted over the manifests: a manifest that is not the one that was
/// read (size, time of change, inode) is read again. Where it is damaged or cannot be written, the
/// manifests are read.
struct Catalogue {
    static let fileName = "catalogue.sqlite"
    private static let version = 2
    private let repository: Repository
    private var path: String { "\(repository.path)/\(Self.fileName)" }

    init(_ repository: Repository) { self.repository = repository }

    /// Points of some machines, in the order they were made.
    ///
    /// - Parameter rescan: whether to throw the index away first.
    func points(of machines: [RepositoryMachine], rescan: Bool) throws(BlockError) -> [PointSummary] {
        if rescan { remove() }
        do throws(BlockError) { return try indexed(machines) } catch {
            // Damaged, of another version, or not to be written: an index is not worth failing for.
            remove()
        }
        do throws(BlockError) { return try indexed(machines) } catch {
            var summaries: [PointSummary] = []
            for machine in machines {
                for point in try repository.readablePoints(of: machine) { summaries.append(summary(point)) }
            }
            return summaries
        }
    }

    private func remove() {
        for ending in ["", "-journal", "-wal", "-shm"] { unlink(path + ending) }
    }

    /// What a file was when it was read.
    private func stamp(_ path: String) -> String? {
        var status = stat()
        guard stat(path, &status) == 0 else { return nil }
        return "\(status.st_ino) \(status.st_size) \(status.st_mtim.tv_sec).\(status.st_mtim.tv_nsec) "
            + "\(status.st_ctim.tv_sec).\(status.st_ctim.tv_nsec)"
    }

    private func indexed(_ machines: [RepositoryMachine]) throws(BlockError) -> [PointSummary] {
        let database = try SQLite(path)
        try prepare(database)
        var all: [PointSummary] = []
        for machine in machines {
            var known: [String: (stamp: String, summary: PointSummary)] = [:]
            try database.run("SELECT file, stamp, summary FROM points WHERE machine = ?", [.text(machine.directory)]) {
                (row) throws(BlockError) in
                let summary = try parseJSON(PointSummary.self, Array(row.text(2).utf8), path)
                known[row.text(0)] = (row.text(1), summary)
            }
            var fresh: [(String, String, PointSummary)] = []
            var present: Set<String> = []
            for name in try repository.manifestNames(of: machine) {
                let file = "\(repository.layout(machine).points)/\(name)"
                present.insert(name)
                let stamp = stamp(file) ?? ""
                if let entry = known[name], entry.stamp == stamp, entry.summary.machine == machine.name {
                    all.append(withCurrent(entry.summary, machine))
                    continue
                }
                let point: RestorePoint
                do throws(BlockError) { point = try repository.point(inManifest: file, of: machine) } catch {
                    repository.warn("a point of \(machine.name) is left out: \(error.message)")
                    continue
                }
                let found = summary(point)
                all.append(found)
                fresh.append((name, stamp, found))
            }
            let gone = known.keys.filter { !present.contains($0) }
            if !fresh.isEmpty || !gone.isEmpty { try update(database, machine, fresh, gone) }
        }
        return all.sorted {
            ($0.machine, $0.machineDirectory, $0.sequence) < ($1.machine, $1.machineDirectory, $1.sequence)
        }
    }

    private func prepare(_ database: SQLite) throws(BlockError) {
        var version: Int64 = 0
        try database.run("PRAGMA user_version") { (row) throws(BlockError) in version = row.integer(0) }
        if version == Int64(Self.version) { return }
        try database.transaction { () throws(BlockError) in
            try database.execute(
                """
                DROP TABLE IF EXISTS points;
                CREATE TABLE points (machine TEXT NOT NULL, file TEXT NOT NULL, stamp TEXT NOT NULL,
                    summary TEXT NOT NULL, PRIMARY KEY (machine, file)) WITHOUT ROWID;
                PRAGMA user_version = \(Self.version);
                """)
        }
    }

    private func update(
        _ database: SQLite, _ machine: RepositoryMachine, _ fresh: [(String, String, PointSummary)], _ gone: [String]
    ) throws(BlockError) {
        try database.transaction { () throws(BlockError) in
            for name in gone {
                try database.run(
                    "DELETE FROM points WHERE machine = ? AND file = ?", [.text(machine.directory), .text(name)])
            }
            for (name, stamp, summary) in fresh {
                let text = String(decoding: try readableJSON(summary, path), as: UTF8.self)
                try database.run(
                    "INSERT OR REPLACE INTO points VALUES (?, ?, ?, ?)",
                    [.text(machine.directory), .text(name), .text(stamp), .text(text)])
            }
        }
    }

    private func summary(_ point: RestorePoint) -> PointSummary {
        let manifest = point.manifest
        return withCurrent(
            PointSummary(
                machine: point.machine.name, machineDirectory: point.machine.directory, sequence: point.sequence,
                uuid: point.uuid, time: point.time, level: manifest.level, consistency: manifest.consistency.rawValue,
                disks: manifest.disks.map(\.id), size: manifest.disks.reduce(0) { $0 &+ $1.size },
                bytesWritten: manifest.disks.reduce(0) { $0 &+ $1.bytesWritten },
                files: manifest.disks.map { "disks/\($0.directory)/\($0.file)" }, bytesHeld: 0, isPinned: false,
                isSuspect: false),
            point.machine)
    }

    /// Bytes that a file takes up; none where it is missing.
    private func allocatedBytes(_ path: String) -> UInt64 {
        var status = stat()
        return stat(path, &status) == 0 ? UInt64(clamping: status.st_blocks) &* 512 : 0
    }

    /// Marks are files of their own, and files change when points are merged: they are asked each time.
    private func withCurrent(_ summary: PointSummary, _ machine: RepositoryMachine) -> PointSummary {
        var marked = summary
        let layout = repository.layout(machine)
        marked.bytesHeld = summary.files.reduce(0) { $0 &+ allocatedBytes("\(layout.path)/\($1)") }
        marked.isPinned = access(layout.mark(summary.sequence, .pinned), F_OK) == 0
        marked.isSuspect = access(layout.mark(summary.sequence, .suspect), F_OK) == 0
        return marked
    }
}

extension Repository {
    /// The points of a machine, or of all, in the order they were made, as the catalogue has them, which is brought up
    /// to date on the way.
    ///
    /// - Parameter rescan: whether to build the catalogue anew from the manifests.
    /// - Throws: `BlockError` when manifests cannot be read.
    public func summaries(of machine: RepositoryMachine? = nil, rescan: Bool = false) throws(BlockError)
        -> [PointSummary]
    {
        try Catalogue(self).points(of: try chosen(machine), rescan: rescan)
    }
}
