// Pruning: which points stay, that those read as before, and that a crash at any step is made good.
import Backup
import Block
import Glibc
import Hypervisors
import LinuxIO
import Support
import Testing

@Suite struct PruneTests {
    private func withPoints(
        _ count: Int, sizes: (Int, Int) = (1_500_000, 300_000), _ body: (inout ModelMachine) throws -> Void
    ) throws {
        try withTemporaryDirectory(in: placeInMemory) { directory in
            let repository = try Repository.create(at: directory.file("repository"))
            var model = try ModelMachine(
                repository, disks: [ModelDisk("vda", size: sizes.0), ModelDisk("vdb", size: sizes.1)], seed: 21)
            for _ in 0..<count {
                model.change(3)
                try model.makePoint { $0.documents = [.init(name: "domain.xml", content: [1])] }
            }
            try body(&model)
        }
    }

    @Test func theOldestAreMergedIntoTheNext() throws {
        try withPoints(6) { model in
            let before = try model.repository.points(of: model.machine)
            let decisions = try model.prune(keepLast: 3)
            #expect(decisions.map(\.isRemoved) == [true, true, true, false, false, false])
            #expect(decisions.map(\.into) == [2, 3, 4, nil, nil, nil])
            let after = try model.repository.points(of: model.machine)
            #expect(after.map(\.sequence) == [4, 5, 6])
            // Nobody's lineage has changed.
            #expect(after.map(\.manifest.root) == before.suffix(3).map(\.manifest.root))
            #expect(after.map(\.uuid) == before.suffix(3).map(\.uuid))
            #expect(after[0].manifest.level == .full && after[1].manifest.level == .incremental)
            #expect(after[0].manifest.merged.map(\.sequence) == [1, 2, 3])
            try model.requireEqualPoints("pruned")
            // Nothing of the old ones is left.
            let names = try allFiles(model.repository.path)
            #expect(!names.contains { $0.contains("/00000") && ["1", "2", "3"].contains { $0 == "x" } })
            for number in ["000001", "000002", "000003"] {
                #expect(!names.contains { $0.contains("/\(number)") && !$0.contains("/locks/") }, "\(names)")
            }
            model.change(3)
            try model.makePoint()
            try model.requireEqualPoints("and on")
        }
    }

    @Test func pinnedAndOpenPointsStay() throws {
        try withPoints(5) { model in
            let (repository, machine) = (model.repository, model.machine)
            let points = try repository.points(of: machine)
            try repository.mark(points[1], .pinned, reason: "audit")
            do {
                let device = try repository.open(points[2], disk: "vda")
                let decisions = try model.prune(keepLast: 1)
                #expect(decisions.map(\.reasons) == [[], ["pinned"], ["in use"], [], ["last"]])
                withExtendedLifetime(device) {}
            }
            try model.requireEqualPoints("some stay")
            try repository.unmark(points[1], .pinned)
            #expect(try model.prune(keepLast: 1).count(where: \.isRemoved) == 2)
            try model.requireEqualPoints("one stays")
            #expect(try repository.points(of: machine).map(\.sequence) == [5])
            try requireError(.invalid, "nothing kept") { _ = try model.prune(keepLast: 0) }
        }
    }

