// The driver reflink: raw files that share unchanged blocks, on a file system that can.
import Backup
import Block
import LinuxIO
import Support
import Testing

@Suite struct ReflinkTests {
    @Test(.enabled(if: ReflinkFileSystem.isAvailable, Comment(rawValue: ReflinkFileSystem.reason)))
    func everyPointIsARawFileThatSharesBlocks() throws {
        try ReflinkFileSystem.with { directory in
            let repository = try Repository.create(at: directory.file("repository"), driver: .reflink)
            var model = try ModelMachine(repository, disks: [ModelDisk("vda", size: 20_000_001)], seed: 51)
            model.disks[0].bytes = patternBytes(20_000_001, seed: 5)
            try model.makePoint()
            let free = try repository.freeSpace()
            for _ in 0..<4 {
                model.change(2)
                try model.makePoint()
            }
            let taken = free &- (try repository.freeSpace())
            #expect(taken < 8_000_000, "four points of small changes took \(taken) bytes")
            try model.requireEqualPoints("reflink")
            for point in try repository.points(of: model.machine) {
                let content = try contentOfFile(try model.data(point, "vda"))
                try requireEqual(content, model.expected[point.sequence]?["vda"] ?? [], point.description)
            }
            model.disks[0].grow(to: 20_500_000)
            try model.makePoint()
            let decisions = try model.prune(keepLast: 2)
            #expect(decisions.count(where: \.isRemoved) == 4)
            try model.requireEqualPoints("reflink, pruned")
        }
    }

    @Test(.enabled(if: SmallFileSystem.isAvailable)) func otherFileSystemsAreRefused() throws {
        try SmallFileSystem.with { directory in
            try requireError(.unsupported, "tmpfs") {
                _ = try Repository.create(at: directory.file("repository"), driver: .reflink)
            }
            try requireError(.invalid, "compressed") {
                _ = try Repository.create(at: directory.file("other"), driver: .reflink, compression: .zstd)
            }
        }
    }
}
