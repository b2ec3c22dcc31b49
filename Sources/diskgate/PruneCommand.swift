// `diskgate prune`: removes restore points that no rule keeps, without writing any other point anew.
import ArgumentParser
import Backup
import Block
import LinuxIO

struct PruneCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "prune", abstract: "Remove restore points that no rule keeps.",
        discussion: """
            A point is kept when one of the rules keeps it, when it is pinned or open somewhere, and when it is the \
            newest. Days, weeks (from Monday), months and years are those of UTC; each keeps its newest point. What a \
            removed point holds and the next one needs goes into that one, in place.
            """)

    @OptionGroup var repository: RepositoryArguments
    @OptionGroup var report: ReportArguments

    @Argument(help: "A machine; default: all.")
    var vm: String?

    @OptionGroup var keep: RetentionArguments

    @Flag(help: "Only tell what would be done.")
    var dryRun = false

    @Flag(help: "Wait for a backup of the machine that is going on.")
    var wait = false

    private struct Report: Encodable {
        var point: PointReport
        var removed: Bool
        var reasons: [String]
        var mergedInto: Int?
        var spaceNeeded: UInt64
    }

    func validate() throws {
        if keep.rule == nil { throw ValidationError("Say what to keep: --keep-last, --keep-daily, ...") }
    }

    func run() throws {
        let cancellation = Cancellation()
        try cancelOnSignal(cancellation)
        let repository = try repository.open()
        var reports: [Report] = []
        let machines = try vm.map { [try repository.machine(named: $0)] } ?? repository.machines()
        // Those that cannot be read were warned of.
        var isIncomplete = try vm == nil && !repository.unreadableMachines().isEmpty
        for machine in machines where !cancellation.isCancelled {
            // What is wrong with one machine is no reason to leave the others as they are.
            do throws(BlockError) { reports += try prune(machine, in: repository, cancellation) } catch {
                writeError("diskgate: \(error.message)")
                isIncomplete = true
            }
        }
        if report.json { try printJSON(reports) }
        if isIncomplete || cancellation.isCancelled { throw ExitCode(1) }
    }

    private func prune(_ machine: RepositoryMachine, in repository: Repository, _ cancellation: Cancellation)
        throws(BlockError) -> [Report]
    {
        let lock = try repository.lockMachine(machine, wait: wait)
        defer { withExtendedLifetime(lock) {} }
        let decisions = try repository.prune(
            machine, keeping: keep.rule ?? RetentionRule(), holding: lock, isDryRun: dryRun, cancellation: cancellation
        ) { writeError("diskgate: removing \($0.point.description)") }
        if !report.json { for decision in decisions { print(decision) } }
        return decisions.map {
            Report(
                point: PointReport($0.point), removed: $0.isRemoved, reasons: $0.reasons, mergedInto: $0.into,
                spaceNeeded: $0.spaceNeeded)
        }
    }

    private func print(_ decision: PruneDecision) {
        let what: String
        if decision.isRemoved {
            let target = decision.into.map { ", merged into point \($0)" } ?? ""
            let space = dryRun && decision.spaceNeeded > 0 ? " (up to \(readable(decision.spaceNeeded)) meanwhile)" : ""
            what = (dryRun ? "would be removed" : "removed") + target + space
        } else {
            what = "kept: " + decision.reasons.joined(separator: ", ")
        }
        Swift.print("\(decision.point.description): \(what)")
    }
}
