// Looks whether restore points are what they were when they were made: manifests, lineage, files, every hash.
public import Block
import FoundationEssentials
import Glibc
import LinuxIO

/// Something that is wrong in a repository.
public struct VerificationProblem: Codable, Sendable {
    /// The machine's name.
    public var machine: String
    /// The point's number, where it concerns one.
    public var point: Int?
    /// The disk's id, where it concerns one.
    public var disk: String?
    /// The file, where it is one file.
    public var file: String?
    /// The chunk's offset on the disk, in bytes, where it is one chunk.
    public var offset: UInt64?
    /// What is wrong.
    public var problem: String
}

/// What a verification has found.
public struct VerificationReport: Codable, Sendable {
    /// Points that were looked at.
    public var points = 0
    /// Bytes whose hashes were compared.
    public var bytes: UInt64 = 0
    /// What is wrong; empty when all is well.
    public var problems: [VerificationProblem] = []
    /// What is worth knowing and not wrong: suspect points, files of interrupted runs, points being removed.
    public var notes: [String] = []
}

/// A verification of points of one machine.
struct Verification {
    /// Problems of one disk that are listed one by one.
    static let problemsPerDiskMax = 100

    let repository: Repository
    let machine: RepositoryMachine
    let progress: (UInt64) -> Void
    private(set) var report = VerificationReport()
    private let layout: MachineLayout

    init(_ repository: Repository, _ machine: RepositoryMachine, progress: @escaping (UInt64) -> Void) {
        self.repository = repository
        self.machine = machine
        self.progress = progress
        layout = repository.layout(machine)
    }

    /// Verifies all points, or one with everything it needs.
    mutating func run(only: RestorePoint?) throws(BlockError) {
        let points = try readPoints()
        let chosen = only.map { only in points.filter { $0.uuid == only.uuid } } ?? points
        for point in chosen { try verify(point, among: points, isOnly: only != nil) }
        if only == nil { try noteLeftovers(points) }
    }

    private mutating func readPoints() throws(BlockError) -> [RestorePoint] {
        // No file changes its name meanwhile.
        let names = try repository.lockNames(of: machine)
        defer { withExtendedLifetime(names) {} }
        var points: [RestorePoint] = []
        for name in try repository.manifestNames(of: machine) {
            let path = "\(layout.points)/\(name)"
            do throws(BlockError) {
                let point = try repository.point(inManifest: path, of: machine)
                if sequence(ofName: name) != point.sequence {
                    add("its name has another number than its content, \(point.sequence)", file: path)
                }
                points.append(point)
            } catch { add(error.message, point: sequence(ofName: name), file: path) }
        }
        points.sort { $0.sequence < $1.sequence }
        for (one, next) in zip(points, points.dropFirst()) where one.sequence == next.sequence {
            add("two points have this number", point: one.sequence, file: next.path)
        }
        return points
    }

    private mutating func add(
        _ problem: String, point: Int? = nil, disk: String? = nil, file: String? = nil, offset: UInt64? = nil
    ) {
        report.problems.append(
            VerificationProblem(
                machine: machine.name, point: point, disk: disk, file: file, offset: offset, problem: problem))
    }

    private mutating func verify(_ point: RestorePoint, among points: [RestorePoint], isOnly: Bool) throws(BlockError) {
        report.points += 1
        let lock: FileLock?
        do throws(BlockError) { lock = try repository.lockPoint(point) } catch {
            if error.kind != .denied { throw error }
            report.notes.append("\(point.description) is being removed")
            return
        }
        defer { withExtendedLifetime(lock) {} }
        for mark in try repository.marks(of: point) where mark.kind == .suspect {
            report.notes.append("\(point.description) is suspect since \(mark.since): \(mark.reason)")
        }
        try verifyManifest(point, among: points)
        for document in point.manifest.documents {
            verifyFile(layout.document(document.content.file), document.content, point)
        }
        for disk in point.manifest.disks {
            do throws(BlockError) {
                try verifyDisk(disk.id, of: point, isOnly: isOnly)
            } catch { add(error.message, point: point.sequence, disk: disk.id) }
        }
    }

