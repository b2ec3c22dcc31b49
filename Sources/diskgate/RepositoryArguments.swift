// What the commands that work with a repository have in common: which one, which machine, how far they are.
import ArgumentParser
import Backup
import Block
import Glibc

/// Which repository is meant.
struct RepositoryArguments: ParsableArguments {
    @Option(help: ArgumentHelp("The repository.", valueName: "directory"))
    var repository: String

    func open() throws -> Repository {
        try Repository.open(at: repository) { writeError("diskgate: warning: \($0)") }
    }
}

/// A point as reports have it.
struct PointReport: Encodable {
    var machine: String
    var point: Int
    var uuid: String
    var time: String

    init(_ point: RestorePoint) {
        machine = point.machine.name
        self.point = point.sequence
        uuid = point.uuid
        time = point.time.description
    }
}

/// How far work is, on standard error: one line that changes on a terminal, nothing elsewhere.
final class PercentLine {
    private let what: String
    private let isShown: Bool
    private var shown = -1

    init(_ what: String, isShown: Bool) {
        self.what = what
        self.isShown = isShown && isatty(STDERR_FILENO) == 1
    }

    func show(_ done: UInt64, of total: UInt64) {
        guard isShown, total > 0 else { return }
        let percent = Int(Double(done) / Double(total) * 100)
        if percent == shown { return }
        shown = percent
        write("\r\(what): \(percent) %")
    }

    func end() { if isShown && shown >= 0 { write("\n") } }

    private func write(_ text: String) { _ = text.withCString { Glibc.write(STDERR_FILENO, $0, strlen($0)) } }
}
