// `diskgate doctor`: what crashed runs have left behind, and its undoing.
import ArgumentParser
import Backup
import Block
import Hypervisors
import Transports

struct DoctorCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "doctor",
        abstract: "List what crashed runs have left behind, and give it back.",
        discussion: """
            Without --fix it only lists. Runs that are going on are shown, and never touched. The exit status is 1 \
            when something is left behind.
            """)

    @Flag(help: "Give back what runs that are over have left: bitmaps, exports, scratch files, half-made points.")
    var fix = false

    @Option(
        help: ArgumentHelp(
            "Give up what a run has left, without giving it back, where its machine or repository is gone for good: "
                + "RUN:NUMBER as listed, or RUN for all of it. May be repeated.", valueName: "id"))
    var forget: [String] = []

    @Option(help: ArgumentHelp("Only runs of this machine.", valueName: "machine"))
    var vm: String?

    @Option(
        help: ArgumentHelp(
            "Also removals of points of this repository that were interrupted.", valueName: "directory"))
    var repository: String?

    @OptionGroup var state: StateArguments
    @OptionGroup var report: ReportArguments

    func validate() throws {
        if !forget.isEmpty && (fix || vm != nil || repository != nil) {
            throw ValidationError("--forget does nothing else: leave out --fix, --vm and --repository")
        }
    }

    /// Gives up what the user has named.
    private func giveUp(_ doctor: Doctor) throws {
        var forgotten: [Obligation] = []
        defer { if report.json { try? printJSON(forgotten) } }
        for id in forget {
            let obligations = try doctor.forget(id)
            forgotten += obligations
            if report.json { continue }
            if obligations.isEmpty { print("forgotten: the ledger \(id), of which lines made no sense") }
            for obligation in obligations {
                print("forgotten: \(describe(obligation))")
                print("  \(obligation.price)")
            }
        }
    }

    func run() throws {
        let doctor = Doctor(stateDirectory: state.directory)
        if !forget.isEmpty { return try giveUp(doctor) }
        let (findings, problems) = fix ? try doctor.fix(machine: vm) : try doctor.list(machine: vm)
        let removals = try removals()
        if report.json {
            if repository == nil {
                try printJSON(findings)
            } else {
                try printJSON(Report(runs: findings, removals: removals))
            }
        } else {
            show(findings)
            for line in removals.finished { print(line) }
            for line in removals.unfinished { print("interrupted: the removal of \(line)") }
        }
        for problem in problems { writeError("diskgate: \(problem)") }
        if let warning = HostProtection().warning(about: findings.flatMap(\.obligations)) {
            writeError("diskgate: warning: \(warning)")
        }
        let isLeft =
            findings.contains { !$0.isGoingOn && (!$0.left.isEmpty || !$0.problems.isEmpty) }
            || !removals.unfinished.isEmpty || !problems.isEmpty
        if isLeft { throw ExitCode(1) }
    }

    private struct Report: Encodable {
        var runs: [Doctor.Finding]
        var removals: Removals
    }

    private struct Removals: Encodable {
        var finished: [String] = []
        var unfinished: [String] = []
    }

    private func removals() throws -> Removals {
        guard let repository else { return Removals() }
        let place = try Repository.open(at: repository) { writeError("diskgate: warning: \($0)") }
        var removals = Removals()
        let machines = try vm.map { [try place.machine(named: $0)] } ?? place.machines()
        for machine in machines {
            if fix {
                do throws(BlockError) { removals.finished += try place.finishInterruptedRemovals(of: machine) } catch {
                    writeError("diskgate: \(error.message)")
                }
            }
            removals.unfinished += try place.unfinishedRemovals(of: machine).map(\.description)
        }
        return removals
    }

    private func show(_ findings: [Doctor.Finding]) {
        if findings.isEmpty { return print("nothing is left behind in \(state.directory)") }
        for finding in findings {
            let going = finding.isGoingOn ? ", going on in process \(finding.run.process)" : ""
            print("run \(finding.run.id) of \(finding.run.machine)\(going)")
            for obligation in finding.settled { print("  given back: \(describe(obligation))") }
            for obligation in finding.obligations {
                let number = "left as number \(obligation.id)"
                let state = finding.isGoingOn ? "in use" : obligation.isHeldByHand ? "attached by hand" : number
                print("  \(state): \(describe(obligation))")
            }
            for problem in finding.problems { print("  problem: \(problem)") }
            if fix && !finding.isGoingOn && (!finding.left.isEmpty || !finding.problems.isEmpty) {
                print("  only where it can never be given back: diskgate doctor --forget \(finding.run.id)[:NUMBER]")
            }
            if !finding.isGoingOn && !finding.left.isEmpty && !fix {
                print("  give it back with: diskgate doctor --fix --state-directory \(state.directory)")
            }
        }
    }

    private func describe(_ obligation: Obligation) -> String {
        let details = obligation.details.sorted { $0.key < $1.key }.map { "\($0.key) \($0.value)" }
        return ([obligation.kind] + details).joined(separator: ", ")
    }
}
