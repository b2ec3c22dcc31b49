// The disks of a machine as an inventory has them: their sources in order, with what the rules say of each transport.
import Block
import Glibc
import Transports

extension GivenDisksPlace {
    /// What an inventory says of the machine.
    struct Found: Sendable {
        var disks: [Disk]
        /// What the user should know.
        var warnings: [String] = []
    }

    /// The disks: those that were given, or else those that the inventory has.
    ///
    /// - Throws: `.invalid` where neither is there, `.notFound` when the inventory has no such machine, or that it
    ///   cannot be read.
    func found() throws(BlockError) -> Found {
        if !disks.isEmpty { return Found(disks: disks) }
        let doing = "backing up \(GivenDisks.scheme):\(name)"
        guard let path = inventory ?? SiteInventory.path else {
            throw BlockError(
                .invalid,
                "\(doing): it has no disks: give --source ID=SOURCE for each, or an inventory that has the machine "
                    + "(--inventory, \(SiteInventory.variable) or \(SiteInventory.standardPath))")
        }
        var site = try Inventory.read(path)
        let machine: Inventory.Machine
        do throws(BlockError) { machine = try site.machine(named: name) } catch {
            throw BlockError(
                error.kind, "\(doing): \(error.message) (\(path)); or give --source ID=SOURCE for each of its disks")
        }
        if site.proxy?.discover == true { site.discover(try MachineFacts.gather { HostProtection().rule() }) }
        return try found(machine, in: site, doing: doing)
    }

    private func found(_ machine: Inventory.Machine, in site: Inventory, doing: String) throws(BlockError) -> Found {
        let ids = machine.disks.map(\.key.description)
        if let twice = ids.first(where: { id in ids.count { $0 == id } > 1 }) {
            throw BlockError(.invalid, "\(doing): the inventory has two disks \(twice) of \(machine.title)")
        }
        if ids.isEmpty { throw BlockError(.invalid, "\(doing): the inventory has no disks of \(machine.title)") }
        if let other = additions.first(where: { !ids.contains($0.id) }) {
            throw BlockError(
                .invalid,
                "\(doing): --or names a source of the disk \(other.id), and the inventory has only "
                    + ids.joined(separator: ", "))
        }
        let sources = machine.disks.map { allSources(of: $0, machine) }
        let judged = machine.at(moment)
        let rules = TransportRules(site, takesSnapshot: false) { access($0, R_OK) == 0 ? nil : systemErrorText(errno) }
        let plan = try TransportPlan.current(rules, order: transports ?? .standard, sessions: HostSessions())
        let findings = plan.findings(for: judged) { disk in
            let index = ids.firstIndex(of: disk.key.description) ?? 0
            return (try? sources[index].get()) ?? []
        }
        var found = Found(disks: [])
        if case .offline = moment, machine.power == .on {
            found.warnings.append("the inventory says that \(machine.title) runs, and offline=yes that it is off")
        }
        for (index, disk) in machine.disks.enumerated() {
            // Sources say where their files are, and opening them tells the rest. What is free then is what counts, and
            // not what disks would take that may be left out.
            let told = ["file.path", "hotadd.slots", "nbd.sessions", "nbdssl.sessions"]
            let judgement = findings[index].mapValues { $0.filter { !told.contains($0.rule) } }
            var known = SiteDisk(
                title: "disk \(disk.key) of \(machine.title)", host: site.host(machine.host), policy: site.policy,
                findings: judgement)
            if case .inconsistent = moment {
                known.findings = known.findings.mapValues { $0.map { $0.takenAllTheSame } }
            }
            found.disks.append(
                Disk(
                    id: ids[index], name: disk.file ?? known.title,
                    specification: sources[index].map { specification($0, known) }, capacity: disk.capacity))
        }
        return found
    }

    private func specification(_ sources: [SourceReference], _ known: SiteDisk) -> DiskSpecification {
        var specification = DiskSpecification(sources[0])
        specification.alternatives = Array(sources.dropFirst())
        specification.transports = transports
        specification.site = known
        return specification
    }

    /// The sources of a disk, at least one: those of the inventory by their transports, then those that were added.
    private func allSources(of disk: Inventory.Disk, _ machine: Inventory.Machine) -> Result<
        [SourceReference], BlockError
    > {
        Result { () throws(BlockError) in
            let title = "disk \(disk.key) of \(machine.title)"
            var sources: [SourceReference] = []
            for text in disk.sources ?? [] {
                do throws(BlockError) { sources.append(try SourceReference(text)) } catch {
                    throw BlockError(error.kind, "reading the sources of \(title) in the inventory: \(error.message)")
                }
            }
            let kinds = TransportOrder.standard.kinds
            func rank(_ source: SourceReference) -> Int { source.transport.flatMap(kinds.firstIndex) ?? kinds.count }
            var ordered: [SourceReference] = []
            for place in 0...kinds.count { ordered += sources.filter { rank($0) == place } }
            ordered += additions.filter { $0.id == disk.key.description }.map(\.source)
            if ordered.isEmpty {
                throw BlockError(
                    .notFound,
                    "choosing a transport for \(title): the inventory has no source of it: name one in the disk's "
                        + "sources, add one with --or \(disk.key)=SOURCE, or leave it out with --exclude \(disk.key)")
            }
            return ordered
        }
    }
}

extension Inventory.Machine {
    /// The machine as it is by the word of who started the run.
    fileprivate func at(_ moment: GivenDisksPlace.Moment) -> Inventory.Machine {
        var machine = self
        switch moment {
        case .snapshot: machine.hasSnapshot = true
        case .offline: machine.power = .off
        case .inconsistent: break
        }
        return machine
    }
}

extension Finding {
    /// Where the disk may be written while it is read, as the user accepts, that excludes nothing.
    fileprivate var takenAllTheSame: Finding {
        guard rule.hasSuffix(".stillness"), verdict == .excluded else { return self }
        var finding = self
        finding.verdict = .warning
        finding.reason += " (inconsistent=yes accepts that)"
        return finding
    }
}