    @Test func calendarRulesKeepTheNewestOfEachPeriod() throws {
        try withPoints(0) { model in
            // From the 21st of November 2025, one point each 12 hours, 40 days long.
            let start = model.time
            for index in 0..<80 {
                model.time = start + Double(index) * 43200
                model.disks[0].bytes[index] = UInt8(index + 1)
                model.disks[0].changed = [0]
                try model.makePoint()
            }
            var rule = RetentionRule()
            (rule.daily, rule.weekly, rule.monthly, rule.yearly) = (3, 2, 2, 1)
            let lock = try model.repository.lockMachine(model.machine)
            let decisions = try model.repository.prune(model.machine, keeping: rule, holding: lock, isDryRun: true)
            let kept = decisions.filter { !$0.isRemoved }
            // Ends: 2025-12-30; the days before it; Sunday the 28th; the end of November.
            #expect(
                kept.map { String($0.point.time.description.prefix(10)) } == [
                    "2025-11-30", "2025-12-28", "2025-12-29", "2025-12-30",
                ])
            #expect(kept.last?.reasons == ["daily", "weekly", "monthly", "yearly"])
            #expect(try model.repository.points(of: model.machine).count == 80)
        }
    }

    @Test func aSuspectPointMakesTheNextOneSuspect() throws {
        try withPoints(3) { model in
            let points = try model.repository.points(of: model.machine)
            try model.repository.mark(points[0], .suspect, reason: "missed")
            _ = try model.prune(keepLast: 2)
            let marks = try model.repository.marks(of: try model.repository.find("2", of: model.machine))
            #expect(marks.map(\.kind) == [.suspect])
        }
    }

    /// Random changes, full and incremental points, growth and pruning in any order: always equal to the model.
    @Test func anyOrderOfChangesPointsAndPruningEqualsTheModel() throws {
        try withSeed { generator in
            for round in 0..<6 {
                try withTemporaryDirectory { directory in
                    let repository = try Repository.create(
                        at: directory.file("repository"), compression: round % 2 == 0 ? .none : .zstd)
                    var model = try ModelMachine(
                        repository, disks: [ModelDisk("vda", size: 1_000_000), ModelDisk("vdb", size: 200_000)],
                        seed: generator.next())
                    for step in 0..<12 {
                        if generator.oneIn(5) { model.disks[0].grow(to: model.disks[0].bytes.count + 100_000) }
                        model.change(Int.random(in: 0..<4, using: &generator))
                        try model.makePoint(full: generator.oneIn(6))
                        guard generator.oneIn(3) else { continue }
                        // Any point but the newest may go: the others are pinned.
                        let points = try repository.points(of: model.machine)
                        let chosen = Set(points.map(\.sequence).filter { _ in generator.oneIn(2) })
                        for point in points where !chosen.contains(point.sequence) {
                            try repository.mark(point, .pinned, reason: "")
                        }
                        _ = try model.prune(keepLast: 1)
                        for point in try repository.points(of: model.machine) { try repository.unmark(point, .pinned) }
                        try model.requireEqualPoints("round \(round), step \(step)")
                    }
                    for point in try repository.points(of: model.machine) where Tool.exists("qemu-img") {
                        _ = try Tool.output("qemu-img", ["check", try model.data(point, "vda")])
                    }
                }
            }
        }
    }

    /// What is damaged later than the points that go keeps all of them.
    @Test func nothingIsRemovedWhereALaterPointIsDamaged() throws {
        let damages: [(ModelMachine, [RestorePoint]) throws -> Void] = [
            { _, points in unlink(points[1].path) },
            { model, points in unlink(try model.data(points[3], "vdb")) },
            { model, points in try writeDurably(try model.data(points[2], "vda"), patternBytes(9999, seed: 1)) },
            { model, points in
                try writeDurably("\(model.data(points[2], "vda").dropLast(5))hashes", patternBytes(99, seed: 2))
            },
        ]
        for (index, damage) in damages.enumerated() {
            try withPoints(4, sizes: (200_000, 130_000)) { model in
                try damage(model, try model.repository.points(of: model.machine))
                let before = try allFiles("\(model.repository.path)/vms").filter { !$0.contains("/locks/") }
                try requireError(.corrupt, "damage \(index)") { _ = try model.prune(keepLast: 1) }
                let after = try allFiles("\(model.repository.path)/vms").filter { !$0.contains("/locks/") }
                #expect(after == before, "damage \(index)")
            }
        }
    }

    /// The manifest of the only point that is based on another is missing: its image tells.
    @Test func aFileThatAnImageIsBackedByStays() throws {
        try withPoints(2) { model in
            model.change(2)
            try model.makePoint(full: true)
            let points = try model.repository.points(of: model.machine)
            unlink(points[1].path)
            try requireError(.corrupt, "a base") { _ = try model.prune(keepLast: 1) }
            #expect(access(try model.data(points[0], "vda"), F_OK) == 0)
            #expect(try model.repository.find("1", of: model.machine).sequence == 1)
        }
    }

    @Test func oneUnreadableManifestIsNotInTheWayOfOthers() throws {
        try withPoints(3) { model in
            let points = try model.repository.points(of: model.machine)
            try writeDurably(points[1].path, Array("{".utf8))
            #expect(try model.repository.find("latest", of: model.machine).sequence == 3)
            #expect(try model.repository.summaries().map(\.sequence) == [1, 3])
            try requireError(.corrupt, "pruning") { _ = try model.prune(keepLast: 1) }
        }
    }

    /// Told to stop within a removal, which the next one finishes.
    @Test func pruningCanBeStopped() throws {
        try withPoints(5) { model in
            let (repository, machine) = (model.repository, model.machine)
            let cancellation = Cancellation()
            var rule = RetentionRule()
            rule.last = 1
            var begun = 0
            do {
                let lock = try repository.lockMachine(machine)
                try requireError(.shutdown, "pruning") {
                    _ = try repository.prune(machine, keeping: rule, holding: lock, cancellation: cancellation) { _ in
                        begun += 1
                        if begun == 2 { cancellation.cancel() }
                    }
                }
            }
            #expect(begun == 2)
            // The second one had not changed anything yet.
            #expect(try repository.points(of: machine).map(\.sequence) == [2, 3, 4, 5])
            #expect(try repository.unfinishedRemovals(of: machine).isEmpty)
            try model.requireEqualPoints("stopped")
            _ = try model.prune(keepLast: 1)
            try model.requireEqualPoints("finished")
            #expect(try repository.points(of: machine).map(\.sequence) == [5])
        }
    }

    /// What is wrong with one machine does not keep points of another one.
    @Test func oneDamagedMachineIsNotInTheWayOfOthers() throws {
        try withPoints(3) { model in
            var other = try ModelMachine(
                model.repository, disks: [ModelDisk("vda", size: 300_000)], seed: 3, id: "id-2", name: "mail")
            var third = try ModelMachine(
                model.repository, disks: [ModelDisk("vda", size: 300_000)], seed: 4, id: "id-3", name: "file")
            for _ in 0..<3 {
                other.change(2)
                try other.makePoint()
                third.change(2)
                try third.makePoint()
            }
            let point = try third.repository.find("2", of: third.machine)
            unlink(try third.data(point, "vda"))
            let words = ["prune", "--repository", model.repository.path, "--keep-last", "1"]
            let pruned = try Tool.run(Tool.diskgate, words)
            #expect(pruned.status == 1 && pruned.errors.contains("pruning file: point 2, disk vda, is damaged"))
            #expect(try model.repository.points(of: third.machine).count == 3)
            for machine in [model.machine, other.machine] {
                #expect(try model.repository.points(of: machine).map(\.sequence) == [3])
            }
            try model.requireEqualPoints("web")
            try other.requireEqualPoints("mail")
            // Of a machine that cannot be read nothing is known; the others go on.
            try writeDurably("\(model.repository.path)/vms/\(other.machine.directory)/machine.json", Array("{".utf8))
            #expect(try model.repository.machines().map(\.name) == ["file", "web"])
            #expect(try model.repository.summaries().allSatisfy { $0.machine != "mail" })
            try requireError(.notFound, "the machine") { _ = try model.repository.machine(named: "mail") }
            try requireError(.corrupt, "a second directory") {
                _ = try model.repository.enroll(id: "id-2", name: "mail")
            }
            _ = try model.repository.enroll(id: "id-4", name: "new")
            let again = try Tool.run(Tool.diskgate, words + ["--json"])
            #expect(again.status == 1 && again.errors.contains("machine.json"), "\(again)")
            #expect(again.output.contains("\"machine\" : \"web\""))
            let verified = try Tool.run(Tool.diskgate, ["verify", "--repository", model.repository.path])
            #expect(verified.status == 1 && verified.output.contains("machine.json"), "\(verified)")
        }
    }

    /// What a point holds grows with what is merged into it; what its run has stored does not.
    @Test func pointsTellWhatTheyHold() throws {
        try withTemporaryDirectory { directory in
            let repository = try Repository.create(at: directory.file("repository"))
            var model = try ModelMachine(repository, disks: [ModelDisk("vda", size: 4_000_000)], seed: 9)
            model.disks[0].bytes = patternBytes(4_000_000, seed: 1)
            try model.makePoint(full: true)
            model.disks[0].bytes[70_000] ^= 1
            model.disks[0].changed = [1]
            try model.makePoint()
            let before = try repository.summaries()
            #expect(before[0].bytesHeld >= 4_000_000 && before[1].bytesHeld < 1_000_000)
            _ = try model.prune(keepLast: 1)
            let after = try repository.summaries()
            #expect(after.count == 1 && after[0].bytesHeld >= 4_000_000 && after[0].bytesWritten == 65536)
        }
    }
}
