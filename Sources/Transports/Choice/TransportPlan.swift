// All disks of a machine planned together: each takes the first transport that rules and, where asked for, a try allow.
public import Block

/// Chooses transports for the disks of a machine.
public struct TransportPlan: Sendable {
    /// Tries a source of a disk in earnest; what it throws is why the next candidate is taken.
    public typealias Attempt = (_ source: SourceReference, _ machine: Inventory.Machine) throws(BlockError) -> Void

    /// The rules.
    public let rules: TransportRules
    /// The transports in the order in which they are wanted.
    public let order: TransportOrder
    /// Sessions that there are already, by the keys of `SessionLimit`.
    public let sessions: [String: Int]
    /// Whether a source over a network without TLS may be tried after one with TLS that failed: only where the user has
    /// written the order.
    public var takesClearText = false

    /// A plan.
    public init(_ rules: TransportRules, order: TransportOrder = .standard, sessions: [String: Int] = [:]) {
        self.rules = rules
        self.order = order
        self.sessions = sessions
    }

    /// Chooses for each disk of a machine, in their order. What one disk takes (a place on the proxy's adapters, a
    /// session with the host), the next ones do not have: all disks of a machine are read at the same time.
    ///
    /// - Parameter attempt: tries sources that the inventory names; nil to go by the rules alone.
    public func choices(for machine: Inventory.Machine, trying attempt: Attempt? = nil) -> [TransportChoice] {
        var usage = TransportRules.Usage()
        usage.sessions = sessions
        return machine.disks.map { disk in
            var candidates = order.kinds.map { transport in
                TransportCandidate(
                    transport, source: source(of: disk, transport),
                    findings: rules.findings(transport, disk, of: machine, usage: usage))
            }
            var position: Int?
            var failed: String?
            for index in candidates.indices where candidates[index].verdict != .excluded {
                if let attempt {
                    let finding = tried(candidates[index], machine, attempt, afterTLS: failed)
                    candidates[index].findings.append(finding)
                    if finding.verdict == .excluded {
                        if order.kinds[index] == .nbdssl { failed = failed ?? candidates[index].source }
                        continue
                    }
                }
                position = index + 1
                take(order.kinds[index], machine, &usage)
                break
            }
            return TransportChoice(
                disk: "disk \(disk.key) of \(machine.title)", position: position, candidates: candidates)
        }
    }

    /// What the rules say of each disk of a machine over the transports that it has sources of, in the order of the
    /// disks. Of what runs out, each disk takes what the first transport needs that the rules allow.
    ///
    /// - Parameter sources: all sources of a disk.
    public func findings(
        for machine: Inventory.Machine, sources: (Inventory.Disk) -> [SourceReference]
    ) -> [[TransportKind: [Finding]]] {
        var usage = TransportRules.Usage()
        usage.sessions = sessions
        return machine.disks.map { disk in
            let wanted = Set(sources(disk).compactMap(\.transport))
            var findings: [TransportKind: [Finding]] = [:]
            var isTaken = false
            for kind in order.kinds where wanted.contains(kind) {
                let found = rules.findings(kind, disk, of: machine, usage: usage)
                findings[kind] = found
                if isTaken || found.contains(where: { $0.verdict == .excluded }) { continue }
                take(kind, machine, &usage)
                isTaken = true
            }
            return findings
        }
    }

    /// The source that names a disk over a transport, where the inventory has one.
    private func source(of disk: Inventory.Disk, _ transport: TransportKind) -> String? {
        (disk.sources ?? []).first { (try? SourceReference($0))?.transport == transport }
    }

    /// - Parameter failed: the source with TLS that could not be opened; nil where none was tried.
    private func tried(
        _ candidate: TransportCandidate, _ machine: Inventory.Machine, _ attempt: Attempt, afterTLS failed: String?
    ) -> Finding {
        let rule = "\(candidate.name).tried"
        guard let text = candidate.source else {
            return Finding(
                rule, .warning, "it was not tried: the inventory has no source for it",
                remedy: "name one in the disk's sources")
        }
        if let failed, !takesClearText, (try? SourceReference(text))?.crossesNetworkInClear == true {
            return Finding(
                "nbd.clear-text", .excluded,
                "not tried: \(failed) could not be reached with TLS, and whoever is between may have seen to that",
                remedy: "--transports with nbd in its order takes clear text all the same")
        }
        do throws(BlockError) { try attempt(try SourceReference(text), machine) } catch {
            return Finding(rule, .excluded, error.message)
        }
        return Finding(rule, .ok, "it was opened and read from (\(text))")
    }

    private func take(_ transport: TransportKind, _ machine: Inventory.Machine, _ usage: inout TransportRules.Usage) {
        switch transport {
        case .hotadd: usage.slots += 1
        case .nbd, .nbdssl:
            guard let host = rules.inventory.host(machine.host) else { return }
            for limit in SessionLimit.limits(of: host) { usage.sessions[limit.key, default: 0] += 1 }
        case .san, .file: break
        }
    }
}

extension TransportPlan {
    /// A plan by what processes of this machine use at the moment.
    ///
    /// - Throws: `BlockError` when sessions cannot be counted.
    public static func current(_ rules: TransportRules, order: TransportOrder, sessions counter: HostSessions)
        throws(BlockError) -> TransportPlan
    {
        var sessions: [String: Int] = [:]
        for host in rules.inventory.hosts {
            for limit in SessionLimit.limits(of: host) where sessions[limit.key] == nil {
                sessions[limit.key] = try counter.holders(of: limit.key).count
            }
        }
        return TransportPlan(rules, order: order, sessions: sessions)
    }
}
