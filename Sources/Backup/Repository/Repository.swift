// A repository of restore points: a directory that can be read without diskgate. Machines, points, locks, marks.
public import Block
import FoundationEssentials
import Glibc
public import LinuxIO

/// A directory with restore points. Other processes may read and change it at the same time: locks keep apart what has
/// to be, and the manifests are asked anew each time.
public final class Repository: Sendable {
    /// Its directory, without symbolic links.
    public let path: String
    /// How disks are stored.
    public let driver: StorageDriver
    /// How data is stored in qcow2 images.
    public let compression: PointCompression

    private let tell: @Sendable (String) -> Void
    private let told = Locked<Set<String>>([])

    private init(
        path: String, _ description: RepositoryDescription, warn: @escaping @Sendable (String) -> Void = { _ in }
    ) {
        self.path = path
        tell = warn
        driver = description.driver
        compression = description.compression
    }

    /// Makes a repository in a new or empty directory.
    ///
    /// - Throws: `.invalid` when the directory holds something, lies in another repository, or, for `reflink`, is on a
    ///   file system whose files cannot share blocks.
    public static func create(
        at path: String, driver: StorageDriver = .qcow2, compression: PointCompression = .none
    ) throws(BlockError) -> Repository {
        if driver == .reflink && compression != .none {
            throw BlockError(.invalid, "making the repository \(path): raw files (reflink) cannot be compressed")
        }
        try makeDirectories(path)
        let root = try resolved(path)
        var above = root
        while true {
            if access("\(above)/\(RepositoryDescription.fileName)", F_OK) == 0 {
                throw BlockError(
                    .invalid,
                    above == root
                        ? "making the repository \(path): there is one already"
                        : "making the repository \(path): it would lie inside the repository \(above)")
            }
            if above == "/" { break }
            above = directoryName(above)
        }
        let present = try namesInDirectory(root).filter { $0 != "lost+found" && !$0.hasSuffix(".partial") }
        if let name = present.first {
            throw BlockError(
                .invalid, "making the repository \(path): the directory is not empty (\(name)); give a new one")
        }
        if driver == .reflink { try requireReflinks(in: root) }
        try makeDirectories("\(root)/vms")
        let description = RepositoryDescription(driver: driver, compression: compression)
        let file = "\(root)/\(RepositoryDescription.fileName)"
        try writeDurably(file, try readableJSON(description, file))
        return Repository(path: root, description)
    }

    /// Opens a repository.
    ///
    /// - Parameter warn: gets what cannot be read and is left out of lists, once each, for people.
    /// - Throws: `.notFound` when there is none, `.unsupported` when it needs a newer version of diskgate.
    public static func open(
        at path: String, warn: @escaping @Sendable (String) -> Void = { _ in }
    ) throws(BlockError) -> Repository {
        let description = try RepositoryDescription.read(from: path)
        return Repository(path: try resolved(path), description, warn: warn)
    }

    /// Tells the user something, once.
    func warn(_ text: String) {
        if told.withLock({ $0.insert(text).inserted }) { tell(text) }
    }

    /// Whether a directory is a repository, of whatever version.
    public static func exists(at path: String) -> Bool {
        access("\(path)/\(RepositoryDescription.fileName)", F_OK) == 0
    }

    /// Opens a repository, which is made where there is none.
    ///
    /// - Throws: as `open` and `create`.
    public static func openOrCreate(at path: String) throws(BlockError) -> Repository {
        try exists(at: path) ? open(at: path) : create(at: path)
    }

    /// The repository's UUID, in lower case.
    ///
    /// - Throws: `BlockError` when its description cannot be read.
    func identity() throws(BlockError) -> String { try RepositoryDescription.read(from: path).id }

    private static func resolved(_ path: String) throws(BlockError) -> String {
        guard let real = realpath(path, nil) else { throw BlockError(errno: errno, "opening the repository \(path)") }
        defer { free(real) }
        return String(cString: real)
    }

    // MARK: Machines

    /// The machines that have a directory, by name. One whose `machine.json` cannot be read is left out, with a
    /// warning.
    ///
    /// - Throws: `BlockError` when the repository cannot be read.
    public func machines() throws(BlockError) -> [RepositoryMachine] {
        var machines: [RepositoryMachine] = []
        for directory in try namesIfThere("\(path)/vms") {
            do throws(BlockError) {
                if let machine = try machine(inDirectory: directory) { machines.append(machine) }
            } catch { warn("a machine is left out: \(error.message)") }
        }
        return machines.sorted { ($0.name, $0.directory) < ($1.name, $1.directory) }
    }

