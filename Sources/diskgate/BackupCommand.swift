// `diskgate backup`: arguments to a run, its report, and what to keep afterwards.
import ArgumentParser
import Backup
import Block
import Glibc
import Hypervisors
import Transports

struct BackupCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "backup",
        abstract: "Back up a virtual machine: in full once, then what has changed.",
        discussion: """
            One point in time of all disks is taken and read while the machine runs; what it holds becomes a restore \
            point of the repository, which is made where it is missing. Only blocks that have changed since the point \
            before are read, as long as the hypervisor knows them; otherwise the disk is read whole, and the exit \
            status is 3. Whatever the run makes on the hypervisor is given back at its end; after a crash, by the \
            next run or by diskgate doctor --fix.
            """)

    @OptionGroup var machine: MachineArguments
    @OptionGroup var site: SiteArguments
    @OptionGroup var state: StateArguments
    @OptionGroup var report: ReportArguments

    @Option(
        help: ArgumentHelp(
            "A disk of a machine disks:NAME, which no hypervisor is asked about, and where it is. May be repeated.",
            valueName: "id=source"))
    var source: [String] = []

    @Option(
        name: .customLong("or"),
        help: ArgumentHelp(
            "Another source of such a disk, or of one of the inventory, taken when those before it cannot be opened "
                + "and read from. May be repeated.",
            valueName: "id=source"))
    var others: [String] = []

    @Option(
        help: ArgumentHelp(
            "For a machine disks:NAME: use these transports only, in this order: san:hotadd:nbdssl:nbd:file, or some "
                + "of them.", valueName: "order"))
    var transports: String?

    @Option(help: ArgumentHelp("The repository's directory; made where it is missing.", valueName: "directory"))
    var repository: String

    @Option(
        help: ArgumentHelp(
            "Only this disk, by its id or name, * for any characters. May be repeated.", valueName: "pattern"))
    var disk: [String] = []

    @Option(help: ArgumentHelp("Not this disk. May be repeated.", valueName: "pattern"))
    var exclude: [String] = []

    @Flag(help: "Read all of each disk, whatever is known about changes.")
    var full = false

    @Flag(help: "Only print what would be done.")
    var dryRun = false

    @Option(
        help: ArgumentHelp(
            "Freeze the guest's file systems for the moment of the snapshot: if-possible, required or never.",
            valueName: "when"), transform: quiescing)
    var quiesce = Quiescing.ifPossible

    @Option(help: ArgumentHelp("Thaw after this time, whatever happens: 1 to 600.", valueName: "seconds"))
    var freezeSeconds = 20

    @Option(
        help: ArgumentHelp(
            "Where the hypervisor keeps copies of what the guest overwrites during the run.", valueName: "directory"))
    var scratch: String?

    @Option(
        help: ArgumentHelp(
            "Fail, before the guest suffers, when less than this is left there (default 1G).", valueName: "bytes"))
    var scratchReserve: ByteArgument?

    @Option(
        help: ArgumentHelp(
            "Read so much of each disk again that is said to be unchanged, and compare (default: a quarter of what is "
                + "copied, 16M to 256M; 0 for nothing).", valueName: "bytes"))
    var sample: ByteArgument?

    @Flag(help: "Read everything again that is said to be unchanged, and compare.")
    var verify = false

    @Option(help: ArgumentHelp("Read each disk over so many connections: 1 to 16.", valueName: "count"))
    var workers: Int?

    @Option(help: ArgumentHelp("Wait so long for another run of the machine to end.", valueName: "seconds"))
    var wait = 0

    @Option(
        help: ArgumentHelp(
            "Run this shell command at the end: DISKGATE_RESULT is done, downgraded or failed, the report comes as "
                + "JSON on standard input.", valueName: "command"))
    var hook: String?

    @OptionGroup var keep: RetentionArguments

    func validate() throws {
        if !(1...600).contains(freezeSeconds) {
            throw ValidationError("--freeze-seconds \(freezeSeconds): give 1 to 600")
        }
        if let workers, !(1...16).contains(workers) { throw ValidationError("--workers \(workers): give 1 to 16") }
        if wait < 0 { throw ValidationError("--wait \(wait): give 0 or more seconds") }
        if !source.isEmpty && !(disk + exclude).isEmpty {
            throw ValidationError("--source names the disks already: leave out --disk and --exclude")
        }
        if verify && sample != nil { throw ValidationError("--verify checks everything: leave out --sample") }
    }

    func run() throws {
        try site.apply()
        var request = BackupRequest(
            machine: try Hypervisors.machine(machine.vm, withDisks: source, or: others, transports: transports),
            repository: repository, stateDirectory: state.directory)
        request.disks = DiskSelection(included: disk, excluded: exclude)
        request.isFull = full
        request.quiescing = quiesce
        request.freezeSecondsMax = freezeSeconds
        request.scratchDirectory = scratch
        if let scratchReserve { request.scratchReserve = scratchReserve.bytes }
        if let sample { request.sampling = .bytes(sample.bytes) }
        if verify { request.sampling = .everything }
        request.workers = workers
        request.waitSeconds = wait
        request.tool = "diskgate \(DiskgateCommand.configuration.version)"
        request.retention = keep.rule
        if dryRun {
            try giveBackOnSignals()
            return try show(try BackupRun(request, cancellation: Cancellation()).plan())
        }
        let cancellation = Cancellation()
        try cancelOnSignal(cancellation)
        let reporter = ProgressReporter(report.json ? .json : .automatic, subject: "backup")
        var current: String?
        let run = BackupRun(request, cancellation: cancellation) { disk, progress in
            if disk != current { reporter.begin("disk \(disk)") }
            current = disk
            reporter.update(progress)
        }
        var outcome = run.run()
        reporter.finish()
        if let hook, let problem = RunHook.run(hook, outcome) { outcome.warnings.append(problem) }
        try show(outcome)
        switch outcome.outcome {
        case .done, .planned: return
        case .downgraded: throw ExitCode(3)
        case .failed: throw ExitCode(1)
        }
    }

    private func show(_ outcome: RunReport) throws {
        if report.json { try printJSON(outcome) } else { print(outcome.text) }
    }
}

/// When to freeze, as an argument.
private func quiescing(_ text: String) throws -> Quiescing {
    if let quiescing = Quiescing(rawValue: text) { return quiescing }
    throw ValidationError("--quiesce \(text): give " + Quiescing.allCases.map(\.rawValue).joined(separator: ", "))
}

/// Which machine is meant.
struct MachineArguments: ParsableArguments {
    @Option(
        help: ArgumentHelp(
            "The virtual machine: qmp+unix:PATH, qmp+tcp:HOST:PORT, libvirt:URI/DOMAIN, disks:NAME.",
            valueName: "machine"))
    var vm: String
}

/// Where runs keep their ledgers.
struct StateArguments: ParsableArguments {
    @Option(
        help: ArgumentHelp(
            "Where runs note what they have to give back (default: /var/lib/diskgate for root).",
            valueName: "directory"))
    var stateDirectory: String?

    /// Makes it that of this process and of those that it starts, in every command that has the option and before
    /// anything is opened: disks that are added for the command are noted there, and sessions counted there, too.
    func validate() throws {
        guard let stateDirectory else { return }
        if stateDirectory.isEmpty { throw ValidationError("--state-directory: give the name of a directory.") }
        setenv("DISKGATE_STATE_DIRECTORY", stateDirectory, 1)
    }

    /// The directory, which is the same one for whoever asks.
    var directory: String { defaultStateDirectory() }
}
