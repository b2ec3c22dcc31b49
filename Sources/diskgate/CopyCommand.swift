// `diskgate copy`: a disk, or what changed of it, to a file, a block device, a server or standard output.
import ArgumentParser
import Backup
import Block
import CLinux
import Glibc
import LinuxIO
import Transports

struct CopyCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "copy",
        abstract: "Copy a disk, or what changed of it.",
        discussion: """
            DESTINATION is a file, a block device, an NBD URI, or - for standard output. A new file is named \
            DESTINATION.partial until it is complete. Zeros become holes where the destination can have them; the copy \
            equals the source bit for bit.
            """)

    @OptionGroup var source: SourceArguments
    @OptionGroup var report: ReportArguments

    @Argument(help: "Where to copy to.")
    var destination: String

    @Option(help: "The format to write: raw, qcow2 or stream-optimized-vmdk.")
    var toFormat: String?

    @Flag(help: "Compress a qcow2 image (zstd).")
    var compress = false

    @Option(
        help: ArgumentHelp(
            "Copy only what this dirty bitmap of the source says, onto a copy that is there.", valueName: "context"))
    var changed: String?

    @Flag(help: "Read source and copy again, all of them, and compare them.")
    var verify = false

    @Flag(help: "Go on with a copy that was interrupted.")
    var resume = false

    @Flag(help: "Replace what is there, or begin an interrupted copy anew.")
    var force = false

    @Option(help: ArgumentHelp("Read with this many workers (1 to 16).", valueName: "n"))
    var workers: Int?

    @Option(help: ArgumentHelp("Try so often when reading fails; 0 gives up at once.", valueName: "n"))
    var retries = 5

    @Option(help: ArgumentHelp("Read at most this many bytes per second.", valueName: "bytes"))
    var limitRate: ByteArgument?

    @Option(
        help: ArgumentHelp(
            "Keep the journal here instead of beside the destination; block devices and servers have one only so.",
            valueName: "file"))
    var journal: String?

    @Option(
        help: ArgumentHelp(
            "Make what is copied durable, and note it in the journal, after this many bytes (and every 10 s).",
            valueName: "bytes"))
    var journalEvery: ByteArgument?

    @Flag(help: "Do not wait for the storage: a new file is complete when the system has all of it in memory.")
    var noFlush = false

    @Flag(help: "Write zeros among the data as they are, instead of as holes.")
    var keepZeros = false

    func run() throws {
        let request = try self.request()
        let cancellation = Cancellation()
        let isStream = request.destination == .stream
        // The reader of a pipe that has enough ends the copy, which then can say so.
        signal(SIGPIPE, SIG_IGN)
        try cancelOnSignal(cancellation)
        let reporter = ProgressReporter(report.json ? .json : .automatic, subject: "copy")
        let result = try CopyJob.run(request, reporter: reporter, cancellation: cancellation)
        if report.json && !isStream {
            try printJSON(result)
        } else {
            let text = summary(result)
            if isStream { writeError(text) } else { print(text) }
        }
        for downgrade in result.downgrades { writeError("diskgate: \(downgrade)") }
        if !result.downgrades.isEmpty { throw ExitCode(3) }
    }

    private func request() throws -> CopyRequest {
        var request = CopyRequest(try source.specification(), to: try CopyDestination(destination))
        request.format = try format(of: request.destination)
        request.changed = changed
        request.compresses = compress
        request.verifies = verify
        request.resumes = resume
        request.forces = force
        request.journal = journal
        request.options.workers = workers
        request.options.retries = max(0, retries)
        request.options.bytesPerSecondMax = limitRate?.bytes
        request.options.detectsZeros = !keepZeros
        request.options.isDurable = !noFlush
        if let journalEvery { request.options.checkpointBytes = max(journalEvery.bytes, 1) }
        return request
    }

    private func format(of destination: CopyDestination) throws -> CopyFormat {
        guard let format = CopyFormat(rawValue: toFormat ?? "raw") else {
            throw ValidationError(
                "--to-format \(toFormat ?? "") is no format that can be written: raw, qcow2, "
                    + "stream-optimized-vmdk")
        }
        if compress && format != .qcow2 { throw ValidationError("--compress needs --to-format qcow2") }
        if case .file(let path) = destination, toFormat == nil,
            let suffix = [".qcow2", ".vmdk", ".vdi", ".vhdx"].first(where: { path.hasSuffix($0) })
        {
            throw ValidationError(
                "\(path) ends in \(suffix), but a raw disk would be written there: say "
                    + "--to-format with raw or another format"
            )
        }
        return format
    }

    private func summary(_ result: CopyReport) -> String {
        var parts = ["\(readable(result.bytesWritten)) written"]
        if result.bytesCloned > 0 { parts.append("\(readable(result.bytesCloned)) shared with the source") }
        if result.bytesZeroed > 0 { parts.append("\(readable(result.bytesZeroed)) made zero") }
        if result.bytesResumed > 0 { parts.append("\(readable(result.bytesResumed)) done before") }
        if let compared = result.bytesVerified { parts.append("\(readable(compared)) verified") }
        if result.retries > 0 { parts.append("\(result.retries) retries") }
        if result.reconnects > 0 { parts.append("\(result.reconnects) reconnections") }
        let rate = result.seconds > 0 ? Double(result.bytesRead + result.bytesCloned) / result.seconds : 0
        return "\(result.destination): \(parts.joined(separator: ", ")) of \(readable(result.size)) in "
            + "\(decimals(result.seconds, 2)) s (\(readable(UInt64(rate)))/s)"
    }
}
