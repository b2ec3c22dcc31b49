// Restoring: whole and differential, to files and other disks, nothing half-made under the name that was asked for.
import Backup
import Block
import Glibc
import LinuxIO
import Support
import Testing

@Suite struct RestoreTests {
    private func withPoints(_ body: (TemporaryDirectory, ModelMachine) throws -> Void) throws {
        try withTemporaryDirectory { directory in
            let repository = try Repository.create(at: directory.file("repository"))
            var model = try ModelMachine(repository, disks: [ModelDisk("vda", size: 5_000_001)], seed: 5)
            for _ in 0..<3 {
                model.change(6)
                try model.makePoint()
            }
            try body(directory, model)
        }
    }

    private func restore(
        _ model: ModelMachine, _ sequence: Int, to path: String, _ options: RestoreOptions = RestoreOptions(),
        mayReplace: Bool = false
    ) throws -> RestoreResult {
        let point = try model.repository.find(String(sequence), of: model.machine)
        let destination = try RestoreDestination.open(
            path, size: 5_000_001, isDifferential: options.isDifferential, mayReplace: mayReplace)
        let result = try model.repository.restore(
            point, disk: nil, to: destination.device, isBlank: destination.isBlank, options)
        try destination.finish()
        try requireEqual(try contentOfFile(path), model.expected[sequence]?["vda"] ?? [], "point \(sequence)")
        return result
    }

    @Test func aFileIsWholeOrNotThere() throws {
        try withPoints { directory, model in
            let path = directory.file("disk.raw")
            for sequence in 1...3 { _ = try restore(model, sequence, to: "\(path)\(sequence)") }
            // A file that is there is left alone.
            _ = try directory.makeFile("disk.raw", patternBytes(100, seed: 1))
            try requireError(.invalid, "replacing") { _ = try restore(model, 2, to: path) }
            try requireEqual(try contentOfFile(path), patternBytes(100, seed: 1), "untouched")
            var options = RestoreOptions()
            options.verifies = true
            #expect(try restore(model, 2, to: path, options, mayReplace: true).bytesVerified == 5_000_001)
            #expect(try namesInDirectory(directory.path).allSatisfy { !$0.hasSuffix(".partial") })
        }
    }

    @Test func differencesAloneAreWritten() throws {
        try withPoints { directory, model in
            let path = directory.file("disk.raw")
            _ = try restore(model, 3, to: path)
            var options = RestoreOptions()
            options.isDifferential = true
            let same = try restore(model, 3, to: path, options)
            #expect(same.bytesWritten + same.bytesZeroed == 0 && same.bytesUnchanged == 5_000_001)
            let back = try restore(model, 1, to: path, options)
            #expect(back.bytesWritten + back.bytesZeroed > 0)
            #expect(back.bytesWritten + back.bytesZeroed + back.bytesUnchanged == 5_000_001)
            // Over noise, longer than the disk.
            let noise = try directory.makeFile("noise", patternBytes(6_000_000, seed: 3))
            try requireError(.invalid, "another size") { _ = try restore(model, 2, to: noise, options) }
            _ = try restore(model, 2, to: noise, options, mayReplace: true)
            #expect(access("\(noise).incomplete", F_OK) < 0)
        }
    }

    @Test(.enabled(if: LoopDevice.areAvailable, Comment(rawValue: LoopDevice.reason)))
    func aBlockDeviceIsOverwrittenWhole() throws {
        try withPoints { directory, model in
            try LoopDevice.with(patternBytes(5_242_880, seed: 9)) { node, file in
                let point = try model.repository.find("latest", of: model.machine)
                try requireError(.invalid, "a node") {
                    _ = try RestoreDestination.open(
                        node, size: 5_000_001, isDifferential: false, mayReplace: false)
                }
                let destination = try RestoreDestination.open(
                    node, size: 5_000_001, isDifferential: false, mayReplace: true)
                #expect(!destination.isBlank)
                var options = RestoreOptions()
                options.verifies = true
                _ = try model.repository.restore(
                    point, disk: nil, to: destination.device, isBlank: false, options)
                try destination.finish()
                let content = try contentOfFile(file)
                try requireEqual(Array(content.prefix(5_000_001)), model.expected[3]?["vda"] ?? [], "the node")
            }
            try LoopDevice.with([UInt8](repeating: 1, count: 1 << 20)) { node, _ in
                try requireError(.noSpace, "too small") {
                    _ = try RestoreDestination.open(node, size: 5_000_001, isDifferential: false, mayReplace: true)
                }
            }
        }
    }

    @Test func placesThatAreSomethingElseAreRefused() throws {
        try withPoints { directory, model in
            func open(_ path: String, differential: Bool = false) throws -> RestoreDestination {
                try RestoreDestination.open(
                    path, size: 5_000_001, isDifferential: differential, mayReplace: true, outside: model.repository)
            }
            let image = try directory.makeFile(
                "image", [0x51, 0x46, 0x49, 0xFB, 0, 0, 0, 3] + patternBytes(900, seed: 1))
            try requireError(.invalid, "an image") { _ = try open(image, differential: true) }
            #expect(try contentOfFile(image).count == 908)
            try requireError(.invalid, "the repository") { _ = try open("\(model.repository.path)/vms/x.raw") }
            symlink(image, directory.file("disk.partial"))
            try requireError(.invalid, "a link") { _ = try open(directory.file("disk")) }
            #expect(try contentOfFile(image).count == 908)
            let first = try open(directory.file("other"))
            try requireError(.denied, "two restores") { _ = try open(directory.file("other")) }
            first.abandon()
        }
    }
}
