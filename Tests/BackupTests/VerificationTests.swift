// What verification and restore find: each kind of damage, planted and named.
import Backup
import Block
import Glibc
import Hypervisors
import LinuxIO
import Support
import Testing

@Suite struct VerificationTests {
    private func withPoints(_ body: (inout ModelMachine) throws -> Void) throws {
        try withTemporaryDirectory { directory in
            let repository = try Repository.create(at: directory.file("repository"))
            var model = try ModelMachine(
                repository, disks: [ModelDisk("vda", size: 2_000_000), ModelDisk("vdb", size: 500_000)], seed: 11)
            for _ in 0..<3 {
                model.change(5)
                // Something that every point holds of the first disk.
                model.disks[0].bytes.replaceSubrange(
                    70_000..<75_000, with: patternBytes(5000, seed: model.generator.next()))
                model.disks[0].changed.insert(1)
                try model.makePoint { $0.documents = [.init(name: "domain.xml", content: Array("<domain/>".utf8))] }
            }
            try require(try repository.verify(nil).problems.isEmpty, "before")
            try body(&model)
        }
    }

    /// Changes a byte of a file, which keeps its length.
    private func flip(_ path: String, at offset: Int) throws {
        let file = try Descriptor.open(path, O_RDWR)
        var byte: UInt8 = 0
        try require(pread(file.number, &byte, 1, off_t(offset)) == 1, "reading \(path)")
        byte ^= 0x10
        try require(pwrite(file.number, &byte, 1, off_t(offset)) == 1, "writing \(path)")
    }

    private func replace(_ path: String, _ old: String, with new: String) throws {
        let text = String(decoding: try contentOfFile(path), as: UTF8.self)
        try require(text.contains(old), "\(old) is not in \(text)")
        try writeDurably(path, Array(text.replacing(old, with: new).utf8))
    }

    /// Where a chunk of the model's first disk lies in an image.
    private func offset(of bytes: ArraySlice<UInt8>, in path: String) throws -> Int {
        let content = try contentOfFile(path)
        for start in stride(from: 0, to: content.count - bytes.count, by: 512)
        where content[start] == bytes.first && Array(content[start..<(start + bytes.count)]) == Array(bytes) {
            return start
        }
        throw CheckFailure("the bytes are not in \(path)")
    }

