// `diskgate serve`: arguments to a request for the service.
import ArgumentParser
import Block
import Gateway
import Glibc
import LinuxIO
import Logging
import NBD
import Transports

struct ServeCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "serve",
        abstract: "Serve disks over NBD.",
        discussion: """
            Without --listen it listens on tcp://127.0.0.1:10809. One source is the default export (the empty name); \
            of several, each has its file name and the first is also the default. Any number of clients may use an \
            export: a write that was answered is seen by all of them, and a flush on any connection makes durable \
            every write answered before on any other.
            """)

    @Argument(help: "Paths or URIs of disks.")
    var sources: [String] = []

    @Option(help: "Name of the export; once per source, in the same order.")
    var name: [String] = []

    @Option(help: "Text about the export for people; once per source.")
    var description: [String] = []

    @Option(
        help: ArgumentHelp(
            "Listen here: unix:PATH, tcp://HOST:PORT or vsock:PORT. May be repeated.", valueName: "address"))
    var listen: [String] = []

    @Flag(help: "Let clients write to the source.")
    var writable = false

    @Flag(help: "Let clients write to scratch space over the source, which stays as it is.")
    var overlay = false

    @Option(
        help: ArgumentHelp(
            "Where --overlay keeps what is written, and snapshots what is overwritten.", valueName: "directory"))
    var scratch: String?

    @Option(
        help: ArgumentHelp(
            "With --writable: keep checkpoints here, so that diskgate snapshot can be used. Nobody else may write "
                + "the disk meanwhile.",
            valueName: "directory"))
    var checkpoints: String?

    @Option(
        help: ArgumentHelp(
            "What snapshots leave free where they keep what is overwritten (default: 5 %, at most 1G).",
            valueName: "bytes"))
    var scratchReserve: ByteArgument?

    @OptionGroup var alternatives: AlternativeArguments
    @OptionGroup var part: PartArguments
    @OptionGroup var trust: TrustArguments
    @OptionGroup var site: SiteArguments

    @Option(help: ArgumentHelp("Show this size, cut off or with zeros at the end.", valueName: "bytes"))
    var size: ByteArgument?

    @Option(help: ArgumentHelp("Round the size up to a multiple of this power of two.", valueName: "bytes"))
    var roundSize: ByteArgument?

    @Option(
        help: ArgumentHelp(
            "Admit these clients only: \(AllowRule.forms). May be repeated.", valueName: "rule"))
    var allow: [String] = []

    @Option(help: ArgumentHelp("Wait before every read, for tests.", valueName: "milliseconds"))
    var delayRead: UInt32 = 0

    @Option(help: ArgumentHelp("Wait before every write, for tests.", valueName: "milliseconds"))
    var delayWrite: UInt32 = 0

    @Option(
        help: ArgumentHelp(
            "Inject a fault, for tests: KIND[@START-END][%PERCENT], KIND read-error, write-error, no-space, "
                + "flush-error or corruption; END is not included. May be repeated.",
            valueName: "fault"))
    var fault: [String] = []

    @Option(
        help: ArgumentHelp(
            "Only clients of this rule may list the exports; none: nobody. May be repeated.", valueName: "rule"))
    var allowList: [String] = []

    @OptionGroup var tls: TLSServerArguments

    @Option(help: ArgumentHelp("Listen for control commands here.", valueName: "unix:path"))
    var control: String?

    @Option(
        help: ArgumentHelp(
            "Answer Prometheus here, over HTTP at /metrics: unix:PATH or tcp://HOST:PORT.", valueName: "address"))
    var metrics: String?

    @Flag(help: "Let other machines read the metrics, in clear text.")
    var metricsRemote = false

    @OptionGroup(title: "Limits") var limits: LimitArguments

    @Option(help: ArgumentHelp("Time that clients have to go when the server stops.", valueName: "seconds"))
    var grace = 10.0

    @Flag(help: "Stop when the last client has gone.")
    var exitWithLast = false

    @Option(
        name: .customLong("run"),
        help: ArgumentHelp(
            "Run a shell command with $uri, $unixsocket or $port, and $exportname set; stop when it ends, with its "
                + "exit status. Without --listen on a private Unix socket.",
            valueName: "command"))
    var command: String?

    @Flag(help: "Serve one client on standard input and output, unless a socket was handed over (LISTEN_FDS).")
    var stdio = false

    @Flag(name: .shortAndLong, help: "Tell about every client.")
    var verbose = false

    @Flag(name: .shortAndLong, help: "Tell about errors only.")
    var quiet = false

    func validate() throws {
        if writable && overlay { throw ValidationError("--writable and --overlay exclude each other.") }
        if checkpoints != nil && !writable && !sources.isEmpty {
            throw ValidationError("--checkpoints is for exports that clients write to: give --writable.")
        }
        if sources.isEmpty && control == nil {
            throw ValidationError("Give a source to serve, or --control to add some later.")
        }
        if !alternatives.others.isEmpty && (sources.count != 1 || checkpoints != nil) {
            throw ValidationError("--or names the disk of one source again, and that without --checkpoints.")
        }
        if name.count > sources.count { throw ValidationError("There are more names than sources.") }
        if description.count > sources.count { throw ValidationError("There are more descriptions than sources.") }
        if stdio && (!listen.isEmpty || command != nil || control != nil || exitWithLast || metrics != nil) {
            throw ValidationError(
                "--stdio serves one client where it stands: no --listen, --run, --control, --metrics or "
                    + "--exit-with-last.")
        }
        if !(0...3600).contains(grace) { throw ValidationError("--grace is 0 to 3600 seconds.") }
        if max(delayRead, delayWrite) > 600_000 { throw ValidationError("A delay is at most 600000 milliseconds.") }
    }

    func run() throws {
        let status = try ServeService(request()).run()
        if status != 0 { throw ExitCode(status) }
    }

    private func request() throws -> ServeRequest {
        let level: Logger.Level = quiet ? .error : verbose ? .info : .notice
        var request = ServeRequest(log: Logger(label: "diskgate") { _ in StandardErrorLog(level: level) })
        try site.apply()
        let all = try sources.flatMap { try disk($0).sources }
        if !stdio && all.contains(where: \.isHotAdded) {
            // A server waits for its end by itself, once it is one. Before, nothing but a session is waited for long.
            blockEndingSignals()
            try endWaitingOnSignals { try openSources(for: &request) }
        } else {
            try giveBackOnSignals(all)
            try openSources(for: &request)
        }
        request.listen = try addresses()
        request.usesStandardIO = stdio
        request.exitsWithLast = exitWithLast
        request.command = command
        request.control = try control.map { try ListenAddress($0, defaultPort: 0) }
        request.defaults.options = try options()
        request.defaults.imageDirectories = part.imageDirectory
        request.defaults.scratchDirectory = scratch
        request.defaults.scratchReserve = scratchReserve?.bytes
        request.defaults.checkpointDirectory = checkpoints
        request.tls = try tls.server(log: request.log)
        request.allowsRemote = tls.isSaidAloud
        if !allowList.isEmpty {
            request.listRules = []
            for rule in allowList where rule != "none" { request.listRules?.append(try AllowRule(rule)) }
        }
        request.limits = limits.limits
        request.metrics = try metrics.map { try ListenAddress($0, defaultPort: 0) }
        request.allowsRemoteMetrics = metricsRemote
        request.version = DiskgateCommand.configuration.version
        request.graceSeconds = grace
        return request
    }

    private func openSources(for request: inout ServeRequest) throws {
        for (index, source) in sources.enumerated() {
            let device: any BlockDevice
            if let checkpoints {
                let log = request.log
                let disk = try disk(source).openCheckpointed(in: checkpoints) { log.warning("\($0)") }
                request.checkpointed[exportName(index)] = disk
                device = disk.device
            } else {
                let chosen = try disk(source).openChosen()
                report(chosen.choice)
                device = chosen.opened
            }
            request.exports.append(
                try Export(
                    name: exportName(index), description: index < description.count ? description[index] : "",
                    device: device, options: try options()))
        }
    }

    private func disk(_ source: String) throws -> DiskSpecification {
        var disk = DiskSpecification(try SourceReference(source))
        disk.access = writable ? .writable : overlay ? .overlay : .readOnly
        try alternatives.apply(to: &disk)
        part.apply(to: &disk)
        disk.fingerprints = try trust.fingerprints()
        disk.size = size?.bytes
        disk.roundedTo = roundSize?.bytes
        disk.scratchDirectory = scratch
        for text in fault { disk.faults.append(try FaultArgument(text).fault) }
        return disk
    }

    private func options() throws -> ExportOptions {
        var options = ExportOptions()
        options.isReadOnly = !writable && !overlay
        for rule in allow { options.allow.append(try AllowRule(rule)) }
        options.bytesPerSecondMax = limits.limitRate?.bytes
        options.readDelayMS = delayRead
        options.writeDelayMS = delayWrite
        options.connectionsMax = limits.maxPerExport
        return options
    }

    private func exportName(_ index: Int) -> String {
        if index < name.count { return name[index] }
        if sources.count == 1 { return "" }
        let path = sources[index].split(separator: "?").first ?? ""
        return path.split(separator: "/").last.map(String.init) ?? sources[index]
    }

    private func addresses() throws -> [ListenAddress] {
        var addresses = try listen.map { try ListenAddress($0, defaultPort: NBD.defaultPort) }
        if addresses.isEmpty && command == nil { addresses = [.tcp(host: "127.0.0.1", port: NBD.defaultPort)] }
        return addresses
    }
}

