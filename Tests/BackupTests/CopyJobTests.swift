// Whole copies on this machine: to block nodes, to full file systems, refused and resumed.
import Backup
import Block
import Glibc
import LinuxIO
import Support
import Testing
import Transports

/// A copy without a word.
private func copy(_ source: String, _ destination: String, _ change: (inout CopyRequest) -> Void = { _ in }) throws
    -> CopyReport
{
    var request = CopyRequest(
        DiskSpecification(try SourceReference(source)), to: try CopyDestination(destination))
    change(&request)
    return try CopyJob.run(request, reporter: ProgressReporter(.silent, subject: "copy"))
}

@Suite struct CopyJobTests {
    @Test(.enabled(if: LoopDevice.areAvailable, "\(LoopDevice.reason)"), arguments: [512, 4096])
    func `a block node gets the same bytes, zeros included`(sector: Int) throws {
        try withTemporaryDirectory { directory in
            var bytes = [UInt8](repeating: 0, count: 8 << 20)
            bytes.replaceSubrange(100_000..<900_000, with: patternBytes(800_000, seed: 1))
            bytes.replaceSubrange((5 << 20)..<(6 << 20), with: patternBytes(1 << 20, seed: 2))
            let source = try directory.makeFile("source.raw", bytes)
            let old = [UInt8](repeating: 0x5A, count: 9 << 20)
            try LoopDevice.with(old, sectorSize: sector) { node, file in
                let report = try copy(source, node) { $0.verifies = true }
                #expect(report.bytesVerified == 8 << 20)
                try requireEqual(try contentOfFile(file), bytes + old[..<(1 << 20)], "node")
            }
        }
    }

