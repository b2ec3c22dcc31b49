// The command: its subcommands, how they fail, and the arguments that several of them share.
import ArgumentParser
import Backup
import Block
import FoundationEssentials
import Gateway
import Glibc
import Hypervisors
import LinuxIO
import NBD
import Transports

@main
struct DiskgateCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "diskgate",
        abstract: "Serve, map, read and back up the disks of virtual machines.",
        discussion: """
            A SOURCE is a path (disk.raw, disk.qcow2, /dev/sdb) or a URI: file:///PATH?format=raw|qcow2&direct=true\
            &exclusive=true, nbd://HOST/EXPORT and the other NBD URIs (nbds, nbd+unix, nbd+vsock, ...), \
            pattern:SIZE?seed=N&allocated=PERCENT%, memory:SIZE, \
            point:POINT?repository=DIRECTORY&vm=VM&disk=DISK, a disk that was hot-added to this machine \
            (hotadd:serial=S, hotadd:wwn=W, hotadd:hctl=H:C:T:L), a LUN (san:wwn=W) or a file \
            of a VMFS datastore (san:DATASTORE/PATH?snapshot=NAME). Sizes take K, M, G, T and P (powers of 1024). Data \
            goes to standard output, everything else to standard error. Exit status: 0 done, 1 failed, 2 usage, 3 done \
            but downgraded.
            """,
        version: "0.1.0",
        subcommands: [
            ServeCommand.self, InfoCommand.self, MapCommand.self, CatCommand.self, ChecksumCommand.self,
            CopyCommand.self, TrustCommand.self, ExportsCommand.self, ClientsCommand.self, BackupCommand.self,
            ProtectCommand.self, UnprotectCommand.self, ResetTrackingCommand.self, DoctorCommand.self,
            CreateRepositoryCommand.self, PointsCommand.self, VerifyCommand.self, RestoreCommand.self,
            PruneCommand.self, PinCommand.self, UnpinCommand.self, MountCommand.self, UnmountCommand.self,
            FreezeGuardCommand.self, SnapshotCommand.self, CheckpointsCommand.self, DisksCommand.self,
            AttachCommand.self, DetachCommand.self, LsCommand.self, CheckCommand.self, SetupCommand.self,
        ])

    static func main() {
        Repository.openPointSources()
        Hypervisors.openHotAddControllers()
        let status = perform()
        ProcessLeases.releaseAll()
        // What was asked for is done, and a disk stays added.
        Glibc.exit(status == 0 && ProcessLeases.hasLeft ? 3 : status)
    }

    /// Runs the command that the arguments name.
    ///
    /// - Returns: the exit status.
    private static func perform() -> Int32 {
        do {
            var command = try parseAsRoot()
            try command.run()
            return 0
        } catch let error as BlockError {
            writeError("diskgate: \(error.message)")
            return 1
        } catch let error as ExitCode {
            return error.rawValue
        } catch {
            let status = exitCode(for: error)
            let message = fullMessage(for: error)
            if status == .success {
                print(message)
                return 0
            }
            if !message.isEmpty { writeError(message) }
            // Argument errors are 64 in the library; a usage error is 2 here, as in every other Unix tool.
            return 2
        }
    }
}

/// Writes a line to standard error.
func writeError(_ text: String) {
    _ = "\(text)\n".withCString { write(STDERR_FILENO, $0, strlen($0)) }
}

/// Prints a value as JSON with sorted keys.
func printJSON(_ value: some Encodable) throws {
    let encoder = JSONEncoder()
    encoder.outputFormatting = [.prettyPrinted, .sortedKeys, .withoutEscapingSlashes]
    print(String(decoding: try encoder.encode(value), as: UTF8.self))
}

/// A number of bytes with K, M, G, T or P, as an argument.
struct ByteArgument: ExpressibleByArgument {
    let bytes: UInt64

    init?(argument: String) {
        guard let count = try? ByteCount(argument) else { return nil }
        bytes = count.bytes
    }
}

/// A source and the part of it that is meant, as every command that opens one takes it.
struct SourceArguments: ParsableArguments {
    @Argument(help: "A path or a URI of a disk.")
    var source: String

