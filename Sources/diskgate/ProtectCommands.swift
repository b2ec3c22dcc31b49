// `diskgate protect`, `unprotect` and `reset-cbt`: change tracking of a machine on, off, and anew.
import ArgumentParser
import Backup
import Block
import Hypervisors

struct ProtectCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "protect",
        abstract: "Prepare a virtual machine so that its next backup can be followed by incremental ones.",
        discussion: "A backup does the same by itself. Done twice, it changes nothing.")

    @Argument(help: "The virtual machine: qmp+unix:PATH, qmp+tcp:HOST:PORT, libvirt:URI/DOMAIN.")
    var machine: String
    @OptionGroup var report: ReportArguments

    func run() throws { try tell(try Hypervisors.open(machine).protect(), report) }
}

struct UnprotectCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "unprotect",
        abstract: "Remove all change tracking that diskgate has made on a virtual machine, and nothing else.",
        discussion: "Restore points stay. The next backup is a full one.")

    @Argument(help: "The virtual machine: qmp+unix:PATH, qmp+tcp:HOST:PORT, libvirt:URI/DOMAIN.")
    var machine: String
    @OptionGroup var report: ReportArguments

    func run() throws { try tell(try Hypervisors.open(machine).unprotect(), report) }
}

struct ResetTrackingCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "reset-cbt",
        abstract: "Forget all changes known so far of a virtual machine: its next backup is a full one.")

    @Argument(help: "The virtual machine: qmp+unix:PATH, qmp+tcp:HOST:PORT, libvirt:URI/DOMAIN.")
    var machine: String
    @OptionGroup var report: ReportArguments

    func run() throws { try tell(try Hypervisors.open(machine).resetTracking(), report) }
}

/// Prints what was done, a line for each thing.
private func tell(_ done: [String], _ report: ReportArguments) throws {
    if report.json { return try printJSON(["done": done]) }
    for line in done.isEmpty ? ["nothing to do"] : done { print(line) }
}
