// `diskgate check`: which transports disks can be read over, why not the others, and what to do about it.
import ArgumentParser
import Block
import Glibc
import LinuxIO
import Transports

struct CheckCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "check",
        abstract: "Tell which transports can be used, and what the others need.",
        discussion: """
            Without --inventory it checks this machine. With one, each disk of its machines: which transport it would \
            be read over, and why not over those that are wanted more. Exit status: 0 every disk can be read over the \
            first transport, 3 over another, 1 when there is none for a disk. Without --transports and --inventory: 0 \
            when any transport works.
            """)

    @Option(help: ArgumentHelp("What is known of the site, as JSON (see Docs/Transports.md).", valueName: "file"))
    var inventory: String?

    @Option(help: ArgumentHelp("Only this machine of the inventory, by its id or name.", valueName: "machine"))
    var vm: String?

    @Option(
        help: ArgumentHelp(
            "The transports in the order in which they are wanted: san:hotadd:nbdssl:nbd:file, or some of them.",
            valueName: "order"))
    var transports: String?

    @Flag(help: "Judge machines as they are now, without the snapshot that a backup would take.")
    var asIs = false

    @Flag(
        name: .customLong("try"),
        help: "Open and read the sources that the inventory has for a disk; where that fails, take the next transport.")
    var tries = false

    @Flag(help: "Print what is all right, too.")
    var all = false

    @OptionGroup var state: StateArguments
    @OptionGroup var report: ReportArguments

    func validate() throws {
        if inventory == nil && (vm != nil || asIs || tries) {
            throw ValidationError("--vm, --as-is and --try need an --inventory.")
        }
    }

    func run() throws {
        let order = try transports.map { try TransportOrder($0) } ?? .standard
        guard let inventory else { return try checkMachine(order) }
        try SiteInventory.use(inventory)
        var site = try Inventory.read(inventory)
        if site.proxy?.discover == true { site.discover(try MachineFacts.gather { HostProtection().rule() }) }
        let machines = try vm.map { [try site.machine(named: $0)] } ?? site.machines
        // Where --try takes them, too: see StateArguments.
        let sessions = HostSessions(stateDirectory: state.directory)
        let rules = TransportRules(site, takesSnapshot: !asIs) { path in
            access(path, R_OK) == 0 ? nil : systemErrorText(errno)
        }
        let attempt: TransportPlan.Attempt = { (source, machine) throws(BlockError) in
            try open(source, of: machine, in: site)
        }
        if tries { try giveBackOnSignals() }
        var plan = try TransportPlan.current(rules, order: order, sessions: sessions)
        plan.takesClearText = transports != nil
        let plans = machines.map { machine in
            Plan(machine, plan.choices(for: machine, trying: tries ? attempt : nil), in: site)
        }
        if report.json { try printJSON(plans) } else { for plan in plans { show(plan) } }
        let choices = plans.flatMap(\.disks).map(\.choice)
        if choices.contains(where: { $0.position == nil }) { throw ExitCode(1) }
        if choices.contains(where: \.isDowngraded) { throw ExitCode(3) }
    }

    /// Opens and reads a source, with a session of the machine's host where it comes from there.
    private func open(_ source: SourceReference, of machine: Inventory.Machine, in site: Inventory) throws(BlockError) {
        var disk = DiskSpecification(source)
        disk.site = SiteDisk(title: "a disk of \(machine.title)", host: site.host(machine.host), policy: site.policy)
        try disk.open().readEnds()
    }

    // MARK: - A site

    private struct Plan: Encodable {
        struct Disk: Encodable {
            var key: String
            var capacity: UInt64?
            var file: String?
            var choice: TransportChoice
        }
        var machine: String
        var disks: [Disk]
        /// Proxies that all SCSI disks of the machine could be added to, the best first.
        var proxies: [String]

        init(_ machine: Inventory.Machine, _ choices: [TransportChoice], in site: Inventory) {
            self.machine = machine.title
            disks = zip(machine.disks, choices).map { disk, choice in
                Disk(key: "\(disk.key)", capacity: disk.capacity, file: disk.file, choice: choice)
            }
            proxies = ProxyChoice(for: machine, in: site).eligible.map { $0.name ?? $0.id ?? "" }
        }
    }

    private func show(_ plan: Plan) {
        print(plan.machine)
        for disk in plan.disks {
            let facts = [disk.capacity.map { readable($0) }, disk.file].compactMap(\.self)
            print("  disk \(([disk.key] + facts).joined(separator: ", "))")
            for (index, candidate) in disk.choice.candidates.enumerated() {
                let isChosen = disk.choice.position == index + 1
                show(candidate.name, isChosen ? "chosen" : candidate.verdict.rawValue, candidate.findings)
            }
            if disk.choice.position == nil { print("    there is no transport for this disk") }
        }
        if plan.proxies.count > 1 || plan.proxies.count == 1 && plan.disks.count > 0 {
            print("  proxies for hotadd: \(plan.proxies.joined(separator: ", "))")
        }
    }

    // MARK: - This machine

    private func checkMachine(_ order: TransportOrder) throws {
        let check = MachineCheck(try MachineFacts.gather { HostProtection().rule() }, order: order)
        if report.json {
            try printJSON(check)
        } else {
            print("this machine")
            for ability in check.abilities { show(ability.name, ability.verdict.rawValue, ability.findings) }
        }
        let usable = check.abilities.filter { $0.transport != nil }.map { $0.verdict != .excluded }
        if !usable.contains(true) { throw ExitCode(1) }
        if transports != nil && usable.first == false { throw ExitCode(3) }
    }

    /// A transport, in a line for each thing that is to be known of it.
    private func show(_ name: String, _ verdict: String, _ findings: [Finding]) {
        var shown = findings.filter { all || $0.verdict != .ok }
        // What cannot be used needs no warnings besides.
        if !all, shown.contains(where: { $0.verdict == .excluded }) { shown.removeAll { $0.verdict != .excluded } }
        let good = findings.count == 1 ? findings[0].reason : "all \(findings.count) rules are kept"
        let start = "    \(name.padded(8)) \(verdict.padded(9)) "
        if shown.isEmpty { return print(start + good) }
        for (index, finding) in shown.enumerated() {
            let left = index == 0 ? start : String(repeating: " ", count: start.count)
            print(left + finding.reason)
            if finding.verdict != .ok, let remedy = finding.remedy {
                print(String(repeating: " ", count: start.count) + "-> \(remedy)")
            }
        }
    }
}
