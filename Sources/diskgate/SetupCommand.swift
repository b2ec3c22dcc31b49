// `diskgate setup`: keeps hot-added disks from this machine's own udev, LVM, mdadm and multipath, and checks that.
import ArgumentParser
import Block
import Glibc
import LinuxIO
import Transports

struct SetupCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "setup",
        abstract: "Keep this machine's own udev, LVM, mdadm and multipath from disks that are hot-added to it.",
        discussion: """
            Records which SCSI disks are this machine's own: the first time all that are in use, in fstab or crypttab, \
            or in a volume group with these, later only those that are named with --keep. The first time it refuses \
            while other disks with something on them are here, until --keep or --not-mine names each. All \
            others are kept out from then on: a udev rule, a filter for LVM, AUTO -all for \
            mdadm and a blacklist for multipath, as far as these are here. hotadd: sources and attach refuse to work \
            without. Done again, it changes only what has to be changed. Files that somebody has changed are left \
            alone. Exit status 1 when something is missing.
            """)

    @Flag(help: "Change nothing; tell what is in force and what is missing.")
    var check = false

    @Flag(help: "Take away what setup has written.")
    var remove = false

    @Option(
        help: ArgumentHelp(
            "Record this disk as this machine's own: /dev/NODE, serial=S, wwn=W or hctl=H:C:T:L. May be repeated.",
            valueName: "disk"))
    var keep: [String] = []

    @Option(
        help: ArgumentHelp(
            "This recorded disk is this machine's own no more. May be repeated.", valueName: "disk"))
    var drop: [String] = []

    @Option(
        help: ArgumentHelp(
            "Keep this disk out, although something lies on it. Asked for the first time only. May be repeated.",
            valueName: "disk"))
    var notMine: [String] = []

    @Flag(help: "With --remove: although disks are here that are kept out.")
    var force = false

    @Flag(help: "Make the initramfs anew where it has to be: it has a copy of the rule.")
    var initramfs = false

    @Option(
        help: ArgumentHelp(
            "Read and write the settings of the tree below this directory, and run no program.",
            valueName: "directory"))
    var root = ""

    @OptionGroup var state: StateArguments
    @OptionGroup var report: ReportArguments

    func validate() throws {
        if check && remove || (check || remove) && !(keep + drop + notMine).isEmpty {
            throw ValidationError("Give only one of --check, --remove, and --keep with --drop and --not-mine.")
        }
        if force && !remove { throw ValidationError("--force goes with --remove.") }
        if check && initramfs { throw ValidationError("--check changes nothing: leave out --initramfs.") }
    }

    func run() throws {
        let setup = try ProtectionSetup(
            HostProtection(root: root == "/" ? "" : root), stateDirectory: remove ? nil : state.directory)
        if remove {
            let done = try setup.remove(force: force, updatesImages: initramfs)
            if report.json { return try printJSON(["done": done]) }
            for line in done.isEmpty ? ["nothing to do"] : done { print(line) }
            return
        }
        let outcome =
            check
            ? try setup.check()
            : try setup.install(
                keep: keep.map(selector), drop: drop.map(selector), notMine: notMine.map(selector),
                updatesImages: initramfs)
        if report.json { try printJSON(outcome) } else { show(outcome) }
        for warning in outcome.warnings { writeError("diskgate: warning: \(warning)") }
        for problem in outcome.problems { writeError("diskgate: \(problem)") }
        if !outcome.isInForce { throw ExitCode(1) }
    }

    /// The disk that a user means, by who it is now.
    private func selector(_ text: String) throws -> DiskSelector {
        guard text.hasPrefix("/dev/") else { return try SourceReference.disk(text) }
        let node = try Descriptor.open(text, O_RDONLY | O_NONBLOCK)
        guard let address = try DiskInventory().disk(of: node).address else {
            throw BlockError(.invalid, "recording \(text): it is no SCSI disk, and nothing keeps it out")
        }
        return .address(address)
    }

    private func show(_ outcome: SetupOutcome) {
        for line in outcome.done { print(line) }
        print("this machine's own SCSI disks:\(outcome.ownDisks.isEmpty ? " none" : "")")
        for disk in outcome.ownDisks {
            let name = disk.wwid ?? "hctl=\(disk.hctl)\(disk.bus.map { " at \($0)" } ?? "")"
            print("  \(name)  \(disk.model ?? "")  \(readable(disk.size)): \(disk.reason)")
        }
        if !outcome.keptOut.isEmpty { print("SCSI disks that are here and kept out:") }
        for disk in outcome.keptOut {
            let name = disk.wwid ?? disk.serial.map { "serial=\($0)" } ?? "hctl=\(disk.hctl ?? "")"
            let use = disk.use.map { ", \($0): is it this machine's own? diskgate setup --keep \(disk.node)" } ?? ""
            print("  \(disk.node)  \(name)  \(readable(disk.size))\(use)")
        }
        for finding in outcome.findings {
            print("\(finding.part.rawValue.padded(10)) \(finding.state.rawValue.padded(11)) \(finding.detail)")
            if let remedy = finding.remedy { print("\("".padded(10)) \("to do:".padded(11)) \(remedy)") }
        }
    }
}
