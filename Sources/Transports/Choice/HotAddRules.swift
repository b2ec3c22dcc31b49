// When a disk can be added to this proxy: the proxy as a machine beside it, its adapters, and what hosts make of it.
import Block

extension TransportRules {
    /// What the rules of `hotadd` say.
    func hotAddFindings(_ disk: Inventory.Disk, _ machine: Inventory.Machine, _ usage: Usage) -> [Finding?] {
        guard let proxy = inventory.proxy, proxy.isPhysical != true, let id = proxy.id, !id.isEmpty else {
            let isPhysical = inventory.proxy?.isPhysical == true
            return [
                Finding(
                    "hotadd.proxy-machine", .excluded,
                    isPhysical
                        ? "this proxy is no virtual machine: nothing can be added to it"
                        : "which virtual machine this proxy is, is not known",
                    remedy: isPhysical
                        ? otherProxies(machine, disk) ?? "run diskgate on a virtual machine, too, or use san or nbdssl"
                        : "say proxy.id, what the hypervisor calls it"),
                controllerFinding(disk),
            ]
        }
        return [
            id == machine.id
                ? Finding(
                    "hotadd.not-itself", .excluded,
                    "\(machine.title) is this proxy: its disks hang on it already",
                    remedy: "let another proxy back this one up") : nil,
            powerFinding(proxy), placeFinding(proxy, disk, machine), hostFinding(proxy, disk, machine),
            controllerFinding(disk), slotFinding(proxy, usage), accessibility(.hotadd, disk),
            encryptionFinding(proxy, machine), protectionFinding(proxy), mappingFinding(disk),
            nfsFinding(proxy, disk, machine), vsanFinding(proxy, disk), policyFinding(disk),
            proxy.hasDiskUUIDs == false
                ? Finding(
                    "hotadd.disk-names", .warning,
                    "the proxy's disks do not tell the names that the hypervisor knows them by: they are found by "
                        + "their SCSI addresses", remedy: "set disk.enableUUID=TRUE on the proxy") : nil,
        ] + sizeFindings(proxy, disk)
    }

    // MARK: - The proxy as a machine

    private func powerFinding(_ proxy: Inventory.Proxy) -> Finding? {
        guard proxy.power == .off || proxy.power == .suspended else { return nil }
        return Finding(
            "hotadd.proxy-power", .excluded, "the proxy is \(proxy.power?.rawValue ?? "off")", remedy: "start the proxy"
        )
    }

    /// Hypervisors add disks only between machines of one place.
    private func placeFinding(_ proxy: Inventory.Proxy, _ disk: Inventory.Disk, _ machine: Inventory.Machine)
        -> Finding?
    {
        let rule = "hotadd.datacenter"
        for (what, ours, theirs) in [
            ("datacenter", proxy.datacenter, machine.datacenter), ("manager", proxy.manager, machine.manager),
        ] {
            guard let ours, let theirs, ours != theirs else { continue }
            return Finding(
                rule, .excluded, "the proxy is in the \(what) \(ours), the machine in \(theirs)",
                remedy: otherProxies(machine, disk) ?? "set a proxy up in \(theirs)")
        }
        guard let place = proxy.datacenter, machine.datacenter != nil else { return nil }
        return Finding(rule, .ok, "proxy and machine are both in \(place)")
    }

