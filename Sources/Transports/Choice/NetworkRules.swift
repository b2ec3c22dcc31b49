// When a disk can be had from a host over the network, and when a file of this machine is it.
import Block

extension TransportRules {
    /// What the rules of `nbdssl` and `nbd` say.
    func networkFindings(
        _ transport: TransportKind, _ disk: Inventory.Disk, _ machine: Inventory.Machine, _ usage: Usage
    ) -> [Finding?] {
        var findings = [clearTextFinding(transport, machine), networkPolicy(transport, disk)]
        guard let name = machine.host, let host = inventory.host(name) else {
            findings.append(
                Finding(
                    "\(transport).host", .warning,
                    machine.host.map { "the inventory says nothing of its host \($0)" }
                        ?? "which host the machine is on is not known",
                    remedy: "add the host to hosts, with kind and version"))
            return findings + [accessibility(transport, disk)]
        }
        return findings + [
            hostFinding(transport, host), libraryFinding(transport, host), accessibility(transport, disk),
        ] + sessionFindings(transport, host, usage)
    }

    private func clearTextFinding(_ transport: TransportKind, _ machine: Inventory.Machine) -> Finding? {
        guard transport == .nbd else { return nil }
        if machine.isEncrypted == true {
            return Finding(
                "nbd.clear-text", .excluded, "the machine is encrypted, and nbd would carry its disks in clear text",
                remedy: "use nbdssl")
        }
        if policy.requiresTLS == true {
            return Finding(
                "nbd.clear-text", .excluded, "the policy wants TLS, and nbd carries disks in clear text",
                remedy: "use nbdssl")
        }
        return Finding("nbd.clear-text", .ok, "in clear text, which the policy allows")
    }

    private func networkPolicy(_ transport: TransportKind, _ disk: Inventory.Disk) -> Finding? {
        guard let most = policy.maximumNetworkDisk, let capacity = disk.capacity, capacity > most else { return nil }
        return Finding(
            "\(transport).size-policy", .excluded,
            "it has \(readable(capacity)), and disks above \(readable(most)) are not read over the network",
            remedy: "raise policy.maximumNetworkDisk")
    }

    private func hostFinding(_ transport: TransportKind, _ host: Inventory.Host) -> Finding {
        let rule = "\(transport).host"
        if let allowed = host.transports, !allowed.map({ $0.lowercased() }).contains(transport.rawValue) {
            return Finding(
                rule, .excluded,
                "the host \(host.name) does not allow it (it allows \(allowed.isEmpty ? "none" : listed(allowed)))",
                remedy: "allow \(transport) there")
        }
        if host.isInMaintenance == true {
            return Finding(
                rule, .warning, "the host \(host.name) is in maintenance, and may go away",
                remedy: "wait until it is back")
        }
        return Finding(rule, .ok, "the host \(host.name) gives the disk away")
    }

    /// What has to be on this machine to talk with a host.
    private func libraryFinding(_ transport: TransportKind, _ host: Inventory.Host) -> Finding? {
        let rule = "\(transport).library"
        let libraries = inventory.proxy?.libraries
        if host.kind == .esx {
            guard let libraries else {
                return Finding(
                    rule, .warning,
                    "\(host.name) is an ESX host, which takes VMware's VDDK library, and whether that is "
                        + "here is not known", remedy: "list proxy.libraries")
            }
            if libraries.contains("vddk") { return Finding(rule, .ok, "the VDDK library is here") }
            return Finding(
                rule, .excluded, "\(host.name) is an ESX host, which takes VMware's VDDK library, and that is not here",
                remedy: "install it with nbdkit's vddk plugin, and name the disk nbd+command:nbdkit -s vddk ...")
        }
        guard transport == .nbdssl, let libraries else { return nil }
        if libraries.contains("openssl") { return Finding(rule, .ok, "OpenSSL is here") }
        return Finding(
            rule, .excluded, "TLS takes OpenSSL 3, which is not here", remedy: "install OpenSSL 3 (Debian: libssl3)")
    }

    private func sessionFindings(_ transport: TransportKind, _ host: Inventory.Host, _ usage: Usage) -> [Finding] {
        let rule = "\(transport).sessions"
        return SessionLimit.limits(of: host).map { limit in
            let used = usage.sessions[limit.key] ?? 0
            let figures = "\(used) of \(limit.limit) sessions of the \(limit.key) are taken (\(limit.origin))"
            if limit.limit < 1 {
                return Finding(
                    rule, .excluded, "no sessions of the \(limit.key) are allowed (\(limit.origin))",
                    remedy: "raise sessionLimit of \(host.name)")
            }
            if used < limit.limit { return Finding(rule, .ok, figures) }
            let waits = policy.waitsForSessions ?? true
            return Finding(
                rule, waits ? .warning : .excluded, waits ? "\(figures): it has to wait for one" : figures,
                remedy: "run fewer jobs at a time on machines of this host, or use san or hotadd, which take none")
        }
    }

    /// What the rules of `file` say.
    func fileFindings(_ disk: Inventory.Disk, _ machine: Inventory.Machine) -> [Finding?] {
        var findings: [Finding?] = []
        if machine.isEncrypted == true {
            findings.append(
                Finding(
                    "file.encryption", .excluded, "the machine is encrypted: its files hold nothing but ciphertext",
                    remedy: "use nbdssl"))
        }
        guard let path = localPath(of: disk) else {
            let (known, missing) = datastores(of: disk)
            let place = (known.map(\.name) + missing).first ?? disk.file ?? "its datastore"
            return findings + [
                Finding(
                    "file.path", .excluded, "no path of this machine leads to it (\(place) is not mounted here)",
                    remedy: known.contains { $0.type != .nfs && $0.type != nil && $0.type != .unknown }
                        ? "use another transport: only what is mounted here can be read so"
                        : "mount the NFS export here, too, and say where (mount of the datastore)")
            ]
        }
        if let why = obstacle(path) {
            findings.append(
                Finding(
                    "file.path", .excluded, "\(path) cannot be read: \(why)",
                    remedy: "see that it is mounted there, and let the user that diskgate runs as read it"))
        } else {
            findings.append(Finding("file.path", .ok, "\(path) can be read"))
        }
        return findings
    }

    /// The path by which this machine reads a disk's file: that of a source where one is said, else by what is mounted
    /// here; nil where there is none.
    func localPath(of disk: Inventory.Disk) -> String? {
        for text in disk.sources ?? [] {
            if case .path(let path) = (try? SourceReference(text))?.kind { return path }
        }
        guard let file = disk.file else { return nil }
        if file.hasPrefix("/") { return file }
        guard let place = Inventory.Disk.place(file), let mount = inventory.datastore(place.datastore)?.mount else {
            return nil
        }
        // A name from outside leads nowhere else.
        if place.path.split(separator: "/").contains("..") { return nil }
        return "\(mount)/\(place.path)"
    }
}