    /// One machine, or all.
    func chosen(_ machine: RepositoryMachine?) throws(BlockError) -> [RepositoryMachine] {
        if let machine { return [machine] }
        return try machines()
    }

    /// The machine that a user names by its name, its id or its directory.
    ///
    /// - Parameter text: nil where the user names none: then there has to be exactly one.
    /// - Throws: `.notFound`, or `.invalid` when several have the name.
    public func machine(named text: String?) throws(BlockError) -> RepositoryMachine {
        let all = try machines()
        let known = all.isEmpty ? "it has none yet" : "it has " + all.map(\.name).joined(separator: ", ")
        guard let text else {
            if all.count == 1 { return all[0] }
            throw BlockError(
                all.isEmpty ? .notFound : .invalid, "choosing a machine of the repository \(path): \(known); name one")
        }
        let exact = all.filter { $0.id == text || $0.directory == text }
        let found = exact.isEmpty ? all.filter { $0.name == text } : exact
        if found.count == 1 { return found[0] }
        if found.isEmpty {
            throw BlockError(.notFound, "looking for the machine \(text) in the repository \(path): \(known)")
        }
        throw BlockError(
            .invalid,
            "looking for the machine \(text) in the repository \(path): several have this name; give one of "
                + found.map(\.directory).joined(separator: ", "))
    }

    private struct Identity: Codable {
        var id: String
        var name: String
    }

    /// Machines that cannot be read: their directories, and why.
    ///
    /// - Throws: `BlockError` when the repository cannot be read.
    public func unreadableMachines() throws(BlockError) -> [(directory: String, reason: String)] {
        var found: [(directory: String, reason: String)] = []
        for directory in try namesIfThere("\(path)/vms") {
            do throws(BlockError) { _ = try machine(inDirectory: directory) } catch {
                found.append((directory, error.message))
            }
        }
        return found
    }

    private func machine(inDirectory directory: String) throws(BlockError) -> RepositoryMachine? {
        let file = MachineLayout(path: "\(path)/vms/\(directory)").identity
        if access(file, F_OK) < 0 { return nil }
        let identity = try readJSON(Identity.self, from: file)
        return RepositoryMachine(id: identity.id, name: identity.name, directory: directory)
    }

    /// The machine of an id, whose directory is made where there is none yet. A machine that was renamed keeps its
    /// directory.
    ///
    /// - Throws: `BlockError` when the repository cannot be written.
    public func enroll(id: String, name: String) throws(BlockError) -> RepositoryMachine {
        if let known = try machines().first(where: { $0.id == id }) {
            if known.name == name { return known }
            let machine = RepositoryMachine(id: id, name: name, directory: known.directory)
            try write(machine)
            return machine
        }
        // It may be the machine's: a second directory would begin everything anew.
        let digest = try sha256(Array(id.utf8))
        for unreadable in try unreadableMachines()
        where [8, 16, 64].contains(where: { unreadable.directory.hasSuffix("-\(digest.prefix($0))") }) {
            throw BlockError(
                .corrupt, "looking for the directory of \(name) (\(unreadable.directory)): \(unreadable.reason)")
        }
        for digits in [8, 16, 64] {
            let directory = try machineDirectory(id: id, name: name, digits: digits)
            if access(layout(directory).identity, F_OK) == 0 { continue }
            let machine = RepositoryMachine(id: id, name: name, directory: directory)
            let layout = layout(directory)
            for part in [layout.points, layout.documents, layout.disks, layout.locks, layout.marks] {
                try makeDirectories(part)
            }
            try write(machine)
            return machine
        }
        throw BlockError(.invalid, "making a directory for the machine \(name): all names are taken")
    }

    private func write(_ machine: RepositoryMachine) throws(BlockError) {
        let file = layout(machine.directory).identity
        try writeDurably(file, try readableJSON(Identity(id: machine.id, name: machine.name), file))
    }

    func layout(_ directory: String) -> MachineLayout { MachineLayout(path: "\(path)/vms/\(directory)") }
    func layout(_ machine: RepositoryMachine) -> MachineLayout { layout(machine.directory) }

    // MARK: Points