    /// Whether the proxy's host mounts what the disk lies on.
    private func hostFinding(_ proxy: Inventory.Proxy, _ disk: Inventory.Disk, _ machine: Inventory.Machine) -> Finding
    {
        let rule = "hotadd.host"
        guard let name = proxy.host else {
            return Finding(
                rule, .warning, "which host the proxy runs on is not known: it has to mount the disk's datastore",
                remedy: "say proxy.host")
        }
        if inventory.host(name)?.isInMaintenance == true {
            return Finding(
                rule, .excluded, "the proxy's host \(name) is in maintenance", remedy: "move the proxy to another host")
        }
        let (known, missing) = datastores(of: disk)
        var unclear = missing
        for datastore in known {
            guard let hosts = datastore.hosts else {
                unclear.append(datastore.name)
                continue
            }
            if !hosts.contains(name) {
                return Finding(
                    rule, .excluded,
                    "the proxy's host \(name) does not mount the datastore \(datastore.name) (mounted on "
                        + "\(hosts.isEmpty ? "no host" : listed(hosts)))",
                    remedy: otherProxies(machine, disk) ?? "mount it there, or move the proxy to one of these hosts")
            }
        }
        if known.isEmpty || !unclear.isEmpty {
            let what = unclear.isEmpty ? "its datastore" : listed(unclear)
            return Finding(
                rule, .warning, "whether the proxy's host \(name) mounts \(what) is not known",
                remedy: "list the hosts of the datastore")
        }
        return Finding(rule, .ok, "the proxy's host \(name) mounts \(listed(known.map(\.name)))")
    }

    /// Which other proxies could do it, as advice.
    private func otherProxies(_ machine: Inventory.Machine, _ disk: Inventory.Disk) -> String? {
        var one = machine
        one.disks = [disk]
        let others = ProxyChoice(for: one, in: inventory).eligible.filter { $0.id != inventory.proxy?.id }
        if others.isEmpty { return nil }
        return "let another proxy read it: \(listed(others.map { $0.name ?? $0.id ?? "?" }))"
    }

    // MARK: - Adapters

    private func controllerFinding(_ disk: Inventory.Disk) -> Finding {
        let rule = "hotadd.controller"
        let kind = disk.controller ?? .unknown
        switch kind.isSCSI {
        case true: return Finding(rule, .ok, "it is a SCSI disk (\(kind.rawValue))")
        case false:
            return Finding(
                rule, .excluded, "it hangs on an adapter of the kind \(kind.rawValue): only SCSI disks are hot-added",
                remedy: "give the machine a SCSI adapter for it, or use another transport for this disk")
        case nil:
            return Finding(
                rule, .warning, "what kind of adapter it hangs on is not known: only SCSI disks are hot-added",
                remedy: "say the disk's controller (pvscsi, lsilogic, ide, sata, nvme, ...)")
        }
    }

    private func slotFinding(_ proxy: Inventory.Proxy, _ usage: Usage) -> Finding {
        let rule = "hotadd.slots"
        guard let slots = ProxySlots(proxy) else {
            return Finding(
                rule, .warning, "how many places are free on the proxy's SCSI adapters is not known",
                remedy: "list proxy.controllers with kind and usedUnits")
        }
        let left = slots.free - usage.slots
        let request = usage.slots == 0 ? "" : ", \(usage.slots) given to other disks of this machine"
        if left > 0 { return Finding(rule, .ok, "\(slots.summary)\(request)") }
        if slots.adapters == 0 {
            return Finding(
                rule, .excluded, "the proxy has no SCSI adapter that disks can be added to",
                remedy: "add a PVSCSI adapter to the proxy")
        }
        return Finding(
            rule, .excluded, "no place is free on the proxy's SCSI adapters: \(slots.summary)\(request)",
            remedy: "add another PVSCSI adapter (a machine can have four), or take disks off that are not used")
    }

    // MARK: - What hosts make of it

    private func encryptionFinding(_ proxy: Inventory.Proxy, _ machine: Inventory.Machine) -> Finding? {
        guard machine.isEncrypted == true else { return nil }
        let rule = "hotadd.encryption"
        switch proxy.isEncrypted {
        case true: return Finding(rule, .ok, "machine and proxy are both encrypted")
        case false:
            return Finding(
                rule, .excluded, "the machine is encrypted and the proxy is not",
                remedy: "encrypt the proxy, or use nbdssl")
        default:
            return Finding(
                rule, .warning, "the machine is encrypted, and whether the proxy is, too, is not known",
                remedy: "say proxy.isEncrypted")
        }
    }