    @OptionGroup var alternatives: AlternativeArguments
    @OptionGroup var part: PartArguments
    @OptionGroup var trust: TrustArguments
    @OptionGroup var site: SiteArguments

    func specification() throws -> DiskSpecification {
        try site.apply()
        var disk = DiskSpecification(try SourceReference(source))
        disk.fingerprints = try trust.fingerprints()
        try alternatives.apply(to: &disk)
        part.apply(to: &disk)
        return disk
    }

    /// Opens the disk; of several sources the first that can be, and says on standard error why not those before it.
    func open() throws -> OpenedSource {
        let disk = try specification()
        try giveBackOnSignals(disk.sources)
        let chosen = try disk.openChosen()
        report(chosen.choice)
        return OpenedSource(device: chosen.opened, choice: chosen.choice)
    }
}

/// A disk that a command has opened, and which of its sources it came from.
struct OpenedSource {
    let device: any BlockDevice
    let choice: TransportChoice

    /// Ends a command whose work is done: with status 3 where the disk did not come as it was wanted most.
    func finish() throws { if choice.isDowngraded { throw ExitCode(3) } }
}

/// Says why a disk did not come as it was wanted most.
func report(_ choice: TransportChoice) {
    for reason in choice.reasons { writeError("diskgate: not over \(reason)") }
}

/// Other ways to the same disk.
struct AlternativeArguments: ParsableArguments {
    @Option(
        name: .customLong("or"),
        help: ArgumentHelp(
            "Another source of the same disk, taken when those before it cannot be opened and read from. May be "
                + "repeated.", valueName: "source"))
    var others: [String] = []

    @Option(
        help: ArgumentHelp(
            "Use these transports only, in this order: san:hotadd:nbdssl:nbd:file, or some of them.",
            valueName: "order"))
    var transports: String?

    func apply(to disk: inout DiskSpecification) throws {
        disk.alternatives = try others.map { try SourceReference($0) }
        disk.transports = try transports.map { try TransportOrder($0) }
    }
}

/// What is known of the site.
struct SiteArguments: ParsableArguments {
    @Option(
        help: ArgumentHelp(
            "What is known of the site, as JSON: limits of sessions, machines (default: DISKGATE_INVENTORY, or "
                + "/etc/diskgate/inventory.json where it is there).", valueName: "file"))
    var inventory: String?

    /// Makes it the inventory of this process.
    func apply() throws { if let inventory { try SiteInventory.use(inventory) } }
}

/// Which part of a disk is meant.
struct PartArguments: ParsableArguments {
    @Option(help: "Take this partition (GPT or MBR; logical ones from 5).")
    var partition: Int?

    @Option(help: ArgumentHelp("Leave out this many bytes at the start.", valueName: "bytes"))
    var offset: ByteArgument?

    @Option(help: ArgumentHelp("Take only this many bytes.", valueName: "bytes"))
    var length: ByteArgument?

    @Option(
        help: ArgumentHelp(
            "Let images name backing and data files beneath this directory, too, not only beneath their own. May be "
                + "repeated.",
            valueName: "directory"))
    var imageDirectory: [String] = []

    func apply(to disk: inout DiskSpecification) {
        disk.imageDirectories = imageDirectory
        disk.partition = partition
        disk.offset = offset?.bytes ?? 0
        disk.length = length?.bytes
    }
}

/// Which server is the right one, where the source is one behind TLS.
struct TrustArguments: ParsableArguments {
    @Option(
        help: ArgumentHelp(
            "Take the server's certificate with this digest only (see diskgate trust). May be repeated.",
            valueName: "sha256:HEX|sha1:HEX"))
    var fingerprint: [String] = []

    func fingerprints() throws -> [Fingerprint] { try fingerprint.map { try Fingerprint($0) } }
}

/// Whether a report is printed as JSON.
struct ReportArguments: ParsableArguments {
    @Flag(help: "Print JSON.")
    var json = false
}

/// Where a running server listens for control commands.
struct ControlArguments: ParsableArguments {
    @Option(help: ArgumentHelp("The control socket of the server.", valueName: "unix:path"))
    var control: String

    func send(_ request: ControlRequest) throws -> ControlReply {
        try ControlClient.send(request, to: ListenAddress(control, defaultPort: 0))
    }
}