    /// The machine's points, in the order they were made.
    ///
    /// - Throws: `BlockError` when a manifest cannot be read: nothing may be built on what is not known.
    public func points(of machine: RepositoryMachine) throws(BlockError) -> [RestorePoint] {
        var points: [RestorePoint] = []
        for name in try manifestNames(of: machine) {
            points.append(try point(inManifest: "\(layout(machine).points)/\(name)", of: machine))
        }
        return points.sorted { $0.sequence < $1.sequence }
    }

    /// The machine's points whose manifests can be read, in the order they were made; the others with a warning.
    func readablePoints(of machine: RepositoryMachine) throws(BlockError) -> [RestorePoint] {
        var points: [RestorePoint] = []
        for name in try manifestNames(of: machine) {
            do throws(BlockError) {
                points.append(try point(inManifest: "\(layout(machine).points)/\(name)", of: machine))
            } catch { warn("a point of \(machine.name) is left out: \(error.message)") }
        }
        return points.sorted { $0.sequence < $1.sequence }
    }

    /// Names of the files with manifests, in order.
    func manifestNames(of machine: RepositoryMachine) throws(BlockError) -> [String] {
        try namesIfThere(layout(machine).points).filter { $0.hasSuffix(".json") && Backup.sequence(ofName: $0) != nil }
    }

    func point(inManifest path: String, of machine: RepositoryMachine) throws(BlockError) -> RestorePoint {
        let manifest = try PointManifest.read(path)
        return RestorePoint(manifest: manifest, machine: machine, path: path)
    }

    /// The point that a user means.
    ///
    /// - Parameter text: `latest`, a sequence number, the beginning of a UUID, or a time in UTC: 2026-11-21,
    ///   2026-11-21T04:20, 2026-11-21T04:20:00Z, which means the last point made that is not later.
    /// - Throws: `.notFound`, or `.invalid` when several UUIDs begin so.
    public func find(_ text: String, of machine: RepositoryMachine) throws(BlockError) -> RestorePoint {
        let points = try readablePoints(of: machine)
        let place = "looking for the point \(text) of \(machine.name)"
        guard let latest = points.last else { throw BlockError(.notFound, "\(place): it has no points") }
        if text == "latest" { return latest }
        if let number = Int(text), let point = points.first(where: { $0.sequence == number }) { return point }
        if let time = UTCTime(text) {
            if let point = points.last(where: { $0.time <= time }) { return point }
            throw BlockError(.notFound, "\(place): all its points are later, the first one is of \(points[0].time)")
        }
        let prefix = text.lowercased()
        let found = prefix.count < 4 ? [] : points.filter { $0.uuid.hasPrefix(prefix) }
        if found.count > 1 { throw BlockError(.invalid, "\(place): several begin so; give more of the UUID") }
        guard let point = found.first else {
            throw BlockError(
                .notFound,
                "\(place): it has no such point; give latest, a number (\(points[0].sequence) to \(latest.sequence)), "
                    + "the beginning of a UUID, or a time in UTC (see diskgate points)")
        }
        return point
    }

    /// The point that a run has made, if its manifest is durable.
    ///
    /// - Throws: `BlockError` when manifests cannot be read.
    public func point(ofRun run: String, machine: RepositoryMachine) throws(BlockError) -> RestorePoint? {
        // What was renamed before a crash may not be in the directory on disk yet.
        if access(layout(machine).points, F_OK) == 0 { try syncDirectory(layout(machine).points) }
        return try points(of: machine).last { $0.manifest.run == run }
    }

    // MARK: Locks and space

    /// Locks a machine for a run or for pruning, in a directory that is made where there is none.
    ///
    /// - Parameter wait: whether to wait for whoever has it.
    /// - Throws: `.denied` when another run or pruning of the machine is going on.
    public func lockMachine(_ machine: RepositoryMachine, wait: Bool = false) throws(BlockError) -> FileLock {
        let path = layout(machine).machineLock
        try makeDirectories(layout(machine).locks)
        if let lock = try FileLock.take(path, wait: wait) { return lock }
        throw BlockError(
            .denied,
            "locking \(machine.name) in the repository \(self.path): a backup or pruning of it is going on; try again "
                + "when it has ended")
    }

    /// Keeps a point from being removed for as long as the lock is held.
    ///
    /// - Returns: nil where the repository can only be read, so that nobody can remove anything by this path either.
    /// - Throws: `.denied` when it is being removed.
    public func lockPoint(_ point: RestorePoint) throws(BlockError) -> FileLock? {
        let lock: FileLock?
        do throws(BlockError) {
            lock = try FileLock.take(layout(point.machine).pointLock(point.sequence), .shared)
        } catch {
            if error.kind == .readOnly { return nil }
            throw error
        }
        guard let lock, access(point.path, F_OK) == 0 else {
            throw BlockError(.denied, "opening \(point.description): it is being removed")
        }
        return lock
    }