    private func protectionFinding(_ proxy: Inventory.Proxy) -> Finding {
        let rule = "hotadd.protection"
        let what = "udev, LVM, mdadm and multipath are"
        switch proxy.isProtected {
        case true: return Finding(rule, .ok, "\(what) kept away from disks that come")
        case false:
            return Finding(
                rule, .excluded,
                "\(what) not kept away from disks that come: they may activate what lies on a guest's disk",
                remedy: "run diskgate setup on the proxy")
        default:
            return Finding(
                rule, .warning, "whether \(what) kept away from disks that come is not known",
                remedy: "run diskgate setup on the proxy, and say proxy.isProtected")
        }
    }

    private func mappingFinding(_ disk: Inventory.Disk) -> Finding? {
        guard disk.rawMapping == .physical else { return nil }
        return Finding(
            "hotadd.raw-mapping", .excluded,
            "it is a raw mapping in physical mode, which is not added to a second machine",
            remedy: "present its LUN to this proxy and use san, or back it up from inside of the machine")
    }

    /// Taking a disk on NFS off a machine on another host can stop the machine that it comes from for minutes.
    private func nfsFinding(_ proxy: Inventory.Proxy, _ disk: Inventory.Disk, _ machine: Inventory.Machine) -> Finding?
    {
        guard let nfs = datastores(of: disk).known.first(where: { $0.type == .nfs }) else { return nil }
        if let ours = proxy.host, ours == machine.host { return nil }
        let isAllowed = policy.allowsHotAddAcrossHostsOnNFS ?? true
        let places =
            "the proxy on \(proxy.host ?? "an unknown host"), the machine on \(machine.host ?? "an unknown one")"
        return Finding(
            "hotadd.nfs-hosts", isAllowed ? .warning : .excluded,
            "\(nfs.name) is an NFS datastore and \(places): when the disk is taken off, the machine can stand "
                + "still for up to minutes",
            remedy: "use a proxy on the machine's own host, or nbdssl")
    }

    /// Between vSAN and other file systems hosts do not hot-add (Broadcom's article 306343).
    private func vsanFinding(_ proxy: Inventory.Proxy, _ disk: Inventory.Disk) -> Finding? {
        guard let name = proxy.datastore, let home = inventory.datastore(name), let type = home.type, type != .unknown
        else { return nil }
        let rule = "hotadd.vsan"
        for datastore in datastores(of: disk).known {
            guard let other = datastore.type, other != .unknown, (other == .vsan) != (type == .vsan) else { continue }
            if other == .vsan {
                return Finding(
                    rule, .excluded,
                    "\(datastore.name) is a vSAN datastore and the proxy lies on \(name) (\(type.rawValue))",
                    remedy: "use a proxy that lies on vSAN, or nbdssl")
            }
            let version = inventory.host(proxy.host)?.version.flatMap(HostVersion.init)
            if let version, !(version < HostVersion([7])) { continue }
            return Finding(
                rule, .warning,
                "the proxy lies on the vSAN datastore \(name) and the disk on \(datastore.name): hosts before 7.0 do "
                    + "not add its snapshots in the format seSparse",
                remedy: "use a proxy that does not lie on vSAN, or nbdssl")
        }
        return nil
    }

    private func policyFinding(_ disk: Inventory.Disk) -> Finding? {
        guard let least = policy.minimumHotAddDisk, let capacity = disk.capacity, capacity < least else { return nil }
        return Finding(
            "hotadd.size-policy", .excluded,
            "it has \(readable(capacity)), and disks below \(readable(least)) are not worth being added",
            remedy: "lower policy.minimumHotAddDisk")
    }

    // MARK: - Sizes

