// Restore points: written, found, read back by us and by qemu-img, and refused when something is wrong with them.
import Backup
import Block
import Glibc
import Hypervisors
import LinuxIO
import Support
import Testing

@Suite struct PointTests {
    /// Two disks of odd sizes, a full point and three incremental ones.
    private func withPoints(
        _ compression: PointCompression = .none, _ body: (inout ModelMachine) throws -> Void
    ) throws {
        try withTemporaryDirectory { directory in
            let repository = try Repository.create(at: directory.file("repository"), compression: compression)
            var model = try ModelMachine(
                repository, disks: [ModelDisk("vda", size: 3_000_000), ModelDisk("vdb", size: 1_000_000)], seed: 7)
            for _ in 0..<4 {
                model.change(4)
                try model.makePoint()
            }
            try body(&model)
        }
    }

    @Test(arguments: PointCompression.allCases)
    func pointsReadAsTheDiskWas(_ compression: PointCompression) throws {
        try withPoints(compression) { model in
            try model.requireEqualPoints("\(compression)")
            let points = try model.repository.points(of: model.machine)
            #expect(points.map(\.sequence) == [1, 2, 3, 4])
            #expect(points.map(\.manifest.level) == [.full, .incremental, .incremental, .incremental])
            #expect(points[2].manifest.parent?.uuid == points[1].uuid)
            #expect(points[2].manifest.parent?.root == points[1].manifest.root)
        }
    }

    @Test(.enabled(if: Tool.exists("qemu-img"))) func qemuReadsEveryPointWithoutUs() throws {
        try withPoints { model in
            for point in try model.repository.points(of: model.machine) {
                for disk in ["vda", "vdb"] {
                    let path = try model.data(point, disk)
                    _ = try Tool.output("qemu-img", ["check", path])
                    let raw = "\(model.repository.path)-\(point.sequence)-\(disk)"
                    _ = try Tool.output("qemu-img", ["convert", "-O", "raw", path, raw])
                    let expected = try #require(model.expected[point.sequence]?[disk])
                    // The image's size is a multiple of 512.
                    try requireEqual(Array(try contentOfFile(raw).prefix(expected.count)), expected, path)
                }
            }
        }
    }

    @Test func aPointIsFoundByNumberUUIDAndTime() throws {
        try withPoints { model in
            let (repository, machine) = (model.repository, model.machine)
            let points = try repository.points(of: machine)
            #expect(try repository.find("latest", of: machine).sequence == 4)
            #expect(try repository.find("2", of: machine).sequence == 2)
            #expect(try repository.find(String(points[1].uuid.prefix(13)), of: machine).sequence == 2)
            let day = String(points[2].time.description.prefix(10))
            #expect(try repository.find(day, of: machine).sequence == 3)
            #expect(try repository.find(points[1].time.description, of: machine).sequence == 2)
            try requireError(.notFound, "an early time") { _ = try repository.find("1999-01-01", of: machine) }
            try requireError(.notFound, "a number") { _ = try repository.find("77", of: machine) }
            #expect(try repository.point(ofRun: "run-3", machine: machine)?.sequence == 3)
            #expect(try repository.point(ofRun: "run-33", machine: machine) == nil)
        }
    }

    @Test func theSequenceDecidesWhenTheClockIsSetBack() throws {
        try withPoints { model in
            model.time -= 1_000_000
            model.change(2)
            let point = try model.makePoint()
            #expect(point.sequence == 5)
            #expect(try model.repository.find("latest", of: model.machine).uuid == point.uuid)
            try model.requireEqualPoints("clock set back")
        }
    }

    @Test func aPointFollowsTheNewestOnly() throws {
        try withPoints { model in
            let (repository, machine) = (model.repository, model.machine)
            let points = try repository.points(of: machine)
            let lock = try repository.lockMachine(machine)
            try requireError(.invalid, "an older parent") {
                _ = try repository.begin(
                    PointRequest(
                        machine: machine, parent: points[1],
                        disks: [.init(id: "vda", size: 3_000_000, isIncremental: true)], run: "r", ledger: nil),
                    holding: lock)
            }
            try requireError(.invalid, "a smaller disk") {
                _ = try repository.begin(
                    PointRequest(
                        machine: machine, parent: points[3],
                        disks: [.init(id: "vda", size: 65536, isIncremental: true)], run: "r", ledger: nil),
                    holding: lock)
            }
            try requireError(.denied, "two runs at once") { _ = try repository.lockMachine(machine) }
        }
    }

    @Test func aDiskMayGrowAppearAndGo() throws {
        try withPoints { model in
            model.disks[0].grow(to: 3_500_000)
            model.change(3)
            try model.makePoint()
            model.disks.append(ModelDisk("vdc", size: 400_000))
            model.change(6)
            try model.makePoint()
            model.disks.remove(at: 1)
            model.change(3)
            try model.makePoint()
            try model.requireEqualPoints("disks come and go")
            _ = try model.prune(keepLast: 2)
            try model.requireEqualPoints("disks come and go, pruned")
        }
    }

    @Test func namesOfAllKindsHavePlaces() throws {
        try withTemporaryDirectory { directory in
            let repository = try Repository.create(at: directory.file("a b:c"))
            let names = ["web:1", "../../etc", "Größe", ".hidden", "-rf", "a/b", "", "con trol\n", "web:2"]
            for (index, name) in names.enumerated() {
                var model = try ModelMachine(
                    repository, disks: [ModelDisk("sata0:1/\(name)", size: 200_000), ModelDisk("Disk", size: 70_000)],
                    seed: 3, id: "id-\(index)", name: name)
                model.change(2)
                try model.makePoint { $0.documents = [.init(name: name, content: [1, 2, 3])] }
                model.change(2)
                try model.makePoint()
                try model.requireEqualPoints(name)
                #expect(try repository.machine(named: "id-\(index)").name == name)
            }
            #expect(try repository.machines().count == names.count)
            #expect(try namesInDirectory(directory.path) == ["a b:c"])
        }
    }

    @Test func aRenamedMachineKeepsItsPoints() throws {
        try withPoints { model in
            let renamed = try model.repository.enroll(id: "id-1", name: "db")
            #expect(renamed.directory == model.machine.directory)
            #expect(try model.repository.points(of: try model.repository.machine(named: "db")).count == 4)
        }
    }

    @Test func anAbandonedPointLeavesNothing() throws {
        try withPoints { model in
            let machine = model.machine
            let before = try allFiles(model.repository.path)
            let lock = try model.repository.lockMachine(machine)
            let writer = try model.begin(holding: lock)
            #expect(try allFiles(model.repository.path) != before)
            try writer.abandon()
            #expect(try allFiles(model.repository.path) == before)
        }
    }
}

/// All files below a directory.
func allFiles(_ path: String) throws -> [String] {
    try Tool.output("find", [path, "-type", "f"]).split(separator: "\n").map(String.init).sorted()
}
