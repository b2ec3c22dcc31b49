// `diskgate verify`: whether restore points are what they were when they were made.
import ArgumentParser
import Backup
import Block

struct VerifyCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "verify", abstract: "Check restore points: manifests, lineage, files, every hash.",
        discussion: """
            Of all points together, each chunk is read once, where it is stored; of one point alone, all that it reads \
            as. The exit status is 1 when anything is wrong.
            """)

    @OptionGroup var repository: RepositoryArguments
    @OptionGroup var report: ReportArguments

    @Argument(help: "A machine; default: all.")
    var vm: String?

    @Argument(help: "A point of it; default: all.")
    var point: String?

    func run() throws {
        let repository = try repository.open()
        let machine = try vm.map { try repository.machine(named: $0) }
        var chosen: RestorePoint?
        if let point, let machine { chosen = try repository.find(point, of: machine) }
        let line = PercentLine("verifying", isShown: !report.json)
        let total = try repository.summaries(of: machine).reduce(0) { $0 &+ $1.size }
        var done: UInt64 = 0
        let found = try repository.verify(machine, point: chosen) { bytes in
            done += bytes
            line.show(min(done, total), of: total)
        }
        line.end()
        if report.json { try printJSON(found) } else { print(found) }
        if !found.problems.isEmpty { throw ExitCode(1) }
    }

    private func print(_ found: VerificationReport) {
        for problem in found.problems {
            let place = [
                problem.machine, problem.point.map { "point \($0)" }, problem.disk.map { "disk \($0)" }, problem.file,
            ]
            Swift.print("wrong: " + place.compactMap { $0 }.joined(separator: ", ") + ": " + problem.problem)
        }
        for note in found.notes { Swift.print("note: \(note)") }
        let result = found.problems.isEmpty ? "all is well" : "\(found.problems.count) problems"
        Swift.print("\(found.points) points, \(readable(found.bytes)) compared: \(result)")
    }
}
