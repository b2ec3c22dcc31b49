// What a run tells the repository: at its start which disks will come, at its end what it knows of them.
public import Hypervisors
public import Transports

/// A restore point that is about to be made.
public struct PointRequest: Sendable {
    /// A disk of it.
    public struct Disk: Sendable {
        /// What the hypervisor calls it within the machine.
        public var id: String
        /// Bytes on it.
        public var size: UInt64
        /// Whether only what has changed since the parent will be written.
        public var isIncremental: Bool

        /// A disk of a size in bytes.
        public init(id: String, size: UInt64, isIncremental: Bool) {
            self.id = id
            self.size = size
            self.isIncremental = isIncremental
        }
    }

    /// Whose point it is.
    public var machine: RepositoryMachine
    /// The newest point of the machine, which this one follows; nil for the first one, and where what was there before
    /// is not to be built on. Incremental disks need one.
    public var parent: RestorePoint?
    /// The disks.
    public var disks: [Disk]
    /// The run's UUID.
    public var run: String
    /// Where it is noted what a crash would leave behind; nil where nobody looks (tests).
    public var ledger: RunLedger?

    /// A point of a machine.
    public init(machine: RepositoryMachine, parent: RestorePoint?, disks: [Disk], run: String, ledger: RunLedger?) {
        self.machine = machine
        self.parent = parent
        self.disks = disks
        self.run = run
        self.ledger = ledger
    }
}

/// What a run knows of its point when everything is written.
public struct PointFacts: Sendable {
    /// What it knows of a disk.
    public struct Disk: Sendable {
        /// Why it was not incremental, or whatever else decided; empty where there is nothing to say.
        public var reason = ""
        /// Where it was read.
        public var source = ""
        /// How it was read: nbd, file, hotadd.
        public var transport = ""
        /// The hypervisor's checkpoint of this moment.
        public var checkpoint: String?
        /// Bytes read from the source.
        public var bytesRead: UInt64 = 0
        /// Bytes read again to find changes that had not been told.
        public var bytesVerified: UInt64 = 0
        /// Which share of the unchanged chunks that was, as places of the disk's rotation.
        public var checked: Range<UInt64>?

        /// Nothing known yet.
        public init() {}
    }

    /// The point in time of the disks, in seconds since 1970.
    public var time: Double
    /// How consistent they are.
    public var consistency: Consistency
    /// How long file systems were frozen, in seconds; nil where they were not.
    public var freezeSeconds: Double?
    /// By the disks' ids.
    public var disks: [String: Disk] = [:]
    /// The machine's configuration.
    public var documents: [ConfigurationDocument] = []
    /// What the user was told.
    public var warnings: [String] = []
    /// The program that made the point, with its version.
    public var tool: String
    /// Earlier points that this run has found to miss changes, and why. They are marked when the point is sealed.
    public var suspects: [(point: RestorePoint, reason: String)] = []

    /// What is known of a point in time.
    public init(time: Double, consistency: Consistency, tool: String) {
        self.time = time
        self.consistency = consistency
        self.tool = tool
    }
}
