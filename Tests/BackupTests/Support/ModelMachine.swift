// A machine in memory whose disks change at random: what points of it have to read as is known.
import Backup
import Block
import Glibc
import Hypervisors
import LinuxIO
import Support

/// A disk in memory, with the chunks that have changed since the last point.
struct ModelDisk {
    static let chunkSize = 65536

    let id: String
    var bytes: [UInt8]
    var changed: Set<Int>

    init(_ id: String, size: Int) {
        self.id = id
        bytes = [UInt8](repeating: 0, count: size)
        changed = []
    }

    /// Writes random bytes, or zeros, at a random place, chunk borders or not.
    mutating func change(_ generator: inout SeededGenerator) {
        let start = Int(generator.next() % UInt64(bytes.count))
        let count = min(1 + Int(generator.next() % 200_000), bytes.count - start)
        if generator.next() % 3 == 0 {
            for index in start..<(start + count) { bytes[index] = 0 }
        } else {
            let fresh = patternBytes(count, seed: generator.next())
            bytes.replaceSubrange(start..<(start + count), with: fresh)
        }
        for chunk in start / Self.chunkSize...(start + count - 1) / Self.chunkSize { changed.insert(chunk) }
    }

    /// Makes the disk longer.
    mutating func grow(to size: Int) {
        // What a copier would copy: the chunks behind the old end.
        let old = bytes.count
        bytes += [UInt8](repeating: 0, count: size - old)
        for chunk in (old + Self.chunkSize - 1) / Self.chunkSize..<(size + Self.chunkSize - 1) / Self.chunkSize {
            changed.insert(chunk)
        }
    }

    /// Gives a target all chunks, or those that changed.
    func copy(to target: any CopyTarget, isIncremental: Bool) throws {
        for start in stride(from: 0, to: bytes.count, by: Self.chunkSize) {
            let end = min(start + Self.chunkSize, bytes.count)
            let isZero = areZeros(bytes[start..<end])
            if isIncremental ? !changed.contains(start / Self.chunkSize) : isZero { continue }
            if isZero {
                try target.zero(UInt64(start)..<UInt64(end))
            } else {
                try bytes.withUnsafeBytes {
                    try target.write(UnsafeRawBufferPointer(rebasing: $0[start..<end]), at: UInt64(start))
                }
            }
        }
    }
}

/// A machine whose points are made in a repository.
struct ModelMachine {
    private(set) var repository: Repository
    let machine: RepositoryMachine
    var disks: [ModelDisk]
    var generator: SeededGenerator
    /// What each point has to read as: sequence, then disk.
    var expected: [Int: [String: [UInt8]]] = [:]
    var runs = 0
    /// Seconds since 1970 of the next point.
    var time = 1_763_700_000.0

    init(_ repository: Repository, disks: [ModelDisk], seed: UInt64, id: String = "id-1", name: String = "web") throws {
        self.repository = repository
        self.disks = disks
        machine = try repository.enroll(id: id, name: name)
        generator = SeededGenerator(seed: seed)
    }

    mutating func change(_ times: Int) {
        for _ in 0..<times {
            let index = Int(generator.next() % UInt64(disks.count))
            disks[index].change(&generator)
        }
    }

    /// Begins a point on top of the newest one.
    mutating func begin(full: Bool = false, holding lock: FileLock) throws -> PointWriter {
        let parent = full ? nil : try repository.points(of: machine).last
        runs += 1
        return try repository.begin(
            PointRequest(
                machine: machine, parent: parent,
                disks: disks.map {
                    .init(
                        id: $0.id, size: UInt64($0.bytes.count), isIncremental: parent?.manifest.disk($0.id) != nil)
                }, run: "run-\(runs)", ledger: nil), holding: lock)
    }

    /// Makes a point.
    @discardableResult
    mutating func makePoint(full: Bool = false, _ edit: (inout PointFacts) -> Void = { _ in }) throws -> RestorePoint {
        let lock = try repository.lockMachine(machine)
        defer { withExtendedLifetime(lock) {} }
        let writer = try begin(full: full, holding: lock)
        let parent = full ? nil : try repository.points(of: machine).last
        for disk in disks {
            try disk.copy(
                to: try writer.target(forDisk: disk.id), isIncremental: parent?.manifest.disk(disk.id) != nil)
        }
        var facts = PointFacts(time: time, consistency: .crashConsistent, tool: "test")
        edit(&facts)
        let point = try writer.seal(facts)
        sealed(point)
        return point
    }

    mutating func sealed(_ point: RestorePoint) {
        time += 86400
        expected[point.sequence] = Dictionary(uniqueKeysWithValues: disks.map { ($0.id, $0.bytes) })
        for index in disks.indices { disks[index].changed = [] }
    }

    /// Throws unless every point that is there reads as it has to, and nothing is wrong in the repository.
    func requireEqualPoints(_ what: String) throws {
        for point in try repository.points(of: machine) {
            for disk in point.manifest.disks {
                let device = try repository.open(point, disk: disk.id)
                var found = [UInt8](repeating: 0xEE, count: Int(device.info.size))
                try found.withUnsafeMutableBytes { try device.read(into: $0, at: 0) }
                try requireEqual(
                    found, expected[point.sequence]?[disk.id] ?? [], "\(what): \(point.description) \(disk.id)")
            }
        }
        let report = try repository.verify(machine)
        try require(report.problems.isEmpty, "\(what): \(report.problems)")
    }

    func prune(keepLast: Int) throws -> [PruneDecision] {
        var rule = RetentionRule()
        rule.last = keepLast
        let lock = try repository.lockMachine(machine)
        return try repository.prune(machine, keeping: rule, holding: lock)
    }

    /// The same machine with a copy of its repository.
    func copied(to path: String) throws -> ModelMachine {
        _ = try Tool.output("cp", ["-a", repository.path, path])
        var copy = self
        copy.repository = try Repository.open(at: path)
        return copy
    }

    /// The path of a disk's file at a point.
    func data(_ point: RestorePoint, _ disk: String) throws -> String {
        guard let entry = point.manifest.disk(disk) else { throw CheckFailure("no disk \(disk)") }
        return "\(repository.path)/vms/\(machine.directory)/disks/\(entry.directory)/\(entry.file)"
    }
}
