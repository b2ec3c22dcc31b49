// Checkpoints of a disk: what has changed since each of them, over restarts, crashes and changes by others.
import Block
import Glibc
import LinuxIO
import Support
import Testing
import Transports

private let size = 24 << 20

/// A disk file with a directory for its checkpoints.
private struct Bench {
    let directory: TemporaryDirectory
    let path: String
    let space: SpaceGuard

    init(_ directory: TemporaryDirectory) throws {
        self.directory = directory
        path = try directory.makeFile("disk.raw", patternBytes(size, seed: 1))
        space = try SpaceGuard(directory.path, reserve: 0)
    }

    var checkpoints: String { directory.file("checkpoints") }

    func open(_ log: Locked<[String]> = Locked([])) throws -> CheckpointedDisk {
        var options = RawOptions()
        options.isWritable = true
        let file = try Descriptor.open(path, O_RDONLY)
        return try CheckpointedDisk(
            try RawFileDevice.open(path, options), file: file, path: path, part: "", directory: checkpoints
        ) { text in log.withLock { $0.append(text) } }
    }

    func snapshot(_ disk: CheckpointedDisk, _ name: String?) throws -> CheckpointSnapshot {
        try disk.makeSnapshot(checkpoint: name, space: space) { _ in }
    }

    /// The name of the disk's folder.
    func folderName() throws -> String {
        try #require(namesInDirectory(checkpoints).first { !$0.hasSuffix(".lock") })
    }

    /// The checkpoint files, as a crash would leave them.
    func copyState(to name: String) throws { try run("cp", "-a", checkpoints, directory.file(name)) }

    func takeState(from name: String) throws {
        try run("rm", "-rf", checkpoints)
        try run("cp", "-a", directory.file(name), checkpoints)
    }
}

/// Runs a program that must succeed.
private func run(_ name: String, _ arguments: String...) throws { _ = try Tool.output(name, arguments) }

private func write(_ disk: CheckpointedDisk, chunk: Int, _ byte: UInt8 = 9) throws {
    try [UInt8](repeating: byte, count: 100).withUnsafeBytes {
        try disk.device.write($0, at: UInt64(chunk * 65536 + 77), durable: false)
    }
}

/// The chunks that a bitmap of a snapshot has, by the checkpoint's name.
private func chunks(_ snapshot: CheckpointSnapshot, since name: String) throws -> [Int] {
    let index = try #require(snapshot.device.info.dirtyBitmaps.firstIndex(of: name))
    let found = try status(snapshot.device, .dirtyBitmap(index), of: 0..<UInt64(size), capacity: 10000)
    var chunks: [Int] = []
    var position: UInt64 = 0
    for extent in found.extents {
        if extent.value != 0 { chunks += Int(position / 65536)..<Int((position + extent.length) / 65536) }
        position += extent.length
    }
    return chunks
}

@Suite struct CheckpointTests {
    @Test func `each snapshot tells what has changed since every older checkpoint`() throws {
        try withTemporaryDirectory { directory in
            let bench = try Bench(directory)
            let disk = try bench.open()
            try write(disk, chunk: 3)
            let one = try bench.snapshot(disk, "one")
            #expect(one.increments.isEmpty && one.device.info.dirtyBitmaps.isEmpty)
            try write(disk, chunk: 7)
            let two = try bench.snapshot(disk, "two")
            try write(disk, chunk: 200)
            try write(disk, chunk: 7)
            let three = try bench.snapshot(disk, "three")
            try write(disk, chunk: 300)
            #expect(try chunks(two, since: "one") == [7])
            #expect(try chunks(three, since: "one") == [7, 200])
            #expect(try chunks(three, since: "two") == [7, 200])
            #expect(try disk.checkpoints().map(\.changedBytes) == [3 * 65536, 3 * 65536, 65536])
            #expect(throws: BlockError.self) { try bench.snapshot(disk, "two") }
            #expect(throws: BlockError.self) { try bench.snapshot(disk, "../two") }
            #expect(try bench.snapshot(disk, nil).checkpoint != bench.snapshot(disk, nil).checkpoint)
            try disk.close()
        }
    }

