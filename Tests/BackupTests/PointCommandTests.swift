// The commands on restore points, as a user runs them: list, verify, restore, pin, prune, and points as sources.
import Backup
import Block
import Glibc
import Hypervisors
import LinuxIO
import Support
import Testing

@Suite struct PointCommandTests {
    private func withPoints(_ body: (TemporaryDirectory, ModelMachine) throws -> Void) throws {
        try withTemporaryDirectory { directory in
            let repository = try Repository.create(at: directory.file("repository"))
            var model = try ModelMachine(
                repository, disks: [ModelDisk("vda", size: 1_310_720), ModelDisk("vdb", size: 262_144)], seed: 31)
            for _ in 0..<4 {
                model.change(3)
                try model.makePoint { $0.documents = [.init(name: "domain.xml", content: Array("<domain/>".utf8))] }
            }
            try body(directory, model)
        }
    }

    private func diskgate(_ arguments: String...) throws -> Tool.Result {
        try Tool.run(Tool.diskgate, arguments)
    }

    @Test func pointsAreListedVerifiedPinnedAndPruned() throws {
        try withPoints { _, model in
            let path = model.repository.path
            let list = try diskgate("points", "--repository", path)
            #expect(list.status == 0 && list.output.split(separator: "\n").count == 4)
            let json = try diskgate("points", "--repository", path, "web", "--rescan", "--json")
            #expect(json.output.contains("\"sequence\" : 4"))
            #expect(try diskgate("verify", "--repository", path).status == 0)
            #expect(try diskgate("verify", "--repository", path, "web", "2").status == 0)
            #expect(try diskgate("pin", "--repository", path, "2", "--reason", "audit").status == 0)
            let plan = try diskgate("prune", "--repository", path, "--keep-last", "1", "--dry-run")
            #expect(plan.status == 0 && plan.output.contains("would be removed"))
            #expect(try model.repository.points(of: model.machine).count == 4)
            #expect(try diskgate("prune", "--repository", path, "--keep-last", "1").status == 0)
            #expect(try model.repository.points(of: model.machine).map(\.sequence) == [2, 4])
            #expect(try diskgate("unpin", "--repository", path, "2").status == 0)
            #expect(try diskgate("prune", "--repository", path, "web", "--keep-last", "1", "--json").status == 0)
            try model.requireEqualPoints("pruned by the command")
            #expect(try diskgate("prune", "--repository", path).status == 2)
            #expect(try diskgate("points", "--repository", "\(path)/vms").status == 1)
            unlink(try model.data(try model.repository.find("latest", of: model.machine), "vda"))
            let broken = try diskgate("verify", "--repository", path)
            #expect(broken.status == 1 && broken.output.contains("000004.qcow2"))
        }
    }

    @Test func disksAreRestoredToADirectory() throws {
        try withPoints { directory, model in
            let place = directory.file("restored")
            let result = try diskgate(
                "restore", "--repository", model.repository.path, "3", "\(place)/", "--verify", "--documents",
                "\(place)/config")
            #expect(result.status == 0, "\(result.errors)")
            for disk in ["vda", "vdb"] {
                try requireEqual(
                    try contentOfFile("\(place)/\(disk).raw"), model.expected[3]?[disk] ?? [], "\(disk) restored")
            }
            #expect(try contentOfFile("\(place)/config/domain.xml") == Array("<domain/>".utf8))
            let again = try diskgate(
                "restore", "--repository", model.repository.path, "2", "\(place)/vda.raw", "--disk", "vda",
                "--differential", "--json")
            #expect(again.status == 0, "\(again.errors)")
            try requireEqual(try contentOfFile("\(place)/vda.raw"), model.expected[2]?["vda"] ?? [], "differential")
        }
    }

