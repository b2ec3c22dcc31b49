// kill -9 at every step of making and of removing points: what was there before stays right, and the next one goes on.
import Backup
import Block
import Glibc
import Hypervisors
import LinuxIO
import Support
import Testing
import Transports

@Suite(.serialized) struct CrashTests {
    /// Names of the steps that a body passes, each with how often it does.
    private func steps(_ log: String) throws -> [(name: String, count: Int)] {
        let lines = String(decoding: try contentOfFile(log), as: UTF8.self).split(separator: "\n").map(String.init)
        var steps: [(name: String, count: Int)] = []
        for line in lines {
            if let index = steps.firstIndex(where: { $0.name == line }) {
                steps[index].count += 1
            } else {
                steps.append((line, 1))
            }
        }
        return steps
    }

    private func makePoints(_ directory: TemporaryDirectory, _ name: String, _ count: Int) throws -> ModelMachine {
        let repository = try Repository.create(at: directory.file(name))
        var model = try ModelMachine(
            repository, disks: [ModelDisk("vda", size: 700_000), ModelDisk("vdb", size: 200_000)], seed: 17)
        for _ in 0..<count {
            model.change(3)
            try model.makePoint { $0.documents = [.init(name: "domain.xml", content: [1])] }
        }
        return model
    }

    @Test func pruningThatWasKilledIsFinishedByTheNextOne() throws {
        try withTemporaryDirectory(in: placeInMemory) { directory in
            let log = directory.file("log")
            let all = try makePoints(directory, "all", 4)
            let first = try all.copied(to: directory.file("first"))
            let words = ["prune", "--repository", first.repository.path, "--keep-last", "2"]
            _ = try Tool.output("env", ["DISKGATE_STEP_LOG=\(log)", Tool.diskgate] + words)
            let steps = try steps(log).filter { $0.name.hasPrefix("prune.") || $0.name.hasPrefix("merge.") }
            try require(steps.contains { $0.name == "prune.data-renamed" }, "\(steps)")
            for (name, count) in steps {
                for time in Set([1, count]) {
                    let model = try all.copied(to: directory.file("killed"))
                    let words = ["prune", "--repository", model.repository.path, "--keep-last", "2"]
                    let killed = try Tool.run("env", ["DISKGATE_STEP_KILL=\(name):\(time)", Tool.diskgate] + words)
                    try require(killed.status == 137, "\(name):\(time): status \(killed.status)")
                    try model.requireEqualPoints("killed at \(name):\(time)")
                    _ = try Tool.output(Tool.diskgate, words)
                    try model.requireEqualPoints("finished after \(name):\(time)")
                    let points = try model.repository.points(of: model.machine)
                    try require(points.map(\.sequence) == [3, 4], "\(name):\(time): \(points.map(\.sequence))")
                    let left = try allFiles(model.repository.path).filter {
                        $0.contains(".partial") || $0.contains(".doomed") || $0.contains("/000001")
                    }
                    try require(left.isEmpty, "\(name):\(time): \(left)")
                    for point in points {
                        let check = try Tool.run("qemu-img", ["check", try model.data(point, "vda")])
                        try require([0, 3].contains(check.status), "\(name):\(time): \(check.output)")
                    }
                    _ = try Tool.output("rm", ["-r", model.repository.path])
                }
            }
        }
    }