    @Test(.enabled(if: SmallFileSystem.isAvailable))
    func `a full target is told, kept, and the copy goes on when there is room`() throws {
        try SmallFileSystem.with { small in
            let error = #expect(throws: BlockError.self) {
                _ = try copy("pattern:2M?seed=6", small.file("copy.raw"))
            }
            #expect(error?.kind == .noSpace)
            #expect(error?.message.contains("copy.raw.partial") == true && error?.message.contains("--resume") == true)
            #expect(access(small.file("copy.raw"), F_OK) != 0)
            if mount("tmpfs", small.path, "tmpfs", UInt(MS_REMOUNT), "size=8m") < 0 { throw CheckFailure("remount") }
            let report = try copy("pattern:2M?seed=6", small.file("copy.raw")) {
                $0.resumes = true
                $0.verifies = true
            }
            #expect(report.bytesVerified == 2 << 20)
        }
    }

    @Test func `verifying names the first byte that differs`() throws {
        try withTemporaryDirectory { directory in
            var request = CopyRequest(
                DiskSpecification(try SourceReference("pattern:4M?seed=1")),
                to: try CopyDestination(directory.file("copy.raw")))
            // A source that reads differently the second time, at some of these places.
            request.source.faults = (4..<24).map {
                let start = UInt64($0) << 17
                return FaultPlan.Fault(.corruption, range: start..<(start + 1), probability: 0.5)
            }
            request.verifies = true
            let error = #expect(throws: BlockError.self) {
                _ = try CopyJob.run(request, reporter: ProgressReporter(.silent, subject: "copy"))
            }
            #expect(error?.kind == .corrupt)
            let words = (error?.message ?? "").split(separator: " ")
            let place = words.firstIndex(of: "offset").flatMap { UInt64(words[$0 + 1].dropLast()) }
            #expect(place.map { $0 % (1 << 17) == 0 && $0 >= 4 << 17 } == true, "\(String(describing: error))")
            #expect(access(directory.file("copy.raw"), F_OK) != 0)
            #expect(access(directory.file("copy.raw.partial"), F_OK) == 0)
            #expect(error?.message.contains("whole copy") == true)
            // What was found to be wrong gets no name by going on.
            request.verifies = false
            request.resumes = true
            let again = #expect(throws: BlockError.self) {
                _ = try CopyJob.run(request, reporter: ProgressReporter(.silent, subject: "copy"))
            }
            #expect(again?.kind == .denied && again?.message.contains("differs") == true)
            #expect(access(directory.file("copy.raw"), F_OK) != 0)
        }
    }

    @Test(.enabled(if: LoopDevice.areAvailable && Tool.exists("mkfs.xfs"), "needs root, loop devices and xfsprogs"))
    func `a file on the same XFS shares its blocks with the source`() throws {
        try LoopDevice.with([UInt8](repeating: 0, count: 320 << 20)) { node, _ in
            _ = try Tool.output("mkfs.xfs", ["-q", node])
            try withTemporaryDirectory { directory in
                _ = try Tool.output("mount", [node, directory.path])
                defer { _ = try? Tool.run("umount", ["-l", directory.path]) }
                var bytes = patternBytes((9 << 20) + 777, seed: 7)
                bytes.replaceSubrange((3 << 20)..<(5 << 20), with: [UInt8](repeating: 0, count: 2 << 20))
                let source = try directory.makeFile("source.raw", bytes)
                let report = try copy(source, directory.file("copy.raw")) { $0.verifies = true }
                #expect(report.bytesCloned >= 8 << 20, "\(report)")
                try requireEqual(try contentOfFile(directory.file("copy.raw")), bytes, "copy")
            }
        }
    }

    @Test func `a link stays a link, and what it names is replaced`() throws {
        try withTemporaryDirectory { directory in
            let path = try directory.makeFile("real.raw", [1, 2, 3])
            #expect(symlink("real.raw", directory.file("link.raw")) == 0)
            _ = try copy("pattern:64K", directory.file("link.raw")) { $0.forces = true }
            #expect(try contentOfFile(path).count == 65536)
            #expect(try namesInDirectory(directory.path) == ["link.raw", "real.raw"])
        }
    }

    @Test func `what is there is not replaced unasked`() throws {
        try withTemporaryDirectory { directory in
            let path = try directory.makeFile("copy.raw", [1, 2, 3])
            try requireError(.denied, "copying") { _ = try copy("pattern:64K", path) }
            #expect(try contentOfFile(path) == [1, 2, 3])
            _ = try copy("pattern:64K", path) { $0.forces = true }
            #expect(try contentOfFile(path).count == 65536)
            #expect(try namesInDirectory(directory.path) == ["copy.raw"])
            try requireError(.notFound, "resuming") { _ = try copy("pattern:64K", path) { $0.resumes = true } }
        }
    }

    @Test(arguments: [false, true])
    func `a file that is no journal is not replaced by one`(forces: Bool) throws {
        try withTemporaryDirectory { directory in
            let path = try directory.makeFile("precious", Array("not a journal".utf8))
            try requireError(.denied, "beginning the journal") {
                _ = try copy("pattern:64K", directory.file("copy.raw")) {
                    $0.journal = path
                    $0.forces = forces
                }
            }
            #expect(try contentOfFile(path) == Array("not a journal".utf8))
            #expect(try namesInDirectory(directory.path) == ["precious"])
        }
    }

    @Test func `a whole copy takes the place of a marked one, and clears what marked it`() throws {
        try withTemporaryDirectory { directory in
            let path = try directory.makeFile("copy.raw", [UInt8](repeating: 0x5A, count: 65536))
            _ = try directory.makeFile("copy.raw.incomplete", [1])
            try requireError(.denied, "copying") { _ = try copy("pattern:64K", path) }
            _ = try copy("pattern:64K", path) { $0.forces = true }
            #expect(try namesInDirectory(directory.path) == ["copy.raw"])
        }
    }

    @Test func `an image of a disk whose size is no multiple of anything`() throws {
        try withTemporaryDirectory { directory in
            var bytes = patternBytes(1_000_001, seed: 5)
            bytes.replaceSubrange(200_000..<600_000, with: [UInt8](repeating: 0, count: 400_000))
            let source = try directory.makeFile("source.raw", bytes)
            let target = directory.file("copy.raw")
            let report = try copy(source, target) { $0.verifies = true }
            #expect(report.bytesVerified == 1_000_001)
            try requireEqual(try contentOfFile(target), bytes, "copy")
        }
    }
}
