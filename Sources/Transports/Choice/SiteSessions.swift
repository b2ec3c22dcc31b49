// Sessions of the site's hosts for disks that are opened by their URIs: taken first, held for as long as they are open.
public import Block
import Glibc
import LinuxIO
public import NBD

/// What an inventory says of a disk that is opened.
public struct SiteDisk: Sendable {
    /// The disk, as people call it.
    public var title: String
    /// The host whose sessions its sources over the network take, whatever addresses they name; nil where that is not
    /// known.
    public var host: Inventory.Host?
    /// What the administrator wants.
    public var policy: ChoicePolicy
    /// What the rules say of each transport. Sources of one that they exclude are not tried.
    public var findings: [TransportKind: [Finding]]

    /// A disk of an inventory.
    public init(
        title: String, host: Inventory.Host?, policy: ChoicePolicy, findings: [TransportKind: [Finding]] = [:]
    ) {
        self.title = title
        self.host = host
        self.policy = policy
        self.findings = findings
    }
}

/// Takes sessions of the hosts of the site's inventory.
public enum SiteSessions {
    /// For how many seconds a disk waits for a session, unless the policy says otherwise.
    static let standardSeconds = 60

    private static let isEnding = Locked(false)

    /// Ends all waiting: the process is about to end.
    public static func endWaiting() { isEnding.withLock { $0 = true } }

    /// Fails when the process is about to end.
    ///
    /// - Parameter doing: what is not done then.
    /// - Throws: `.shutdown`.
    public static func checkEnding(_ doing: String) throws(BlockError) {
        if isEnding.withLock({ $0 }) { throw BlockError(.shutdown, "\(doing): stopped while it waited for a session") }
    }

    /// Waits for this process's turn to take several sessions: whoever has a part of what it needs must not wait for
    /// another who has the rest. For so long as a session is waited for; then it goes on without.
    ///
    /// - Parameter disks: what is to be opened.
    /// - Returns: what to hold until all are open; nil where nothing is limited, or it cannot be had.
    public static func turn(for disks: [DiskSpecification]) -> AnyObject? {
        let site = (try? SiteInventory.current()) ?? nil
        let hosts = disks.compactMap { $0.site?.host } + (site?.hosts ?? [])
        if hosts.allSatisfy({ SessionLimit.limits(of: $0).isEmpty }) { return nil }
        let directory = "\(defaultStateDirectory())/locks"
        guard (try? makeDirectories(directory)) != nil else { return nil }
        let policy = disks.compactMap { $0.site?.policy }.first ?? site?.policy ?? ChoicePolicy()
        let isStopped = { isEnding.withLock { $0 } }
        if isStopped() { return nil }
        // Where the file cannot be locked, taking a session says why.
        return (try? FileLock.take("\(directory)/sessions.lock", seconds: waitSeconds(policy), unless: isStopped))
            ?? nil
    }

    /// For how many seconds a disk may wait for a session by the site's inventory; 0 where there is none, or none that
    /// can be read.
    public static var siteWaitSeconds: Double {
        guard let site = try? SiteInventory.current() else { return 0 }
        return waitSeconds(site.policy)
    }

    /// For how many seconds a policy lets a disk wait for a session.
    private static func waitSeconds(_ policy: ChoicePolicy) -> Double {
        if policy.waitsForSessions == false { return 0 }
        return Double(min(max(policy.sessionWaitSeconds ?? standardSeconds, 0), 86_400))
    }

    /// Takes a session of each limit that an export's host has, by the site's inventory and by what is known of the
    /// disk.
    ///
    /// - Returns: nil where nothing is limited.
    /// - Throws: `.denied` when all are taken, with who has them, after as long a wait as the policy wants;
    ///   `.unsupported` for a limit of none at all; or that the site's inventory cannot be read.
    public static func take(for uri: NBDURI, of disk: SiteDisk? = nil) throws(BlockError) -> HostSession? {
        var limits = disk?.host.map { SessionLimit.limits(of: $0) } ?? []
        var policy = disk?.policy
        if case .tcp(let address, _) = uri.address, let site = try SiteInventory.current() {
            policy = policy ?? site.policy
            if let host = site.host(at: address) {
                limits += SessionLimit.limits(of: host).filter { limit in !limits.contains { $0.key == limit.key } }
            }
        }
        if limits.isEmpty { return nil }
        let purpose = disk.map { "\($0.title): \(uri)" } ?? uri.description
        return try take(limits, for: purpose, policy ?? ChoicePolicy(), opening: "\(uri)")
    }