/// A fault as an argument: KIND[@START-END][%PERCENT].
struct FaultArgument {
    let fault: FaultPlan.Fault

    init(_ text: String) throws(BlockError) {
        let bad = BlockError(
            .invalid, "\(text) is no fault: give KIND[@START-END][%PERCENT], for example read-error@1M-2M%50")
        let halves = text.split(separator: "%", maxSplits: 1, omittingEmptySubsequences: false)
        let parts = halves[0].split(separator: "@", maxSplits: 1, omittingEmptySubsequences: false)
        guard let kind = parts.first, let percent = halves.count == 2 ? Double(halves[1]) : 100, percent >= 0,
            percent <= 100
        else { throw bad }
        var range: Range<UInt64> = 0..<UInt64(Int64.max)
        if parts.count == 2 {
            let ends = parts[1].split(separator: "-", maxSplits: 1, omittingEmptySubsequences: false)
            guard ends.count == 2 else { throw bad }
            let start = try ByteCount(String(ends[0])).bytes
            let end = try ByteCount(String(ends[1])).bytes
            guard start < end else { throw bad }
            range = start..<end
        }
        let kinds: [Substring: FaultPlan.Fault.Kind] = [
            "read-error": .readError(.inputOutput), "write-error": .writeError(.inputOutput),
            "no-space": .writeError(.noSpace), "flush-error": .flushError(.inputOutput), "corruption": .corruption,
        ]
        guard let known = kinds[kind] else { throw bad }
        fault = FaultPlan.Fault(known, range: range, probability: percent / 100)
    }
}
