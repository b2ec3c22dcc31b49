// The disks that this proxy sees, as `diskgate disks` shows them: who they are, what lies on them, who uses them.
import Block
public import Formats
public import LinuxIO

/// A disk with everything that is known of it.
public struct DiskReport: Sendable, Codable, Equatable {
    public var name: String
    public var node: String
    public var size: UInt64
    public var hctl: String?
    public var controller: AttachedDisk.Controller?
    public var wwid: String?
    /// All worldwide names, best first.
    public var names: [String]
    public var serial: String?
    public var vendor: String?
    public var model: String?
    public var logicalBlock: UInt32
    public var physicalBlock: UInt32
    public var isReadOnly: Bool
    public var diskSequence: UInt64?
    public var state: String?
    /// The multipath map that it is a path of.
    public var multipath: String?
    /// What else holds it: devices of device mapper and MD.
    public var holders: [String]
    /// Whether this machine's own programs are kept from it; nil for disks of other kinds than SCSI, and where `setup`
    /// was not run and no udev is at work.
    public var protection: DiskProtection?
    /// What lies on it; nil where it was not, or could not be read.
    public var content: [ContentSignatures.Content]?
    /// Why it could not be read.
    public var problem: String?
    /// Where it, a partition of it or what holds it is mounted.
    public var uses: [String]

    /// Looks at a disk.
    ///
    /// - Parameters:
    ///   - disk: the disk.
    ///   - protections: what the machine's settings make of disks; nil where there is nothing to tell.
    ///   - all: all disks, for what lies over this one.
    ///   - readsContent: whether to look what lies on it, which needs the right to read it.
    public init(
        _ disk: AttachedDisk, among all: [AttachedDisk], users: NodeUsers, protections: DiskProtections?,
        readsContent: Bool
    ) {
        name = disk.name
        node = disk.node
        size = disk.size
        hctl = disk.address.map { "\($0)" }
        controller = disk.controller
        wwid = disk.wwid
        names = disk.names
        serial = disk.serial
        vendor = disk.vendor
        model = disk.model
        logicalBlock = disk.logicalBlock
        physicalBlock = disk.physicalBlock
        isReadOnly = disk.isReadOnly
        diskSequence = disk.diskSequence
        state = disk.state
        protection = protections?.state(of: disk)
        multipath = disk.multipath.map { $0.title ?? $0.name }
        holders = disk.holders.filter { !$0.isMultipath }.map { holder in
            holder.title.map { "\($0) (\(holder.name))" } ?? holder.name
        }
        uses = Self.stack(on: disk, all).flatMap { Self.purposes(of: $0, users) }
        guard readsContent else { return }
        do throws(BlockError) {
            let device = try BlockNodeDevice.open(disk.node)
            content = try ContentSignatures.recognised(on: device)
        } catch { problem = error.message }
    }

    /// A disk and all that lies over it: a volume on an encrypted device on a partition of it.
    private static func stack(on disk: AttachedDisk, _ all: [AttachedDisk]) -> [AttachedDisk] {
        var found = [disk]
        var position = 0
        while position < found.count {
            let holders = Set(found[position].holders.map(\.name))
            found += all.filter { other in holders.contains(other.name) && !found.contains { $0.name == other.name } }
            position += 1
        }
        return found
    }

    private static func purposes(of disk: AttachedDisk, _ users: NodeUsers) -> [String] {
        var found = users.purposes(major: disk.major, minor: disk.minor)
        for partition in disk.partitions {
            found += users.purposes(major: partition.major, minor: partition.minor)
        }
        return found
    }
}