    @Test func `a checkpoint that was closed goes on after a restart`() throws {
        try withTemporaryDirectory { directory in
            let bench = try Bench(directory)
            var disk: CheckpointedDisk? = try bench.open()
            _ = try bench.snapshot(try #require(disk), "one")
            try write(try #require(disk), chunk: 5)
            try disk?.close()
            #expect(throws: BlockError.self) { try write(#require(disk), chunk: 5) }
            #expect(throws: BlockError.self, "one user at a time") { _ = try bench.open() }
            disk = nil
            let log = Locked<[String]>([])
            // Opened and not changed: as good as closed, even when it is not.
            disk = try bench.open(log)
            disk = nil
            disk = try bench.open(log)
            try write(try #require(disk), chunk: 6)
            let two = try bench.snapshot(try #require(disk), "two")
            #expect(try chunks(two, since: "one") == [5, 6])
            #expect(two.increments.map(\.allDirty) == [nil] && log.withLock { $0.isEmpty })
            try disk?.close()
        }
    }

    @Test func `after a crash everything counts as changed, once`() throws {
        try withTemporaryDirectory { directory in
            let bench = try Bench(directory)
            var disk: CheckpointedDisk? = try bench.open()
            _ = try bench.snapshot(try #require(disk), "one")
            try write(try #require(disk), chunk: 5)
            try bench.copyState(to: "crashed")
            try disk?.close()
            disk = nil
            try bench.takeState(from: "crashed")
            let log = Locked<[String]>([])
            disk = try bench.open(log)
            #expect(log.withLock { $0.count == 1 && $0[0].contains("was not closed") })
            let two = try bench.snapshot(try #require(disk), "two")
            #expect(two.increments[0].allDirty != nil && two.increments[0].changedBytes == UInt64(size))
            try write(try #require(disk), chunk: 8)
            let three = try bench.snapshot(try #require(disk), "three")
            #expect(three.increments.map { $0.allDirty == nil } == [false, true])
            #expect(try chunks(three, since: "two") == [8])
            try disk?.close()
        }
    }

    @Test(arguments: ["touched", "written", "replaced", "longer"])
    func `a disk that others have changed counts as changed`(how: String) throws {
        try withTemporaryDirectory { directory in
            let bench = try Bench(directory)
            var disk: CheckpointedDisk? = try bench.open()
            _ = try bench.snapshot(try #require(disk), "one")
            try disk?.close()
            disk = nil
            switch how {
            case "touched": try run("touch", bench.path)
            case "replaced":
                try run("cp", "-p", bench.path, bench.path + ".new")
                try run("mv", bench.path + ".new", bench.path)
            case "longer": try run("truncate", "-s", "+64K", bench.path)
            default: try run("dd", "if=/dev/zero", "of=\(bench.path)", "bs=1", "count=1", "conv=notrunc")
            }
            let log = Locked<[String]>([])
            disk = try bench.open(log)
            let two = try bench.snapshot(try #require(disk), "two")
            #expect(two.increments[0].allDirty != nil, "\(how)")
            #expect(log.withLock { $0.count } == 1)
            #expect(two.increments[0].changedBytes == two.device.info.size)
            try disk?.close()
        }
    }

    @Test func `damaged and missing files count as changed`() throws {
        try withTemporaryDirectory { directory in
            let bench = try Bench(directory)
            var disk: CheckpointedDisk? = try bench.open()
            for name in ["one", "two", "three"] { _ = try bench.snapshot(try #require(disk), name) }
            try disk?.close()
            disk = nil
            let folder =
                "\(bench.checkpoints)/\(try bench.folderName())"
            try bench.copyState(to: "good")
            let damage: [(String, String)] = [
                ("one", "printf x | dd of=$F bs=1 seek=8200 conv=notrunc"),
                ("two", "printf x | dd of=$F bs=1 seek=30 conv=notrunc"), ("three", "truncate -s 100 $F"),
                ("three", "rm $F"), ("one", ": > $F"), ("two", "cp $D/one.cbt $F"),
            ]
            for (name, command) in damage {
                try bench.takeState(from: "good")
                let script = command.replacing("$F", with: "\(folder)/\(name).cbt").replacing("$D", with: folder)
                try run("sh", "-c", script)
                let log = Locked<[String]>([])
                disk = try bench.open(log)
                let four = try bench.snapshot(try #require(disk), "four")
                #expect(four.increments.map(\.name) == ["one", "two", "three"], "\(command)")
                #expect(four.increments.allSatisfy { $0.allDirty != nil }, "\(command)")
                #expect(log.withLock { $0.count == 1 && $0[0].contains(name) }, "\(command)")
                // The next start has no doubt any more.
                try disk?.close()
                disk = nil
                disk = try bench.open(log)
                #expect(log.withLock { $0.count } == 1, "\(command)")
                try disk?.close()
                disk = nil
            }
            try bench.takeState(from: "good")
            try run("sh", "-c", "echo nonsense > '\(folder)/chain'")
            try requireError(.corrupt, "a damaged chain") { _ = try bench.open() }
        }
    }

    @Test(arguments: [["one"], ["two"], ["three"], ["three", "two"], ["one", "two", "three"]])
    func `what a dropped checkpoint knows goes to the one before`(dropped: [String]) throws {
        try withTemporaryDirectory { directory in
            let bench = try Bench(directory)
            var disk: CheckpointedDisk? = try bench.open()
            for (index, name) in ["one", "two", "three"].enumerated() {
                _ = try bench.snapshot(try #require(disk), name)
                try write(try #require(disk), chunk: 10 + index)
            }
            for name in dropped { try disk?.drop(name) }
            try requireError(.notFound, "dropping it again") { try disk?.drop(dropped[0]) }
            try write(try #require(disk), chunk: 20)
            try disk?.close()
            disk = nil
            disk = try bench.open()
            let last = try bench.snapshot(try #require(disk), "last")
            let expected = ["one": [10, 11, 12, 20], "two": [11, 12, 20], "three": [12, 20]]
            #expect(last.increments.map(\.name) == ["one", "two", "three"].filter { !dropped.contains($0) })
            for increment in last.increments {
                #expect(increment.allDirty == nil)
                #expect(try chunks(last, since: increment.name) == expected[increment.name])
            }
            try disk?.close()
        }
    }

    @Test func `a bit is in the file before the change is done`() throws {
        try withTemporaryDirectory { directory in
            let bench = try Bench(directory)
            let disk = try bench.open()
            _ = try bench.snapshot(disk, "one")
            try write(disk, chunk: 70)
            let folder = try bench.folderName()
            let file = try contentOfFile("\(bench.checkpoints)/\(folder)/one.cbt")
            let bits = Array(file[8192...])
            #expect(bits[..<8].allSatisfy { $0 == 0 } && bits[8..<16].allSatisfy { $0 == 0xFF })
            #expect(bits[16...].allSatisfy { $0 == 0 })
            // Many writers at once: every one's region is there when it is done.
            try concurrently(
                (0..<4).map { writer in
                    { @Sendable () throws in
                        for chunk in stride(from: writer * 64 + 5, to: 384, by: 256) {
                            try write(disk, chunk: chunk)
                            let now = try contentOfFile("\(bench.checkpoints)/\(folder)/one.cbt")
                            try require(now[8192 + chunk / 8] == 0xFF, "chunk \(chunk) is not stored")
                        }
                    }
                })
            try disk.close()
            let closed = try contentOfFile("\(bench.checkpoints)/\(folder)/one.cbt")
            #expect(closed[8192...].reduce(0) { $0 + $1.nonzeroBitCount } == 7)
        }
    }

    @Test func `a checkpoint needs a name, room, and a disk that can be told apart`() throws {
        try withTemporaryDirectory { directory in
            let bench = try Bench(directory)
            let disk = try bench.open()
            let full = try SpaceGuard(directory.path, reserve: .max)
            try requireError(.noSpace, "a snapshot without room") {
                _ = try disk.makeSnapshot(checkpoint: "one", space: full) { _ in }
            }
            #expect(try disk.checkpoints().isEmpty)
            var specification = DiskSpecification(try SourceReference("memory:1M"))
            specification.access = .writable
            try requireError(.unsupported, "checkpoints of memory") {
                _ = try specification.openCheckpointed(in: bench.checkpoints) { _ in }
            }
            try disk.close()
        }
    }

    @Test func `a disk that another file has replaced while it was served is not trusted`() throws {
        try withTemporaryDirectory { directory in
            let bench = try Bench(directory)
            var disk: CheckpointedDisk? = try bench.open()
            _ = try bench.snapshot(try #require(disk), "one")
            try write(try #require(disk), chunk: 5)
            _ = try directory.makeFile("other.raw", patternBytes(size, seed: 2))
            try run("mv", directory.file("other.raw"), bench.path)
            try requireError(.invalid, "closing") { try disk?.close() }
            disk = nil
            let log = Locked<[String]>([])
            disk = try bench.open(log)
            let two = try bench.snapshot(try #require(disk), "two")
            #expect(two.increments.map { $0.allDirty != nil } == [true])
            #expect(log.withLock { $0.count } == 1)
            try disk?.close()
        }
    }

    @Test(arguments: [["one"], ["one", "two"]])
    func `a checkpoint that could not be dropped goes on recording`(names: [String]) throws {
        try withTemporaryDirectory { directory in
            let bench = try Bench(directory)
            var disk: CheckpointedDisk? = try bench.open()
            for (index, name) in names.enumerated() {
                _ = try bench.snapshot(try #require(disk), name)
                try write(try #require(disk), chunk: 10 + index)
            }
            // A directory in its place cannot be replaced by a file, whoever tries.
            let chain = "\(bench.checkpoints)/\(try bench.folderName())/chain"
            try run("mv", chain, directory.file("chain"))
            try run("mkdir", "-p", "\(chain)/full")
            #expect(throws: BlockError.self) { try disk?.drop(try #require(names.last)) }
            try run("rm", "-r", chain)
            try run("mv", directory.file("chain"), chain)
            try write(try #require(disk), chunk: 20)
            try disk?.close()
            disk = nil
            disk = try bench.open()
            let last = try bench.snapshot(try #require(disk), "last")
            #expect(last.increments.map(\.name) == names)
            for (index, name) in names.enumerated() {
                #expect(try chunks(last, since: name) == (index..<names.count).map { 10 + $0 } + [20])
            }
            try disk?.close()
        }
    }

    @Test(.enabled(if: SmallFileSystem.isAvailable))
    func `a file that cannot say that somebody records does not stay closed`() throws {
        try withTemporaryDirectory { directory in
            try SmallFileSystem.with { small in
                let bench = try Bench(directory)
                try run("ln", "-s", small.path, bench.checkpoints)
                var disk: CheckpointedDisk? = try bench.open()
                _ = try bench.snapshot(try #require(disk), "one")
                try disk?.close()
                disk = nil
                let log = Locked<[String]>([])
                disk = try bench.open(log)
                let file = "\(bench.checkpoints)/\(try bench.folderName())/one.cbt"
                // Until nothing more goes in; dd fails then.
                _ = try Tool.run("dd", ["if=/dev/zero", "of=\(small.file("fill"))", "bs=4096"])
                try write(try #require(disk), chunk: 5)
                #expect(access(file, F_OK) < 0 && log.withLock { $0.count } == 1)
                try run("rm", small.file("fill"))
                try write(try #require(disk), chunk: 300)
                let two = try bench.snapshot(try #require(disk), "two")
                #expect(try chunks(two, since: "one") == [5, 300])
                try disk?.close()
            }
        }
    }
}