    /// Keeps files from getting other names while a chain is opened or verified.
    ///
    /// Whoever reads holds it for moments; whoever removes waits for those, and not for ever.
    ///
    /// - Returns: nil where the repository can only be read.
    /// - Throws: `.denied` when others hold it for ten minutes.
    func lockNames(of machine: RepositoryMachine, _ kind: FileLock.Kind = .shared) throws(BlockError) -> FileLock? {
        do throws(BlockError) {
            let path = layout(machine).namesLock
            if kind == .shared { return try FileLock.take(path, kind, wait: true) }
            for attempt in 0..<3000 {
                if let lock = try FileLock.take(path, kind) { return lock }
                if attempt == 10 { warn("waiting for those who are opening points of \(machine.name)") }
                usleep(200_000)
            }
            throw BlockError(
                .denied,
                "locking the names of \(machine.name) (\(path)): others hold them for ten minutes; try again later")
        } catch {
            if kind == .shared && error.kind == .readOnly { return nil }
            throw error
        }
    }

    /// Bytes that can still be written.
    ///
    /// - Throws: `BlockError` when the file system cannot be asked.
    public func freeSpace() throws(BlockError) -> UInt64 {
        var status = statvfs()
        if statvfs(path, &status) < 0 { throw BlockError(errno: errno, "asking for free space in \(path)") }
        return UInt64(status.f_bavail).multipliedReportingOverflow(by: UInt64(status.f_frsize)).partialValue
    }

    /// Looks whether there is space, before a run starts that needs it.
    ///
    /// - Parameter needed: bytes of data that may have to be stored.
    /// - Throws: `.noSpace` when there is less, tables and hashes included.
    public func checkSpace(_ needed: UInt64) throws(BlockError) {
        // One table entry of 8, one refcount of 2 and one hash of 16 bytes for 64 KiB; and something to breathe.
        let (sum, overflow) = needed.addingReportingOverflow(needed / 2048 + (16 << 20))
        let free = try freeSpace()
        if overflow || free < sum {
            throw BlockError(
                .noSpace,
                "looking for space in the repository \(path): \(needed >> 20) MiB may be needed and \(free >> 20) MiB "
                    + "are free; remove points (diskgate prune), or give it more space")
        }
    }

    // MARK: Marks

    /// What was said of a point since it was made.
    ///
    /// - Throws: `BlockError` when the marks cannot be read.
    public func marks(of point: RestorePoint) throws(BlockError) -> [PointMark] {
        var marks: [PointMark] = []
        for kind in PointMark.Kind.allCases {
            let file = layout(point.machine).mark(point.sequence, kind)
            if access(file, F_OK) == 0 { marks.append(try readJSON(PointMark.self, from: file)) }
        }
        return marks
    }

    /// Says something of a point, durably.
    ///
    /// - Throws: `.denied` when it is being removed, or `BlockError` when that cannot be written.
    public func mark(_ point: RestorePoint, _ kind: PointMark.Kind, reason: String) throws(BlockError) {
        let lock = try lockPoint(point)
        defer { withExtendedLifetime(lock) {} }
        let file = layout(point.machine).mark(point.sequence, kind)
        try makeDirectories(directoryName(file))
        try writeDurably(file, try readableJSON(PointMark(kind: kind, reason: reason, since: .now), file))
    }

    /// Takes back what was said of a point. Nothing happens where it was not said.
    ///
    /// - Throws: `BlockError` when that cannot be written.
    public func unmark(_ point: RestorePoint, _ kind: PointMark.Kind) throws(BlockError) {
        try removeDurably(layout(point.machine).mark(point.sequence, kind))
    }
}

/// Names in a directory; none where there is no directory.
func namesIfThere(_ path: String) throws(BlockError) -> [String] {
    if access(path, F_OK) < 0 && errno == ENOENT { return [] }
    return try namesInDirectory(path)
}

/// Removes a file, durably. One that is not there is as good as removed.
func removeDurably(_ path: String) throws(BlockError) {
    if unlink(path) < 0 {
        if errno == ENOENT { return }
        throw BlockError(errno: errno, "removing \(path)")
    }
    try syncDirectory(directoryName(path))
}
