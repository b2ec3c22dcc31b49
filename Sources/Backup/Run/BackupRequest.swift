// What a user asks a backup run for.
public import Hypervisors

/// A backup of one machine into one repository.
public struct BackupRequest: Sendable {
    /// The machine as the user names it: qmp+unix:PATH, libvirt:URI/DOMAIN.
    public var machine: String
    /// The repository's path.
    public var repository: String
    /// The disks that take part.
    public var disks = DiskSelection()
    /// Whether all of each disk is to be read, whatever is known about changes.
    public var isFull = false
    /// Whether file systems in the guest are frozen for the moment of the snapshot.
    public var quiescing = Quiescing.ifPossible
    /// The longest time that they are, in seconds.
    public var freezeSecondsMax = 20
    /// Where copies of what the guest overwrites meanwhile are kept; nil for the hypervisor's choice.
    public var scratchDirectory: String?
    /// Bytes that must stay free there.
    public var scratchReserve: UInt64 = 1 << 30
    /// How much of what is said to be unchanged is read again.
    public var sampling = Sampling.automatic
    /// Workers for each disk; nil for as many as are worth it.
    public var workers: Int?
    /// Seconds to wait for another run of the same machine; 0 refuses at once.
    public var waitSeconds = 0
    /// Which points stay when the run has made its own; nil for all.
    public var retention: RetentionRule?
    /// The program that makes the point, with its version.
    public var tool = "diskgate"
    /// Where runs keep their ledgers.
    public var stateDirectory: String

    /// How much of what is said to be unchanged a run reads again, to find changes that went unrecorded.
    public enum Sampling: Sendable, Equatable {
        /// Up to 256 MiB, and no more than a quarter of what is copied, but at least 16 MiB.
        case automatic
        /// So many bytes of each disk.
        case bytes(UInt64)
        /// All of it.
        case everything

        /// The bytes to read again where so many are copied.
        func budget(copied: UInt64) -> UInt64 {
            switch self {
            case .automatic: max(16 << 20, min(256 << 20, copied / 4))
            case .bytes(let count): count
            case .everything: .max
            }
        }
    }

    /// A request with everything else as usual.
    public init(machine: String, repository: String, stateDirectory: String) {
        self.machine = machine
        self.repository = repository
        self.stateDirectory = stateDirectory
    }
}