    private static func take(_ limits: [SessionLimit], for purpose: String, _ policy: ChoicePolicy, opening: String)
        throws(BlockError) -> HostSession
    {
        let sessions = HostSessions()
        if let session = try sessions.take(limits, for: purpose) { return session }
        let seconds = waitSeconds(policy)
        if let holders = try exhausted(limits, sessions)?.holders {
            // Nobody else will give one back.
            if holders.allSatisfy({ $0.process == getpid() }) {
                throw try refusal(limits, sessions, opening, "and all by this process itself")
            }
            if seconds > 0 {
                let (limit, names) = (limits.map(\.key).joined(separator: " and the "), listed(holders))
                let text =
                    "diskgate: waiting up to \(Int(seconds)) s for a session of the \(limit), to open \(opening) "
                    + "(taken by \(names))\n"
                _ = text.withCString { write(STDERR_FILENO, $0, strlen($0)) }
            }
        }
        let session = try sessions.take(limits, for: purpose, seconds: seconds) { isEnding.withLock { $0 } }
        if let session { return session }
        try checkEnding("opening \(opening)")
        throw try refusal(limits, sessions, opening, seconds > 0 ? "for \(Int(seconds)) s" : "and none is waited for")
    }

    /// The first limit of which all sessions are taken, and by whom.
    private static func exhausted(_ limits: [SessionLimit], _ sessions: HostSessions) throws(BlockError) -> (
        limit: SessionLimit, holders: [HostSessions.Holder]
    )? {
        for limit in limits {
            let holders = try sessions.holders(of: limit.key)
            if holders.count >= limit.limit { return (limit, holders) }
        }
        return nil
    }

    private static func refusal(
        _ limits: [SessionLimit], _ sessions: HostSessions, _ opening: String, _ howLong: String
    ) throws(BlockError) -> BlockError {
        guard let (limit, holders) = try exhausted(limits, sessions) else {
            return BlockError(.denied, "opening \(opening): no session of its host came free \(howLong); try again")
        }
        let figures = "\(holders.count) of \(limit.limit) sessions of the \(limit.key) are taken (\(limit.origin))"
        return BlockError(
            .denied,
            "opening \(opening): \(figures), \(howLong): \(listed(holders)); end one of them, run fewer jobs at a "
                + "time, or raise its sessionLimit in the inventory")
    }

    private static func listed(_ holders: [HostSessions.Holder]) -> String {
        let names = holders.prefix(5).map { "process \($0.process) for \($0.purpose)" }
        return (names + (holders.count > 5 ? ["\(holders.count - 5) more"] : [])).joined(separator: ", ")
    }
}

extension NBDDevice {
    /// Connects to the export that a URI names, in a session of its host where the site's inventory limits those.
    ///
    /// - Parameter isWritable: whether it is to be changed.
    /// - Throws: as `NBDDevice.open` and `SiteSessions.take`.
    public static func openInSession(_ uri: NBDURI, isWritable: Bool = false) throws(BlockError) -> NBDDevice {
        try open(uri, isWritable: isWritable, keeping: try SiteSessions.take(for: uri))
    }
}

extension DiskSpecification {
    /// A session for the disk's source, where it takes one and none was taken before.
    func takeSession() throws(BlockError) -> HostSession? {
        guard session == nil, case .nbd(let uri) = source.kind else { return session }
        return try SiteSessions.take(for: uri, of: site)
    }

    /// Connects to the disk's source, which is an NBD export, as a URI says that may ask for more than the source does.
    ///
    /// - Throws: as `NBDDevice.open` and `SiteSessions.take`.
    public func openExport(_ uri: NBDURI) throws(BlockError) -> NBDDevice {
        try NBDDevice.open(uri, isWritable: access == .writable, keeping: try takeSession())
    }
}
