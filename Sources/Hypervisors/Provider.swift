// The seam between a backup run and a hypervisor: what each of them has to be able to do.
public import Block
public import Transports

/// A virtual machine on a hypervisor, reached by the URI that the user gave.
///
/// All calls block, for bounded times: a hypervisor that does not answer is an error after a deadline, never a hang.
/// Whatever is made outside this process is written to the run's ledger before it is made.
public protocol Provider: AnyObject, Sendable {
    /// The machine as the user named it, without secrets.
    var name: String { get }

    /// Asks the hypervisor which machine it is: what has to be known before anything else of it may be trusted to stay.
    ///
    /// - Returns: `VirtualMachine.id` and its name.
    func identify() throws(BlockError) -> (id: String, name: String)

    /// Asks the hypervisor about the machine.
    func inspect() throws(BlockError) -> VirtualMachine

    /// As `inspect`, for a run that takes some of the disks only: the others need not be looked at closely.
    ///
    /// - Parameter isWanted: whether a disk, of which at least the id and a name are known, takes part.
    func inspect(where isWanted: (VirtualDisk) -> Bool) throws(BlockError) -> VirtualMachine

    /// Prepares the machine so that the next run can be followed by incremental ones. Done twice, it changes nothing.
    ///
    /// - Returns: what was done, one sentence for each disk.
    func protect() throws(BlockError) -> [String]

    /// Removes all change tracking that diskgate has made, and nothing else.
    func unprotect() throws(BlockError) -> [String]

    /// Forgets all changes known so far: the next run is a full one.
    func resetTracking() throws(BlockError) -> [String]

    /// Freezes where that is asked for and possible, makes one point in time of all disks, thaws, and offers the disks
    /// for reading. What `inspect` has found last may be relied on once.
    ///
    /// When it throws, nothing stays behind: what was made is undone, or still stands in the ledger.
    func begin(_ request: SnapshotRequest, ledger: RunLedger) throws(BlockError) -> any SnapshotSession

    /// Gives back what an obligation of an earlier run stands for. Called again after a crash in the middle, it ends
    /// the same way; what is gone already is success.
    ///
    /// - Parameter adopted: whether the run's restore point is durable, so that its checkpoint takes the place of the
    ///   one before; otherwise what changed since is merged back into that, so that nothing is missed.
    func settle(_ obligation: Obligation, adopted: Bool) throws(BlockError)
}

extension Provider {
    public func inspect(where isWanted: (VirtualDisk) -> Bool) throws(BlockError) -> VirtualMachine { try inspect() }

    public func identify() throws(BlockError) -> (id: String, name: String) {
        let machine = try inspect()
        return (machine.id, machine.name)
    }
}

/// Whether file systems in the guest are to be frozen for the moment of the snapshot.
public enum Quiescing: String, Sendable, CaseIterable {
    /// Where an agent answers; otherwise without, which is said loudly.
    case ifPossible = "if-possible"
    /// Or else the run fails.
    case required
    /// Not at all.
    case never
}

/// What a run wants of the hypervisor.
public struct SnapshotRequest: Sendable {
    /// A disk to take part.
    public struct Disk: Sendable {
        /// `VirtualDisk.id`.
        public var id: String
        /// The checkpoint since which changes are wanted; nil for the whole disk.
        public var since: String?

        /// A disk to take part.
        public init(id: String, since: String?) {
            self.id = id
            self.since = since
        }
    }

    /// The disks; all get the same point in time.
    public var disks: [Disk]
    /// The name of the checkpoint to make on each disk that can be tracked: letters, digits and dashes. The provider
    /// may put its own prefix in front; `SnapshotDisk.checkpoint` has the result. An adopted checkpoint replaces those
    /// that differ from it only behind the last dash: with names like REPOSITORY-NUMBER, several repositories can back
    /// up one machine.
    public var checkpoint: String
    /// Whether to freeze.
    public var quiescing = Quiescing.ifPossible
    /// The longest time that file systems stay frozen, in seconds, whatever happens.
    public var freezeSecondsMax = 20
    /// Where copies of what the guest overwrites during the run are kept; nil for the provider's choice.
    public var scratchDirectory: String?
    /// Bytes that must stay free where the scratch space is: below them the run fails, before the guest suffers.
    public var scratchReserve: UInt64 = 1 << 30

    /// A request for some disks.
    public init(disks: [Disk], checkpoint: String) {
        self.disks = disks
        self.checkpoint = checkpoint
    }
}

/// How consistent a point in time is.
public enum Consistency: String, Sendable, Codable {
    /// The guest's file systems were frozen.
    case quiesced
    /// As after a power cut.
    case crashConsistent = "crash-consistent"
    /// The machine was powered off.
    case offline
    /// The disks may have been written while they were read, as their user has accepted.
    case inconsistent
}

