// What this machine has for each transport: its LUNs, adapters, rights, libraries and kernel modules.
public import Block
import CISCSI
import Glibc
import LinuxIO
import NBD

/// What this machine has, as far as transports go.
public struct MachineFacts: Sendable {
    /// A LUN, or any other SCSI disk.
    public struct Unit: Sendable, Equatable {
        public var node: String
        public var names: [String]
        /// The multipath map over it.
        public var multipath: String?
        /// Whether something of this machine lies on it.
        public var isOwn: Bool

        /// A unit.
        public init(node: String, names: [String], multipath: String? = nil, isOwn: Bool = false) {
            self.node = node
            self.names = names
            self.multipath = multipath
            self.isOwn = isOwn
        }
    }

    /// A SCSI host adapter.
    public struct Adapter: Sendable, Equatable {
        public var number: UInt32
        public var driver: String
        /// Whether this process can tell it to look for new disks.
        public var canScan: Bool

        /// An adapter.
        public init(number: UInt32, driver: String, canScan: Bool) {
            self.number = number
            self.driver = driver
            self.canScan = canScan
        }
    }

    /// SCSI disks that this machine sees.
    public var luns: [Unit] = []
    public var adapters: [Adapter] = []
    /// Whether this process may switch disks to read-only and drop what is cached of them (CAP_SYS_ADMIN).
    public var mayAdminister = false
    /// Whether this process may open disks that belong to root (CAP_DAC_OVERRIDE).
    public var mayOpenAll = false
    /// OpenSSL's version, or why it cannot be loaded.
    public var openSSL: Result<String, BlockError> = .failure(BlockError(.unsupported, "OpenSSL was not looked for"))
    /// Whether libiscsi can be loaded.
    public var hasLibiscsi = false
    /// iSCSI sessions that the kernel has.
    public var kernelSessions = 0
    /// Whether the kernel has an NBD client, and whether nbd-client is there to use it.
    public var hasKernelNBD = false
    public var hasNBDClient = false
    /// Whether udev, LVM, mdadm and multipath are kept away from disks that come; nil where nobody can say.
    public var protection: Finding?

    /// Nothing.
    public init() {}

    /// Libraries that are there, as inventories name them.
    public var libraries: [String] {
        var names: [String] = []
        if case .success = openSSL { names.append("openssl") }
        if hasLibiscsi { names.append("libiscsi") }
        return names
    }

    /// Looks at this machine.
    ///
    /// - Parameter protection: whether udev, LVM, mdadm and multipath are kept away from disks that come.
    /// - Throws: `BlockError` when sysfs cannot be read.
    public static func gather(sysfs: String = "/sys", protection: () -> Finding? = { nil }) throws(BlockError)
        -> MachineFacts
    {
        var facts = MachineFacts()
        let users = NodeUsers()
        for disk in try DiskInventory(sysfs: sysfs).disks() where disk.address != nil {
            let parts = disk.partitions.map { ($0.major, $0.minor) } + [(disk.major, disk.minor)]
            let isMounted = parts.contains { !users.purposes(major: $0.0, minor: $0.1).isEmpty }
            facts.luns.append(
                Unit(
                    node: disk.node, names: disk.names, multipath: disk.multipath.map { $0.title ?? $0.name },
                    isOwn: isMounted || disk.holders.contains { !$0.isMultipath }))
        }
        for number in SCSIHosts(sysfs: sysfs).numbers() {
            let folder = "\(sysfs)/class/scsi_host/host\(number)"
            facts.adapters.append(
                Adapter(
                    number: number, driver: readText("\(folder)/proc_name") ?? "unknown",
                    canScan: access("\(folder)/scan", W_OK) == 0))
        }
        let rights = capabilities()
        facts.mayAdminister = rights & 1 << 21 != 0
        facts.mayOpenAll = rights & 1 << 1 != 0
        facts.openSSL = TLSLibrary.version()
        facts.hasLibiscsi = dg_iscsi_load() == nil
        facts.kernelSessions = ((try? namesInDirectory("\(sysfs)/class/iscsi_session")) ?? []).count
        facts.hasKernelNBD = hasModule("nbd", sysfs) || access("/dev/nbd0", F_OK) == 0
        facts.hasNBDClient = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].contains {
            access("\($0)/nbd-client", X_OK) == 0
        }
        facts.protection = protection()
        return facts
    }

    /// Effective capabilities of this process (proc_pid_status(5)).
    private static func capabilities() -> UInt64 {
        let lines = (readText("/proc/self/status") ?? "").split(separator: "\n")
        let line = lines.first { $0.hasPrefix("CapEff:") }
        return line.flatMap { UInt64($0.dropFirst(7).drop { $0 == "\t" || $0 == " " }, radix: 16) } ?? 0
    }

    /// Whether the kernel has a module loaded, built in, or lying ready.
    private static func hasModule(_ name: String, _ sysfs: String) -> Bool {
        if access("\(sysfs)/module/\(name)", F_OK) == 0 { return true }
        let release = readText("/proc/sys/kernel/osrelease") ?? ""
        return ["modules.dep", "modules.builtin"].contains { file in
            guard let bytes = try? readSmallFile("/lib/modules/\(release)/\(file)", limit: 16 << 20) else {
                return false
            }
            return String(decoding: bytes, as: UTF8.self).contains("/\(name).ko")
        }
    }
}
