// When a disk can be read from the LUNs of its datastore, and when it lies on no LUN that this proxy sees.
import Block
import LinuxIO

extension TransportRules {
    /// What the rules of `san` say.
    func sanFindings(_ disk: Inventory.Disk, _ machine: Inventory.Machine) -> [Finding?] {
        var findings: [Finding?] = []
        switch disk.rawMapping {
        case .virtual, .physical: findings.append(mappedUnit(disk))
        case .some(.none), .unknown, nil: findings += datastoreFindings(disk)
        }
        if machine.isEncrypted == true {
            findings.append(
                Finding(
                    "san.encryption", .excluded, "the machine is encrypted: its LUNs hold nothing but ciphertext",
                    remedy: "read it over hotadd with a proxy that is encrypted, too, or over nbdssl"))
        }
        return findings
    }

    private func datastoreFindings(_ disk: Inventory.Disk) -> [Finding] {
        let rule = "san.datastore-type"
        let (known, missing) = datastores(of: disk)
        if known.isEmpty && missing.isEmpty {
            return [
                Finding(
                    rule, .warning, "the datastore of its file (\(disk.file ?? "not given")) is not known",
                    remedy: "give the disk's file as [DATASTORE] DIRECTORY/NAME.vmdk")
            ]
        }
        var findings = missing.map {
            Finding(rule, .warning, "the inventory says nothing of the datastore \($0)", remedy: "add it to datastores")
        }
        for datastore in known {
            let type = typeFinding(datastore)
            findings.append(type)
            if type.verdict != .excluded { findings.append(extentFinding(datastore)) }
        }
        return findings
    }

    private func typeFinding(_ datastore: Inventory.Datastore) -> Finding {
        let rule = "san.datastore-type"
        let name = datastore.name
        switch datastore.type {
        case .vmfs, .vmfs3, .vmfs5, .vmfs6: return Finding(rule, .ok, "\(name) is \(datastore.type?.rawValue ?? "")")
        case .nfs:
            return Finding(
                rule, .excluded, "\(name) is an NFS datastore: it lies on no LUN",
                remedy: "mount the export here, too, and use file, or use hotadd or nbdssl")
        case .vsan:
            return Finding(
                rule, .excluded, "\(name) is a vSAN datastore: its objects lie on disks inside of hosts, without VMFS",
                remedy: "use hotadd with a proxy that lies on \(name), or nbdssl")
        case .vvol:
            return Finding(
                rule, .excluded,
                "\(name) holds virtual volumes (vVol): each disk is a volume of the array, without VMFS",
                remedy: "use hotadd or nbdssl")
        case .local:
            return Finding(
                rule, .excluded, "\(name) lies on its host's own disks: no other machine sees them",
                remedy: "use hotadd with a proxy on that host, or nbdssl")
        case .unknown, nil:
            return Finding(
                rule, .warning, "what kind of file system \(name) is, is not known",
                remedy: "say the type of the datastore \(name) (vmfs3, vmfs5, vmfs6, nfs, vsan, vvol, local)")
        }
    }

    /// Whether all LUNs of a datastore are seen: a spanned one is nothing without any of them.
    private func extentFinding(_ datastore: Inventory.Datastore) -> Finding {
        let rule = "san.luns"
        guard let extents = datastore.extents, !extents.isEmpty else {
            return Finding(
                rule, .warning, "which LUNs \(datastore.name) lies on is not known",
                remedy: "give the worldwide names of its extents")
        }
        guard let seen = inventory.proxy?.luns else { return unknownUnits(rule) }
        let hidden = extents.filter { !isSeen($0, among: seen) }
        if hidden.isEmpty {
            return Finding(
                rule, .ok,
                extents.count == 1
                    ? "the LUN of \(datastore.name) is seen (\(extents[0]))"
                    : "all \(extents.count) LUNs of \(datastore.name) are seen")
        }
        return Finding(
            rule, .excluded,
            "\(hidden.count) of \(extents.count) LUNs of \(datastore.name) "
                + "\(hidden.count == 1 ? "is" : "are") not seen by this proxy: \(listed(hidden))",
            remedy: "let the storage present them to this proxy (zoning, LUN masking, iSCSI login), then rescan")
    }

    private func mappedUnit(_ disk: Inventory.Disk) -> Finding {
        let rule = "san.raw-mapping"
        guard let lun = disk.lun else {
            return Finding(
                rule, .warning, "it is mapped to a LUN whose worldwide name is not known",
                remedy: "give the worldwide name of the LUN (lun)")
        }
        guard let seen = inventory.proxy?.luns else { return unknownUnits(rule) }
        if isSeen(lun, among: seen) {
            let isLayered = disk.rawMapping == .virtual
            return Finding(
                rule, isLayered ? .ok : .warning,
                "the LUN that it is mapped to is seen (\(lun))"
                    + (isLayered ? "" : ", and is read as it is at the time"))
        }
        return Finding(
            rule, .excluded, "the LUN that it is mapped to, \(lun), is not seen by this proxy",
            remedy: "let the storage present it to this proxy, then rescan")
    }

    private func unknownUnits(_ rule: String) -> Finding {
        Finding(
            rule, .warning, "which LUNs this proxy sees is not known",
            remedy: "list them (proxy.luns), or say \"discover\": true on the proxy itself")
    }

    private func isSeen(_ name: String, among seen: [String]) -> Bool {
        let wanted = DiskSelector.bareName(name)
        return seen.contains { DiskSelector.bareName($0) == wanted }
    }
}