/// One point in time of a machine's disks, open for reading until it is finished.
public protocol SnapshotSession: AnyObject, Sendable {
    /// The disks, in the request's order.
    var disks: [SnapshotDisk] { get }
    /// How consistent the point in time is.
    var consistency: Consistency { get }
    /// How long file systems were frozen, in seconds; nil where they were not.
    var freezeSeconds: Double? { get }
    /// When the point in time was, in seconds since 1970.
    var time: Double { get }
    /// What the user should know: no agent, no tracking on a disk.
    var warnings: [String] { get }

    /// Looks whether the snapshot still holds, and whether there is scratch space enough. Called every second or so
    /// while the disks are read, and once after the last byte was read: only then what was read is known to be good.
    ///
    /// - Parameter isLast: whether everything has been read: then nothing is left out because it was asked just before.
    /// - Throws: `BlockError` when the run has to end, for the guest's sake or because the disks cannot be trusted.
    func check(isLast: Bool) throws(BlockError)

    /// Ends the snapshot and takes everything back that was made for it.
    ///
    /// - Parameter adopting: whether the restore point is durable: then the new checkpoint takes the place of those
    ///   before it. Otherwise the new one is merged back.
    /// - Throws: `BlockError` when something could not be taken back; it then stands in the ledger.
    func finish(adopting: Bool) throws(BlockError)
}

/// A disk at the point in time of a session.
public struct SnapshotDisk: Sendable {
    /// `VirtualDisk.id`.
    public var id: String
    /// Bytes on the disk.
    public var size: UInt64
    /// Where it can be read: an NBD URI or another source.
    public var source: SourceReference
    /// The disk, where it is open already: the source may be such as can be opened once only.
    public var device: (any BlockDevice)?
    /// Why it is this source, where there were several.
    public var choice: TransportChoice?
    /// Seconds that its server has for each answer; nil for the usual.
    public var answerSeconds: Int?
    /// The meta context that tells what changed since the wanted checkpoint (`qemu:dirty-bitmap:...`); nil where the
    /// whole disk has to be read.
    public var changedContext: String?
    /// Why the whole disk has to be read although changes were asked for; nil otherwise.
    public var downgrade: String?
    /// The checkpoint that the next run can ask for; nil where there is none on this disk.
    public var checkpoint: String?

    /// A disk that is to be read whole.
    public init(id: String, size: UInt64, source: SourceReference) {
        self.id = id
        self.size = size
        self.source = source
    }
}

extension Obligation {
    /// Whether another obligation of the same run has to wait for this one, which could not be given back: it stands
    /// for what this one may still use. All others are given back: a job is ended although nobody can tell what is to
    /// become of its checkpoint, and a guest is thawed whatever else has failed.
    public func holdsBack(_ other: Obligation) -> Bool {
        switch kind {
        case "qemu.job", "qemu.server", "qemu.node": other.kind == "qemu.directory"
        case "libvirt.backup": ["libvirt.checkpoint", "libvirt.directory"].contains(other.kind)
        default: false
        }
    }

    /// What may stay for ever when nobody gives this back any more, and what can be done about it, for people.
    public var price: String {
        let run = details["run"].map { " dg-\($0)-*" } ?? ""
        switch kind {
        case "guest.freeze": return "the guest's file systems may be frozen: look whether it can write, and thaw it"
        case "qemu.job": return "QEMU may go on copying what the guest overwrites, until it ends (job \(name("job")))"
        case "qemu.node": return "QEMU may keep the node \(name("node")) until it ends"
        case "qemu.server": return "QEMU may go on serving disks, until it ends (exports\(run))"
        case "qemu.checkpoint":
            return "the bitmap \(name("checkpoint")) may stay on the disk \(name("disk")), where it costs room and "
                + "time: diskgate unprotect removes it, or qemu-img bitmap --remove IMAGE \(name("checkpoint"))"
        case "qemu.directory", "libvirt.directory":
            return "scratch files may stay in \(name("path")): remove that when nobody uses it any more"
        case "libvirt.backup": return "libvirt's backup may go on: virsh domjobabort ends it"
        case "libvirt.checkpoint":
            return "the checkpoint \(name("checkpoint")) may stay: diskgate unprotect removes it, or virsh "
                + "checkpoint-delete"
        case "repository.partial":
            return "files of point \(name("sequence")), which was never made, may stay in \(name("repository"))"
        case "hotadd.disk": return "the disk \(name("id")) may stay added at \(name("controller"))"
        case "node.read-only": return "\(name("node")) may stay read-only: blockdev --setrw makes it writable"
        default: return "what it stands for may stay"
        }
    }

    private func name(_ key: String) -> String { details[key] ?? "(unknown)" }
}
