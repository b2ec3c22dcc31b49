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

    /// A disk with old content, and the same one with a place that cannot be written.
    private func usedDisk() throws -> (disk: RawFileDevice, failing: FaultDevice) {
        let disk = try NamelessFile.memory(size: 5_242_880)
        let old = patternBytes(5_242_880, seed: 77)
        try old.withUnsafeBytes { try disk.write($0, at: 0, durable: false) }
        let fault = FaultPlan.Fault(.writeError(.inputOutput), range: 3_000_000..<3_000_001)
        return (disk, FaultDevice(disk, plan: FaultPlan([fault])))
    }

    /// Where the restore ends early, the disk is neither the old one nor the new one to whoever looks at its beginning.
    @Test func aDiskThatWasRestoredInPartDoesNotLookWhole() throws {
        try withPoints { _, model in
            let point = try model.repository.find("2", of: model.machine)
            for isDifferential in [false, true] {
                let (disk, failing) = try usedDisk()
                var options = RestoreOptions()
                options.isDifferential = isDifferential
                do {
                    _ = try model.repository.restore(point, disk: nil, to: failing, isBlank: false, options)
                    Issue.record("it was restored")
                } catch let error as BlockError {
                    #expect(error.kind == .inputOutput && error.message.contains("is incomplete"), "\(error)")
                }
                #expect(areZeros(try content(disk)[..<(1 << 20)]))
                options.isDifferential = true
                let result = try model.repository.restore(point, disk: nil, to: disk, isBlank: false, options)
                #expect(result.bytesWritten + result.bytesZeroed + result.bytesUnchanged == 5_000_001)
                #expect(result.bytesWritten >= 1 << 20)
                let restored = try content(disk)
                try requireEqual(Array(restored[..<5_000_001]), model.expected[2]?["vda"] ?? [], "gone on")
                try requireEqual(
                    Array(restored[5_000_001...]), Array(patternBytes(5_242_880, seed: 77)[5_000_001...]), "behind")
            }
        }
    }

    @Test func aRestoreThatIsToldToStopLeavesAnUntouchedDiskAlone() throws {
        try withPoints { _, model in
            let (disk, _) = try usedDisk()
            let cancellation = Cancellation()
            cancellation.cancel()
            try requireError(.shutdown, "restoring") {
                _ = try model.repository.restore(
                    try model.repository.find("2", of: model.machine), disk: nil, to: disk, isBlank: false,
                    cancellation: cancellation)
            }
            try requireEqual(try content(disk), patternBytes(5_242_880, seed: 77), "untouched")
        }
    }

    /// kill -9 at each step of a restore to a server: its disk has a beginning only when it is whole.
    @Test(.enabled(if: Tool.exists("nbdkit"))) func aKilledRestoreLeavesADiskWithoutABeginning() throws {
        try withPoints { directory, model in
            let file = directory.file("server")
            let expected = try #require(model.expected[3]?["vda"])
            let restore = "\(Tool.diskgate) restore --repository \(model.repository.path) 3 \"$uri\""
            for step in ["head-removed", "body-durable", "head-durable", "flushed"] {
                _ = try directory.makeFile("server", patternBytes(5_242_880, seed: 5))
                let killed = try Tool.run(
                    "nbdkit", ["-U", "-", "file", file, "--run", "DISKGATE_STEP_KILL=restore.\(step) \(restore)"])
                try require(killed.status != 0, "\(step): \(killed)")
                let left = try contentOfFile(file)
                if step == "flushed" {
                    try requireEqual(Array(left[..<5_000_001]), expected, step)
                } else {
                    try require(areZeros(left[..<4096]), "\(step): the first block is there")
                }
                _ = try Tool.output(
                    "nbdkit", ["-U", "-", "file", file, "--run", "\(restore) --differential --verify"])
                try requireEqual(Array(try contentOfFile(file)[..<5_000_001]), expected, "\(step), gone on with")
            }
        }
    }

    /// Whole and differential to servers of others, over old content.
    @Test(.enabled(if: Tool.exists("nbdkit") && Tool.exists("qemu-nbd"))) func serversAreRestoredTo() throws {
        try withPoints { directory, model in
            func restores(_ point: Int, _ option: String) -> String {
                "\(Tool.diskgate) restore --repository \(model.repository.path) \(point) \"$uri\" --verify \(option)"
            }
            let (raw, image, socket) = (directory.file("raw"), directory.file("image"), directory.file("socket"))
            let start = "qemu-nbd -k \(socket) -t --fork --pid-file=\(directory.file("pid"))"
            let stop = "status=$?; kill $(cat \(directory.file("pid"))); exit $status"
            let uri = "uri='nbd+unix:///?socket=\(socket)'"
            for (name, server) in [
                ("nbdkit", { (words: String) in "nbdkit -U - file \(raw) --run '\(words)'" }),
                ("qemu-nbd, raw", { "\(start) -f raw \(raw); \(uri); \($0); \(stop)" }),
                ("qemu-nbd, qcow2", { "\(start) -f qcow2 --discard=unmap \(image); \(uri); \($0); \(stop)" }),
            ] as [(String, (String) -> String)] {
                _ = try directory.makeFile("raw", patternBytes(5_242_880, seed: 6))
                _ = try Tool.output("qemu-img", ["convert", "-f", "raw", "-O", "qcow2", raw, image])
                for (point, option) in [(2, ""), (1, "--differential")] {
                    _ = try Tool.output("sh", ["-c", server(restores(point, option))])
                    if name.contains("qcow2") {
                        _ = try Tool.output("qemu-img", ["convert", "-f", "qcow2", "-O", "raw", image, raw])
                    }
                    try requireEqual(
                        Array(try contentOfFile(raw)[..<5_000_001]), model.expected[point]?["vda"] ?? [],
                        "\(name), point \(point)")
                }
            }
        }
    }

    @Test(.enabled(if: Tool.exists("qemu-system-x86_64"))) func aDiskOfARunningMachineIsRefused() throws {
        try withPoints { directory, model in
            let disk = try directory.makeFile("disk.raw", patternBytes(5_000_192, seed: 3))
            let pid = directory.file("pid")
            _ = try Tool.output(
                "qemu-system-x86_64",
                [
                    "-machine", "q35,accel=tcg", "-S", "-display", "none", "-nodefaults", "-m", "32", "-daemonize",
                    "-pidfile", pid, "-drive", "if=virtio,format=raw,file=\(disk)",
                ])
            let number = Int32(String(decoding: try contentOfFile(pid), as: UTF8.self).filter(\.isNumber)) ?? 0
            try require(number > 0, "no process id")
            defer { kill(number, SIGKILL) }
            for options in [["--differential", "--replace"], ["--replace"]] {
                let result = try Tool.run(
                    Tool.diskgate, ["restore", "--repository", model.repository.path, "3", disk] + options)
                #expect(result.status == 1 && result.errors.contains("a virtual machine"), "\(result)")
            }
            try requireEqual(try contentOfFile(disk), patternBytes(5_000_192, seed: 3), "untouched")
            #expect(access("\(disk).incomplete", F_OK) < 0 && access("\(disk).partial", F_OK) < 0)
        }
    }

    @Test func twoDisksAreNotRestoredToOnePlace() throws {
        try withTemporaryDirectory { directory in
            func requireRefusal(_ first: String, _ second: String) {
                let error = #expect(throws: BlockError.self) {
                    _ = try RestoreDestination.open(
                        [
                            RestoreDestination.Wanted(disk: "vda", place: first, size: 1 << 20),
                            RestoreDestination.Wanted(disk: "vdb", place: second, size: 1 << 20),
                        ], isDifferential: true, mayReplace: true)
                }
                let said = "restoring disk vdb: \(second) is another disk's already: vda goes to \(first)"
                #expect(error?.kind == .invalid && error?.message == said, "\(String(describing: error))")
            }
            let old = patternBytes(1_500_000, seed: 4)
            let file = try directory.makeFile("disk.raw", old)
            let name = directory.file("link")
            symlink(file, name)
            for other in [file, "\(directory.path)/./disk.raw", "file://\(file)", name] {
                requireRefusal(file, other)
            }
            try requireEqual(try contentOfFile(file), old, "untouched")
            #expect(access("\(file).incomplete", F_OK) < 0)
            if !LoopDevice.areAvailable { return }
            try LoopDevice.with(patternBytes(1 << 20, seed: 9)) { node, _ in
                let name = directory.file("node")
                symlink(node, name)
                requireRefusal(name, node)
            }
        }
    }

    /// Where another disk cannot be restored, a file that was cut for it is not what it was.
    @Test func aFileThatWasCutStaysMarked() throws {
        try withTemporaryDirectory { directory in
            func requireFailure(beside path: String) throws {
                try requireError(.notFound, "the other disk") {
                    _ = try RestoreDestination.open(
                        [
                            RestoreDestination.Wanted(disk: "vda", place: path, size: 1 << 20),
                            RestoreDestination.Wanted(disk: "vdb", place: directory.file("none"), size: 1 << 20),
                        ], isDifferential: true, mayReplace: true)
                }
            }
            let right = try directory.makeFile("right.raw", patternBytes(1 << 20, seed: 4))
            try requireFailure(beside: right)
            #expect(access("\(right).incomplete", F_OK) < 0)
            let larger = try directory.makeFile("larger.raw", patternBytes(1_500_000, seed: 5))
            // The second time it has the right size already.
            for _ in 0..<2 {
                try requireFailure(beside: larger)
                #expect(access("\(larger).incomplete", F_OK) == 0)
                #expect(try contentOfFile(larger).count == 1 << 20)
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