    private mutating func verifyManifest(_ point: RestorePoint, among points: [RestorePoint]) throws(BlockError) {
        let manifest = point.manifest
        for damage in try manifest.damages() { add(damage, point: point.sequence, file: point.path) }
        if manifest.machine.id != machine.id {
            add("it is a point of another machine, \(manifest.machine.name)", point: point.sequence, file: point.path)
        }
        guard let parent = manifest.parent else { return }
        if let above = points.first(where: { $0.uuid == parent.uuid }) {
            if above.manifest.root != parent.root {
                add(
                    "it was made on top of point \(above.sequence) when that had another root", point: point.sequence,
                    file: point.path)
            }
        } else if let other = points.first(where: { $0.sequence == parent.sequence }) {
            add(
                "it was made on top of point \(parent.sequence) with the UUID \(parent.uuid), which is now another "
                    + "one, \(other.uuid)", point: point.sequence, file: point.path)
        } else if !points.contains(where: { $0.manifest.merged.contains { $0.uuid == parent.uuid } }) {
            report.notes.append(
                "\(point.description) was made on top of point \(parent.sequence), which is gone: its root cannot be "
                    + "compared")
        }
    }

    /// Compares a file with what the manifest says of it.
    @discardableResult
    private mutating func verifyFile(
        _ path: String, _ expected: PointManifest.File, _ point: RestorePoint, disk: String? = nil
    ) -> Bool {
        do throws(BlockError) {
            let found = try sha256(ofFile: path)
            if found == (expected.sha256, expected.bytes) { return true }
            add(
                "the file is not the one that the manifest names (SHA-256)", point: point.sequence, disk: disk,
                file: path)
        } catch { add(error.message, point: point.sequence, disk: disk, file: path) }
        return false
    }

    // MARK: Data

    private mutating func verifyDisk(_ id: String, of point: RestorePoint, isOnly: Bool) throws(BlockError) {
        guard let (device, links, chain) = try openDisk(id, of: point, isOnly: isOnly) else { return }
        let check = DiskCheck(device: device, chain: chain, isWhole: isOnly || repository.driver == .reflink)
        let (bytes, findings, count) = try check.run(progress)
        report.bytes += bytes
        for finding in findings {
            add(
                finding.problem, point: point.sequence, disk: id,
                file: finding.link?.data ?? links[0].data, offset: finding.offset)
        }
        if count > findings.count {
            add("\(count - findings.count) more chunks are wrong", point: point.sequence, disk: id)
        }
    }

    /// Opens a disk with its hashes, while no file changes its name; afterwards what is open stays what it is.
    private mutating func openDisk(_ id: String, of point: RestorePoint, isOnly: Bool) throws(BlockError)
        -> (any BlockDevice, [ChainLink], HashChain)?
    {
        let names = try repository.lockNames(of: machine)
        defer { withExtendedLifetime(names) {} }
        // It may have been written anew while an earlier point was removed.
        let point = try repository.point(inManifest: point.path, of: machine)
        guard let disk = point.manifest.disk(id) else { return nil }
        guard verifyFile(layout.hashes(disk.directory, disk.hashes.file), disk.hashes, point, disk: id) else {
            return nil
        }
        let links = try repository.chain(of: id, at: point)
        if isOnly {
            // Of all points together each is looked at for itself.
            for link in links.dropFirst() {
                let below = RestorePoint(manifest: link.manifest, machine: machine, path: "")
                for damage in try link.manifest.damages() { add(damage, point: below.sequence, disk: id) }
                guard verifyFile(link.hashes, link.disk.hashes, below, disk: id) else { return nil }
            }
        }
        if repository.driver == .qcow2 { try verifyHeader(links, of: point) }
        return (try repository.open(point, disk: id), links, try HashChain(links))
    }

