// Which proxy a machine's disks can be added to: from the datastores to the hosts that mount them to the proxies there.
import Block

/// Places for disks on a proxy's SCSI adapters.
struct ProxySlots {
    /// SCSI adapters that disks can be added to.
    let adapters: Int
    /// Places that are free on them, and allowed.
    let free: Int
    /// In words.
    let summary: String

    /// Counts the places of a proxy; nil where its adapters are not known.
    init?(_ proxy: Inventory.Proxy) {
        guard let controllers = proxy.controllers else { return nil }
        let usable = controllers.filter(Self.isUsable)
        adapters = usable.count
        let places = usable.reduce(0) { $0 + Self.free(of: $1) }
        let all = usable.reduce(0) { $0 + Self.targets(of: $1).count }
        let allowed = proxy.maximumDisks.map { max(0, min($0, 10_000) - (all - places)) } ?? places
        free = min(places, allowed)
        let limit = allowed < places ? ", of which only \(allowed) may be used (maximumDisks)" : ""
        summary = "\(places) of \(all) places free on \(adapters) adapter\(adapters == 1 ? "" : "s")\(limit)"
    }

    /// Free places on an adapter.
    static func free(of controller: Inventory.Controller) -> Int {
        if !isUsable(controller) { return 0 }
        return targets(of: controller).subtracting(controller.usedUnits ?? []).count
    }

    /// SCSI, and this proxy's own: what is added to a shared adapter is added to others, too.
    private static func isUsable(_ controller: Inventory.Controller) -> Bool {
        controller.kind.isSCSI == true && controller.busSharing != .virtual && controller.busSharing != .physical
    }

    /// Units of an adapter that disks can have. 7 is the adapter's own.
    private static func targets(of controller: Inventory.Controller) -> Set<Int> {
        Set(0..<min(max(controller.units ?? controller.kind.units, 0), 256)).subtracting([7])
    }
}

/// The proxies that all SCSI disks of a machine can be added to, the best first.
public struct ProxyChoice: Sendable {
    /// A proxy, and why not it.
    public struct Refusal: Sendable, Equatable {
        public var proxy: Inventory.Proxy
        public var reason: String
    }

    /// Datastores that the machine's SCSI disks lie on.
    public let datastores: [String]
    /// Hosts that mount all of these.
    public let hosts: [String]
    /// Proxies on these hosts, those on the machine's own first, then those with the most free places.
    public let eligible: [Inventory.Proxy]
    /// The others.
    public let refused: [Refusal]

    /// Chooses among this proxy and the others of an inventory.
    public init(for machine: Inventory.Machine, in inventory: Inventory) {
        let disks = machine.disks.filter { $0.controller?.isSCSI != false }
        let datastores = Set(disks.flatMap(\.datastores)).sorted()
        let mounting = datastores.map { Set(inventory.datastore($0)?.hosts ?? []) }
        var common = mounting.first ?? []
        for hosts in mounting.dropFirst() { common.formIntersection(hosts) }
        let hosts = common.filter { inventory.host($0)?.isInMaintenance != true }.sorted()
        var eligible: [Inventory.Proxy] = []
        var refused: [Refusal] = []
        let all = [inventory.proxy].compactMap(\.self) + inventory.proxies
        for proxy in all {
            if let reason = Self.refusal(of: proxy, for: machine, disks.count, datastores, hosts) {
                refused.append(Refusal(proxy: proxy, reason: reason))
            } else {
                eligible.append(proxy)
            }
        }
        func rank(_ proxy: Inventory.Proxy) -> (Int, Int, String) {
            (proxy.host == machine.host ? 0 : 1, -(ProxySlots(proxy)?.free ?? 0), proxy.id ?? "")
        }
        self.datastores = datastores
        self.hosts = hosts
        self.eligible = eligible.sorted { rank($0) < rank($1) }
        self.refused = refused
    }

    private static func refusal(
        of proxy: Inventory.Proxy, for machine: Inventory.Machine, _ count: Int, _ datastores: [String],
        _ hosts: [String]
    ) -> String? {
        guard let id = proxy.id, proxy.isPhysical != true else { return "it is no virtual machine that is known" }
        if id == machine.id { return "it is the machine itself" }
        guard proxy.power == .on else { return "it is \(proxy.power?.rawValue ?? "not known to be on")" }
        if let place = proxy.datacenter, let other = machine.datacenter, place != other {
            return "it is in \(place), the machine in \(other)"
        }
        if let manager = proxy.manager, let other = machine.manager, manager != other {
            return "\(manager) knows it, the machine is with \(other)"
        }
        if datastores.isEmpty { return "the datastores of the machine's SCSI disks are not known" }
        guard let host = proxy.host, hosts.contains(host) else {
            let all = datastores.joined(separator: ", ")
            return "its host \(proxy.host ?? "is not known, and") does not mount all of \(all)"
        }
        if machine.isEncrypted == true && proxy.isEncrypted != true { return "the machine is encrypted, and it is not" }
        guard let slots = ProxySlots(proxy) else { return "its SCSI adapters are not known" }
        if slots.free < count { return "it has \(slots.free) free places for \(count) disks" }
        return nil
    }
}
