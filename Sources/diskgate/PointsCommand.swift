// `diskgate points`: the restore points of a repository; `pin` and `unpin`: which of them have to stay.
import ArgumentParser
import Backup
import Block

struct PointsCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "points", abstract: "List the restore points of a repository.",
        discussion:
            """
            Columns: machine, number, time (UTC), level, consistency, data that its run has stored, space that its \
            files take up now (with what was merged into them), beginning of the UUID, marks.
            """)

    @OptionGroup var repository: RepositoryArguments
    @OptionGroup var report: ReportArguments

    @Argument(help: "A machine; default: all.")
    var vm: String?

    @Flag(help: "Build the catalogue anew from the manifests.")
    var rescan = false

    func run() throws {
        let repository = try repository.open()
        let machine = try vm.map { try repository.machine(named: $0) }
        let points = try repository.summaries(of: machine, rescan: rescan)
        if report.json { return try printJSON(points) }
        let width = points.map(\.machine.count).max() ?? 0
        for point in points {
            let marks = (point.isPinned ? " pinned" : "") + (point.isSuspect ? " suspect" : "")
            print(
                "\(point.machine.padded(width)) \(String(point.sequence).paddedLeft(6)) "
                    + "\(point.time.description.padded(24)) "
                    + "\(point.level.rawValue.padded(11)) \(point.consistency.padded(16)) "
                    + "\(readable(point.bytesWritten).paddedLeft(10)) \(readable(point.bytesHeld).paddedLeft(10)) "
                    + "\(point.uuid.prefix(8))\(marks)")
        }
    }
}

/// One point of a repository, as an argument.
struct PointArguments: ParsableArguments {
    @OptionGroup var repository: RepositoryArguments

    @Option(help: "The machine; not needed where the repository has only one.")
    var vm: String?

    @Argument(
        help: """
            latest, a number, the beginning of a UUID, or a time in UTC (2026-11-21, 2026-11-21T04:20): the last point \
            up to then.
            """)
    var point: String

    func find() throws -> (repository: Repository, point: RestorePoint) {
        let repository = try repository.open()
        return (repository, try repository.find(point, of: try repository.machine(named: vm)))
    }
}

struct PinCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "pin", abstract: "Keep a restore point from being pruned.")

    @OptionGroup var arguments: PointArguments

    @Option(help: "Why, for people.")
    var reason = ""

    func run() throws {
        let (repository, point) = try arguments.find()
        try repository.mark(point, .pinned, reason: reason)
        writeError("diskgate: \(point.description) is pinned")
    }
}

struct UnpinCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "unpin", abstract: "Let a restore point be pruned again.")

    @OptionGroup var arguments: PointArguments

    func run() throws {
        let (repository, point) = try arguments.find()
        try repository.unmark(point, .pinned)
        writeError("diskgate: \(point.description) is not pinned")
    }
}