    /// Looks whether an image is backed by what the manifest says.
    private mutating func verifyHeader(_ links: [ChainLink], of point: RestorePoint) throws(BlockError) {
        guard let own = links.first, let path = own.data else { return }
        // A doomed point's file that is gone has become this point's.
        var expected = own.disk.base.map { dataName($0, .qcow2) }
        for link in links.dropFirst() {
            if !link.isDoomed || link.data != nil { break }
            expected = link.disk.base.map { dataName($0, .qcow2) }
        }
        let header = try BackingName.read(from: path)
        if header != expected {
            add(
                "the image is backed by \(header ?? "nothing"), not by \(expected ?? "nothing")", point: point.sequence,
                disk: own.disk.id, file: path)
        }
    }

    /// Files that belong to no point are told of; they do no harm.
    private mutating func noteLeftovers(_ points: [RestorePoint]) throws(BlockError) {
        let doomed = try repository.doomed(of: machine)
        for point in doomed {
            report.notes.append("removing \(point.description) was interrupted; diskgate prune or doctor finishes it")
        }
        let known = Set((points + doomed).map(\.sequence))
        var directories = [layout.documents, layout.points]
        for name in try namesIfThere(layout.disks) { directories.append(layout.disk(name)) }
        for directory in directories {
            for name in try namesIfThere(directory) {
                guard let number = sequence(ofName: name) else { continue }
                if known.contains(number) && !name.hasSuffix(".partial") { continue }
                if directory == layout.points && name.hasSuffix(".json") { continue }
                report.notes.append("\(directory)/\(name) belongs to no point: a run is going on, or was interrupted")
            }
        }
    }
}

extension Repository {
    /// Verifies points: manifests, lineage, sidecars, backing links, and every hash against the data as it is read
    /// through the chain. Of all points together, each chunk is read once, where it is stored; of one point alone, all
    /// that it reads as is.
    ///
    /// - Parameters:
    ///   - machine: nil for all machines.
    ///   - point: nil for all points.
    ///   - progress: gets the bytes done with each step.
    /// - Throws: `BlockError` when the repository itself cannot be read; what is wrong in it is in the report.
    public func verify(
        _ machine: RepositoryMachine?, point: RestorePoint? = nil, progress: @escaping (UInt64) -> Void = { _ in }
    ) throws(BlockError) -> VerificationReport {
        var report = VerificationReport()
        for unreadable in machine == nil ? try unreadableMachines() : [] {
            report.problems.append(
                VerificationProblem(machine: unreadable.directory, problem: unreadable.reason))
        }
        for machine in try chosen(machine) {
            do throws(BlockError) { report.notes += try finishInterruptedRemovals(of: machine) } catch {
                report.problems.append(
                    VerificationProblem(
                        machine: machine.name, problem: "an interrupted removal cannot be finished: \(error.message)"))
            }
            var verification = Verification(self, machine, progress: progress)
            try verification.run(only: point)
            report.points += verification.report.points
            report.bytes += verification.report.bytes
            report.problems += verification.report.problems
            report.notes += verification.report.notes
        }
        return report
    }

    /// Finishes removals of points that a crash has interrupted, where nobody works on the machine.
    ///
    /// - Returns: what was done, for people.
    /// - Throws: `BlockError` when a removal cannot be finished.
    public func finishInterruptedRemovals(of machine: RepositoryMachine) throws(BlockError) -> [String] {
        guard try hasUnfinishedRemovals(of: machine) else { return [] }
        do throws(BlockError) {
            let lock = try lockMachine(machine)
            defer { withExtendedLifetime(lock) {} }
            return try finishRemovals(of: machine, holding: lock).map {
                "the removal of \($0.description), which was interrupted, is finished"
            }
        } catch {
            // Whoever has the lock is at it; in a repository that can only be read it stays begun.
            if error.kind == .denied || error.kind == .readOnly { return [] }
            throw error
        }
    }
}
