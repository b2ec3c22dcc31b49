// How many disks a host gives away over the network at a time, by its version: the limits of VMware's NFC service.

/// A limit of sessions at a time, over all jobs of this proxy.
public struct SessionLimit: Sendable, Equatable {
    /// What it is counted for: `host esx1`, `manager vc1`.
    public var key: String
    /// The most sessions at a time.
    public var limit: Int
    /// Where the figure comes from.
    public var origin: String

    /// A limit.
    public init(key: String, limit: Int, origin: String) {
        self.key = key
        self.limit = limit
        self.origin = origin
    }

    /// Every open disk is a session: each that a copy or a clone opens counts, and none can be shared.
    ///
    /// ESX 3.5: 9, through a manager 27. 4.x: 11 and 23. 5.x: 32 MiB of buffers and from 6.x on 48 MiB for all
    /// sessions, each with 1 MiB. A manager has 52 for all of its hosts from 5.x on.
    private static let table: [(major: Int, direct: Int, managed: Int, ofManager: Int?)] = [
        (3, 9, 27, nil), (4, 11, 23, nil), (5, 32, 32, 52), (6, 48, 48, 52),
    ]

    /// The limits of a host; empty for hosts without any.
    ///
    /// A version that is newer than the table has the newest row; one that is not known, or older, the oldest.
    public static func limits(of host: Inventory.Host) -> [SessionLimit] {
        let key = "host \(host.name)"
        let version = host.version.flatMap(HostVersion.init)
        if let own = host.sessionLimit {
            return [SessionLimit(key: key, limit: min(max(own, 0), 10_000), origin: "as the inventory says")]
        }
        switch host.kind {
        case .qemu, .hci: return []
        case .esx: break
        case .unknown, nil: if version == nil { return [] }
        }
        guard let version, let major = version.parts.first else {
            return [SessionLimit(key: key, limit: 9, origin: "its version is not known: as of ESX 3.5")]
        }
        let row = table.last { $0.major <= major } ?? table[0]
        let origin = "as of ESX \(host.version ?? "")"
        guard let manager = host.manager else { return [SessionLimit(key: key, limit: row.direct, origin: origin)] }
        var limits = [SessionLimit(key: key, limit: row.managed, origin: "\(origin) through \(manager)")]
        if let most = row.ofManager {
            limits.append(
                SessionLimit(key: "manager \(manager)", limit: most, origin: "of one manager for all of its hosts"))
        }
        return limits
    }
}