    @Test func aFlippedBitIsNamedWithDiskChunkPointAndFile() throws {
        try withPoints { model in
            let points = try model.repository.points(of: model.machine)
            let path = try model.data(points[1], "vda")
            let bytes = try #require(model.expected[2]?["vda"])[71168..<71680]
            try flip(path, at: try offset(of: bytes, in: path) + 100)
            let report = try model.repository.verify(model.machine)
            #expect(report.problems.count == 1)
            let problem = try #require(report.problems.first)
            #expect(problem.point == 2 && problem.disk == "vda" && problem.offset == 65536 && problem.file == path)
            // The next point has a chunk of its own there.
            #expect(try model.repository.verify(model.machine, point: points[2]).problems.isEmpty)
            #expect(try model.repository.verify(model.machine, point: points[0]).problems.isEmpty)
            // A restore refuses, unless it is told to.
            let target = try NamelessFile.memory(size: 2_000_000)
            try requireError(.corrupt, "restoring") {
                _ = try model.repository.restore(points[1], disk: "vda", to: target, isBlank: true)
            }
            var options = RestoreOptions()
            options.isForced = true
            let result = try model.repository.restore(points[1], disk: "vda", to: target, isBlank: true, options)
            #expect(result.damaged == [65536])
            var found = [UInt8](repeating: 0, count: 2_000_000)
            try found.withUnsafeMutableBytes { try target.read(into: $0, at: 0) }
            let differing = zip(found, try #require(model.expected[2]?["vda"])).count { $0 != $1 }
            #expect(differing == 1)
        }
    }

    @Test func everyKindOfDamageIsFound() throws {
        let damages: [(String, (ModelMachine, [RestorePoint]) throws -> Void)] = [
            (
                "checksum",
                { model, points in try replace(points[1].path, #""tool" : "test""#, with: #""tool" : "tost""#) }
            ),
            (
                "root",
                { model, points in
                    try replace(points[1].path, #""root" : "\#(points[1].manifest.root)""#, with: #""root" : "00""#)
                }
            ),
            ("No such file", { model, points in unlink(try model.data(points[0], "vda")) }),
            ("no manifest", { model, points in unlink(points[1].path) }),
            (
                "SHA-256",
                { model, points in
                    try flip("\(model.data(points[1], "vda").dropLast(5))hashes", at: 9)
                }
            ),
            (
                "SHA-256",
                { model, points in
                    try flip(
                        "\(model.repository.path)/vms/\(model.machine.directory)/documents/000002-1-domain.xml", at: 1)
                }
            ),
            ("no qcow2", { model, points in try flip(try model.data(points[2], "vda"), at: 0) }),
            (
                "is backed by",
                { model, points in
                    try require(
                        Tool.run(
                            "qemu-img",
                            ["rebase", "-u", "-F", "qcow2", "-b", "000001.qcow2", model.data(points[2], "vda")]
                        )
                        .status == 0, "rebase")
                }
            ),
            ("reading", { model, points in try writeDurably(points[1].path, Array("{}".utf8)) }),
            (
                "another number",
                { model, points in
                    try renameDurably(points[2].path, to: points[2].path.replacing("/000003-", with: "/000007-"))
                }
            ),
        ]
        for (word, damage) in damages {
            try withPoints { model in
                try damage(model, try model.repository.points(of: model.machine))
                let problems = try model.repository.verify(model.machine).problems
                let isFound = problems.contains { $0.problem.contains(word) }
                try require(isFound, "\(word) is not among \(problems.map(\.problem))")
            }
        }
    }

    @Test func aMissingMiddleIsNamedWhenAPointIsOpened() throws {
        try withPoints { model in
            let points = try model.repository.points(of: model.machine)
            let path = try model.data(points[1], "vda")
            unlink(path)
            do {
                _ = try model.repository.open(points[2], disk: "vda")
                Issue.record("it was opened")
            } catch let error as BlockError {
                #expect(error.kind == .notFound && error.message.contains(path) && error.message.contains("point 2"))
            }
            // The other disk, and the point below, are as they were.
            _ = try model.repository.open(points[2], disk: "vdb")
            _ = try model.repository.open(points[0], disk: "vda")
        }
    }

    @Test func namesThatLeadElsewhereAreRefused() throws {
        try withPoints { model in
            let point = try model.repository.points(of: model.machine)[1]
            try replace(point.path, #""file" : "000002.qcow2""#, with: #""file" : "../../../other.qcow2""#)
            try requireError(.corrupt, "reading") { _ = try model.repository.points(of: model.machine) }
        }
    }

    @Test func suspectPointsAreTold() throws {
        try withPoints { model in
            let points = try model.repository.points(of: model.machine)
            try model.repository.mark(points[1], .suspect, reason: "a lie about changes")
            let report = try model.repository.verify(model.machine)
            #expect(report.problems.isEmpty)
            #expect(report.notes.contains { $0.contains("a lie about changes") })
            #expect(try model.repository.summaries().map(\.isSuspect) == [false, true, false])
        }
    }

    @Test func theCatalogueIsAnIndexOnly() throws {
        try withPoints { model in
            let repository = model.repository
            let catalogue = "\(repository.path)/catalogue.sqlite"
            let summaries = try repository.summaries()
            #expect(summaries.map(\.sequence) == [1, 2, 3])
            #expect(access(catalogue, F_OK) == 0)
            unlink(catalogue)
            #expect(try repository.summaries() == summaries)
            try writeDurably(catalogue, Array(repeating: 0x5A, count: 100_000))
            #expect(try repository.summaries() == summaries)
            model.change(2)
            let point = try model.makePoint()
            #expect(try repository.summaries().map(\.sequence) == [1, 2, 3, 4])
            unlink(point.path)
            #expect(try repository.summaries() == summaries)
            #expect(try repository.summaries(rescan: true) == summaries)
        }
    }

    /// A sidecar that was changed: its chunks are not known to be right, and come as they are if they have to.
    @Test func aDamagedSidecarIsRestoredByForceAlone() throws {
        try withPoints { model in
            let point = try model.repository.points(of: model.machine)[1]
            let sidecar = "\(try model.data(point, "vda").dropLast(5))hashes"
            try flip(sidecar, at: try contentOfFile(sidecar).count - 1)
            let target = try NamelessFile.memory(size: 2_000_000)
            try requireError(.corrupt, "restoring") {
                _ = try model.repository.restore(point, disk: "vda", to: target, isBlank: true)
            }
            #expect(areZeros(try content(target)[...]))
            var options = RestoreOptions()
            options.isForced = true
            options.verifies = true
            let result = try model.repository.restore(point, disk: "vda", to: target, isBlank: true, options)
            #expect(result.damaged.count == 1)
            try requireEqual(try content(target), model.expected[2]?["vda"] ?? [], "forced")
        }
    }

    /// A compressed cluster that cannot be read any more is zeros, if it has to be; everything else is right.
    @Test func aDamagedCompressedClusterIsRestoredByForceAlone() throws {
        try withTemporaryDirectory { directory in
            let repository = try Repository.create(at: directory.file("repository"), compression: .zstd)
            var model = try ModelMachine(repository, disks: [ModelDisk("vda", size: 4_000_000)], seed: 2)
            let words = (0..<600_000).map { "\($0 % 1000) disk " }.joined()
            model.disks[0].bytes = Array(words.utf8.prefix(4_000_000))
            let point = try model.makePoint(full: true)
            let path = try model.data(point, "vda")
            // The frame of some cluster, by the magic number that it begins with.
            let image = try contentOfFile(path)
            let magic: [UInt8] = [0x28, 0xB5, 0x2F, 0xFD]
            let frames = (0..<(image.count - 4)).filter {
                image[$0] == magic[0] && Array(image[$0..<($0 + 4)]) == magic
            }
            try require(frames.count > 20, "\(frames.count) compressed clusters")
            try flip(path, at: frames[7])
            let target = try NamelessFile.memory(size: 4_000_000)
            #expect(throws: BlockError.self) {
                try repository.restore(point, disk: nil, to: target, isBlank: true)
            }
            var options = RestoreOptions()
            options.isForced = true
            options.verifies = true
            let result = try repository.restore(point, disk: nil, to: target, isBlank: true, options)
            let offset = Int(try #require(result.damaged.first))
            #expect(result.damaged.count == 1)
            var expected = model.disks[0].bytes
            for index in offset..<min(offset + 65536, expected.count) { expected[index] = 0 }
            try requireEqual(try content(target), expected, "forced")
        }
    }
}