    /// Makes one more point in a process that is killed at a step.
    private func sealInAnotherProcess(_ path: String, state: String, _ variable: String) async throws -> Bool {
        let result = await #expect(processExitsWith: .failure) { [path, state, variable] in
            let parts = variable.split(separator: "=", maxSplits: 1).map(String.init)
            setenv(parts[0], parts[1], 1)
            let repository = try Repository.open(at: path)
            let machine = try repository.machine(named: nil)
            let ledger = try RunLedger.begin(stateDirectory: state, machine: "web", repository: path, runID: "run-9")
            let lock = try repository.lockMachine(machine)
            let parent = try repository.points(of: machine).last
            let writer = try repository.begin(
                PointRequest(
                    machine: machine, parent: parent,
                    disks: [
                        .init(id: "vda", size: 700_000, isIncremental: true),
                        .init(id: "vdb", size: 200_000, isIncremental: true),
                    ], run: "run-9", ledger: ledger), holding: lock)
            try writer.target(forDisk: "vda").zero(0..<65536)
            var facts = PointFacts(time: 2_000_000_000, consistency: .offline, tool: "test")
            facts.documents = [.init(name: "domain.xml", content: [2])]
            _ = try writer.seal(facts)
            exit(7)
        }
        return result?.exitStatus == .signal(SIGKILL)
    }

    @Test func aPointThatWasKilledIsThereWholeOrNotAtAll() async throws {
        var template = Array("\(placeInMemory ?? "/var/tmp")/diskgate-test-XXXXXX".utf8CString)
        try require(mkdtemp(&template) != nil, "making a directory")
        let directory = TemporaryDirectory(
            path: String(decoding: template.dropLast().map { UInt8(bitPattern: $0) }, as: UTF8.self))
        defer { _ = try? Tool.run("rm", ["-rf", directory.path]) }
        let log = directory.file("log")
        let all = try makePoints(directory, "all", 2)
        let first = try all.copied(to: directory.file("first"))
        #expect(
            try await !sealInAnotherProcess(
                first.repository.path, state: directory.file("state"), "DISKGATE_STEP_LOG=\(log)"))
        #expect(try first.repository.points(of: first.machine).count == 3)
        let steps = try steps(log).filter { $0.name.hasPrefix("seal.") || $0.name.hasPrefix("point.") }
        try require(steps.contains { $0.name == "seal.manifest-renamed" }, "\(steps)")
        for (name, count) in steps {
            var model = try all.copied(to: directory.file("killed"))
            let state = directory.file("state-\(name)")
            let wasKilled = try await sealInAnotherProcess(
                model.repository.path, state: state, "DISKGATE_STEP_KILL=\(name):\(count)")
            try require(wasKilled, name)
            let isCommitted = name == "seal.manifest-renamed"
            try require(
                try (model.repository.point(ofRun: "run-9", machine: model.machine) != nil) == isCommitted, name)
            for ledger in try RunLedger.takeAbandoned(stateDirectory: state).ledgers {
                for obligation in ledger.obligations {
                    try model.repository.settle(obligation)
                    try model.repository.settle(obligation)
                    try ledger.settle(obligation)
                }
                try ledger.end()
            }
            if isCommitted {
                for index in 0..<65536 { model.disks[0].bytes[index] = 0 }
                let points = try model.repository.points(of: model.machine)
                model.sealed(try #require(points.last))
            }
            try model.requireEqualPoints("killed at \(name)")
            let left = try allFiles(model.repository.path).filter {
                $0.contains(".partial") || !isCommitted && $0.contains("/000003")
            }
            try require(left.isEmpty, "\(name): \(left)")
            model.change(2)
            try model.makePoint()
            try model.requireEqualPoints("after \(name)")
            _ = try Tool.output("rm", ["-r", model.repository.path])
        }
    }

    @Test(.enabled(if: SmallFileSystem.isAvailable)) func aFullDiskFailsTheRunAndNothingElse() throws {
        try SmallFileSystem.with { directory in
            let repository = try Repository.create(at: directory.file("repository"))
            var model = try ModelMachine(repository, disks: [ModelDisk("vda", size: 2_000_000)], seed: 41)
            model.disks[0].bytes.replaceSubrange(0..<100_000, with: patternBytes(100_000, seed: 1))
            try model.makePoint()
            model.disks[0].bytes = patternBytes(2_000_000, seed: 2)
            model.disks[0].changed = Set(0..<31)
            let lock = try repository.lockMachine(model.machine)
            let writer = try model.begin(holding: lock)
            try requireError(.noSpace, "a full file system") {
                try model.disks[0].copy(to: try writer.target(forDisk: "vda"), isIncremental: true)
                _ = try writer.seal(PointFacts(time: 1, consistency: .offline, tool: "test"))
            }
            try writer.abandon()
            try model.requireEqualPoints("after a full file system")
            #expect(try repository.points(of: model.machine).count == 1)
        }
    }
}