    private func sizeFindings(_ proxy: Inventory.Proxy, _ disk: Inventory.Disk) -> [Finding?] {
        guard let capacity = disk.capacity else {
            return [
                Finding("hotadd.size", .warning, "how large it is, is not known", remedy: "say the disk's capacity")
            ]
        }
        return [vmfs3Finding(proxy, disk, capacity), largeFinding(proxy, capacity)]
    }

    /// The file that a host writes beside an added disk is as large as the disk can be, on the proxy's datastore.
    private func vmfs3Finding(_ proxy: Inventory.Proxy, _ disk: Inventory.Disk, _ capacity: UInt64) -> Finding? {
        guard let name = proxy.datastore, let home = inventory.datastore(name) else { return nil }
        let rule = "hotadd.vmfs3-block"
        let others = datastores(of: disk).known.filter { $0.type?.isVMFS == true && home.type?.isVMFS == true }
        guard home.type == .vmfs3 else {
            let differing = others.first { $0.type == .vmfs3 }
            return differing.map {
                Finding(
                    rule, .warning,
                    "the disk lies on \($0.name) (vmfs3), the proxy on \(name) (\(home.type?.rawValue ?? ""))",
                    remedy: "keep proxy and machines on datastores of one version")
            }
        }
        guard let block = home.blockSize, let most = SizeLimits.largestFileOnVMFS3(blockSize: block) else {
            let size = home.blockSize.map { "\($0) bytes, which VMFS-3 does not have" } ?? "not known"
            return Finding(
                rule, .warning, "the proxy lies on the VMFS-3 datastore \(name), whose block size is \(size)",
                remedy: "say its blockSize, or move the proxy to VMFS-5 or VMFS-6")
        }
        if capacity > most {
            return Finding(
                rule, .excluded,
                "it has \(readable(capacity)), and the proxy lies on the VMFS-3 datastore \(name) with blocks of "
                    + "\(readable(block)), where no file is larger than \(readable(most + 512)) less 512 bytes",
                remedy: "move the proxy to VMFS-5 or VMFS-6")
        }
        if let other = others.first(where: { $0.type != .vmfs3 || ($0.blockSize ?? block) != block }) {
            return Finding(
                rule, .warning,
                "\(other.name) and the proxy's datastore \(name) differ in version or block size, but the disk fits",
                remedy: "keep proxy and machines on datastores of one version and block size")
        }
        return Finding(rule, .ok, "it fits on the VMFS-3 datastore \(name) (files up to \(readable(most + 512)))")
    }

    private func largeFinding(_ proxy: Inventory.Proxy, _ capacity: UInt64) -> Finding? {
        guard capacity > SizeLimits.twoTebibytes else { return nil }
        let rule = "hotadd.large-disk"
        let host = inventory.host(proxy.host)
        let version = host?.version.flatMap(HostVersion.init)
        let isOld = version.map { $0 < HostVersion(SizeLimits.largeDiskVersion) }
        if host?.kind == .esx, isOld == true {
            return Finding(
                rule, .excluded,
                "it has \(readable(capacity)), and the proxy's host \(host?.name ?? "") has the version "
                    + "\(host?.version ?? ""): disks of 2 TiB and more need 5.5",
                remedy: "use a proxy on a newer host, or nbdssl")
        }
        let open = (proxy.controllers ?? []).filter { ProxySlots.free(of: $0) > 0 }
        if !open.isEmpty, open.allSatisfy({ $0.kind == .buslogic }) {
            return Finding(
                rule, .excluded,
                "it has \(readable(capacity)), and the free places are on BusLogic adapters, which end at 2 TiB",
                remedy: "add a PVSCSI adapter to the proxy")
        }
        let mayBeESX = [nil, .esx, .unknown].contains(host?.kind)
        if mayBeESX && isOld != false {
            return Finding(
                rule, .warning,
                "it has \(readable(capacity)), and whether disks of 2 TiB and more can be added on the proxy's host "
                    + "\(proxy.host ?? "") is not known: ESXi can since 5.5",
                remedy: "say kind and version of the proxy's host")
        }
        return nil
    }
}