    @Test func eachDiskIsRestoredToATargetOfItsOwn() throws {
        try withPoints { directory, model in
            let restore = ["restore", "--repository", model.repository.path, "3"]
            func run(_ words: [String]) throws -> Tool.Result { try Tool.run(Tool.diskgate, restore + words) }
            let (first, second) = (directory.file("one"), directory.file("two"))
            let done = try run(["--target", "vdb=\(first)", "--target", "vda=\(second)", "--verify"])
            #expect(done.status == 0, "\(done.errors)")
            for (path, disk) in [(first, "vdb"), (second, "vda")] {
                try requireEqual(try contentOfFile(path), model.expected[3]?[disk] ?? [], "\(disk) restored")
            }
            let third = directory.file("three")
            #expect(try run(["--target", "vdb=\(third)"]).status == 0)
            try requireEqual(try contentOfFile(third), model.expected[3]?["vdb"] ?? [], "one of them")
            // What cannot be leaves nothing, also of the others.
            let new = directory.file("new")
            for (words, said) in [
                (["--target", "vda=\(new)", "--target", "vdb=\(new)"], "another disk's"),
                (["--target", "vda=\(new)", "--target", "vdb=\(first)"], "--replace"),
                (["--target", "vda=\(new)", "--target", "vdx=\(third)"], "no disk vdx"),
                (["--target", "vda=\(new)", "--target", "vdb=hotadd:serial=none"], "--replace"),
                (["--target", "vda=\(model.repository.path)/vda.raw"], "lies in the repository"),
                (["hotadd:serial=none"], "--target"),
            ] {
                let refused = try run(words)
                #expect(refused.status == 1 && refused.errors.contains(said), "\(words): \(refused.errors)")
                #expect(access(new, F_OK) != 0 && access("\(new).partial", F_OK) != 0, "\(words)")
            }
            for words in [
                [], ["--target", "vda"], ["--target", "=\(new)"], ["--target", "vda="],
                ["\(new)", "--target", "vda=x"],
                ["--target", "vda=x", "--disk", "vda"], ["--target", "vda=x", "--target", "vda=y"],
                ["--target", "vda=x/"],
            ] {
                #expect(try run(words).status == 2, "\(words)")
            }
        }
    }

    @Test(.enabled(if: Tool.exists("nbdcopy") && Tool.exists("qemu-img")))
    func anyPointIsServedToOtherTools() throws {
        try withPoints { directory, model in
            for sequence in [1, 3, 4] {
                let source = "point:\(sequence)?repository=\(model.repository.path)&disk=vda"
                for (tool, copy) in [
                    ("nbdcopy", "nbdcopy \"$uri\" \(directory.file("copy"))"),
                    ("qemu-img", "qemu-img convert -f raw -O raw \"$uri\" \(directory.file("copy"))"),
                ] {
                    _ = try directory.makeFile("copy", patternBytes(1_310_720, seed: 2))
                    let result = try diskgate("serve", source, "--run", copy)
                    #expect(result.status == 0, "\(result.errors)")
                    try requireEqual(
                        try contentOfFile(directory.file("copy")), model.expected[sequence]?["vda"] ?? [],
                        "\(tool) of point \(sequence)")
                }
            }
        }
    }

    @Test(.enabled(if: Tool.exists("qemu-io")))
    func anOverlayMakesAPointWritableAndLeavesItAsItIs() throws {
        try withPoints { _, model in
            let source = "point:latest?repository=\(model.repository.path)&disk=vda"
            let write = "qemu-io -f raw -c 'write -P 0x77 65536 4096' -c 'read -P 0x77 65536 4096' \"$uri\""
            #expect(try diskgate("serve", source, "--overlay", "--run", write).status == 0)
            #expect(try diskgate("serve", source, "--writable", "--run", "true").status == 1)
            try model.requireEqualPoints("after an overlay")
        }
    }

    @Test func pointsAreSourcesOfEveryCommand() throws {
        try withPoints { directory, model in
            let source = "point:2?repository=\(model.repository.path)&vm=web&disk=vda"
            let expected = try #require(model.expected[2]?["vda"])
            let file = try directory.makeFile("expected", expected)
            let sum = try Tool.output("sha256sum", [file]).prefix(64)
            #expect(try diskgate("checksum", source).output.hasPrefix(sum))
            let info = try diskgate("info", source, "--json")
            #expect(info.status == 0 && info.output.contains("1310720"))
            #expect(try diskgate("map", source).status == 0)
            let other = try diskgate("info", "point:9?repository=\(model.repository.path)&disk=vda")
            #expect(other.status == 1 && other.errors.contains("1 to 4"))
            let several = try diskgate("info", "point:2?repository=\(model.repository.path)")
            #expect(several.status == 1 && several.errors.contains("vda, vdb"))
        }
    }
}
