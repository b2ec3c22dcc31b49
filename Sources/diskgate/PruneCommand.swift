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
    }

    func validate() throws {
        if keep.rule == nil { throw ValidationError("Say what to keep: --keep-last, --keep-daily, ...") }
    }

    func run() throws {
        let repository = try repository.open()
        let rule = keep.rule ?? RetentionRule()
        var reports: [Report] = []
        let machines = try vm.map { [try repository.machine(named: $0)] } ?? repository.machines()
        var isIncomplete = false
        for machine in machines {
            let lock: FileLock
            do throws(BlockError) { lock = try repository.lockMachine(machine, wait: wait) } catch {
                if vm != nil || error.kind != .denied { throw error }
                writeError("diskgate: \(error.message)")
                isIncomplete = true
                continue
            }
            let decisions = try repository.prune(machine, keeping: rule, holding: lock, isDryRun: dryRun) { decision in
                writeError("diskgate: removing \(decision.point.description)")
            }
            withExtendedLifetime(lock) {}
            for decision in decisions {
                reports.append(
                    Report(
                        point: PointReport(decision.point), removed: decision.isRemoved, reasons: decision.reasons,
                        mergedInto: decision.into))
                if !report.json { print(decision) }
            }
        }
        if report.json { try printJSON(reports) }
        if isIncomplete { throw ExitCode(1) }
    }

    private func print(_ decision: PruneDecision) {
        let what: String
        if decision.isRemoved {
            let target = decision.into.map { ", merged into point \($0)" } ?? ""
            what = (dryRun ? "would be removed" : "removed") + target
        } else {
            what = "kept: " + decision.reasons.joined(separator: ", ")
        }
        Swift.print("\(decision.point.description): \(what)")
    }
}
