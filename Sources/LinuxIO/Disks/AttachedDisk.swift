// A disk that this machine sees, with everything that tells it from others.

/// A SCSI address: host, channel, target and logical unit.
public struct SCSIAddress: Hashable, Sendable, Codable, CustomStringConvertible {
    /// The number of the host adapter.
    public var host: UInt32
    /// The adapter's channel.
    public var channel: UInt32
    /// The target on the channel.
    public var target: UInt32
    /// The logical unit of the target.
    public var unit: UInt64

    /// Takes H:C:T:L apart; nil for anything else.
    public init?(_ text: some StringProtocol) {
        let parts = text.split(separator: ":", omittingEmptySubsequences: false)
        guard parts.count == 4, let host = UInt32(parts[0]), let channel = UInt32(parts[1]),
            let target = UInt32(parts[2]), let unit = UInt64(parts[3])
        else { return nil }
        (self.host, self.channel, self.target, self.unit) = (host, channel, target, unit)
    }

    public var description: String { "\(host):\(channel):\(target):\(unit)" }
}

/// A disk that this machine sees.
public struct AttachedDisk: Sendable, Equatable {
    /// The adapter that a disk hangs on.
    public struct Controller: Sendable, Equatable, Codable {
        /// The driver's name: vmw_pvscsi, virtio_scsi, iscsi_tcp.
        public var driver: String
        /// Its place on the PCI bus, as 0000:03:00.0; nil where it is on none.
        public var address: String?
    }

    /// What lies over a disk and holds it: a device of device mapper or MD.
    public struct Holder: Sendable, Equatable, Codable {
        /// The kernel's name: dm-0, md127.
        public var name: String
        /// What it is called: a multipath map's or logical volume's name; nil where it has none.
        public var title: String?
        /// Whether it is a multipath map, of which this disk is one path.
        public var isMultipath: Bool
    }

    /// A partition that the kernel has found.
    public struct Partition: Sendable, Equatable, Codable {
        /// The kernel's name: sda1.
        public var name: String
        /// Its device number.
        public var major: UInt32
        public var minor: UInt32
    }

    /// The kernel's name, which says nothing about who the disk is: sda.
    public var name: String
    /// Its device number.
    public var major: UInt32
    public var minor: UInt32
    /// Bytes on it.
    public var size: UInt64
    /// Its SCSI address.
    public var address: SCSIAddress?
    /// The adapter.
    public var controller: Controller?
    /// Its worldwide names, best first: naa., eui., t10.
    public var names: [String] = []
    /// The one that the kernel has chosen, as sysfs has it (device/wwid): what udev's rules can match.
    public var kernelName: String?
    /// The unit's serial number.
    public var serial: String?
    public var vendor: String?
    public var model: String?
    /// Bytes of a logical and of a physical block.
    public var logicalBlock: UInt32 = 512
    public var physicalBlock: UInt32 = 512
    /// Whether it refuses writes, by the disk's own word or the kernel's switch.
    public var isReadOnly = false
    public var isRemovable = false
    /// Whether it has spinning platters, so that order matters.
    public var isRotational = false
    /// Its place in the order in which this kernel has met disks; another disk of the same name has another.
    public var diskSequence: UInt64?
    /// The SCSI device's state: running, offline, blocked.
    public var state: String?
    /// What lies over it and its partitions.
    public var holders: [Holder] = []
    /// Whether it is itself a multipath map over the paths of one disk.
    public var isMultipathMap = false
    /// The kernel's partitions of it.
    public var partitions: [Partition] = []

    /// The path of its node.
    public var node: String { "/dev/\(name)" }

    /// The multipath map that it is a path of.
    public var multipath: Holder? { holders.first(where: \.isMultipath) }

    /// The best of its worldwide names.
    public var wwid: String? { names.first }

    /// What it is known by, in the order to print it; without its place in the kernel's order.
    public var identity: [(key: String, value: String)] {
        let facts = [
            ("vendor", vendor), ("model", model), ("wwn", wwid), ("serial", serial),
            ("hctl", address.map { "\($0)" }),
        ]
        return facts.compactMap { key, value in value.map { (key, $0) } }
    }
}

/// What picks a disk out of those that this machine sees.
public enum DiskSelector: Hashable, Sendable, Codable, CustomStringConvertible {
    /// A serial number.
    case serial(String)
    /// A worldwide name, with or without its kind or 0x before the digits, in either case.
    case name(String)
    /// A SCSI address.
    case address(SCSIAddress)

    public var description: String {
        switch self {
        case .serial(let serial): "serial=\(serial)"
        case .name(let name): "wwn=\(name)"
        case .address(let address): "hctl=\(address)"
        }
    }

    /// Whether a disk is meant.
    public func matches(_ disk: AttachedDisk) -> Bool {
        switch self {
        case .serial(let serial): return disk.serial == serial
        case .address(let address): return disk.address == address
        case .name(let name):
            let wanted = Self.bareName(name)
            return disk.names.contains { $0 == name || Self.bareName($0) == wanted }
        }
    }

    /// A worldwide name without what people write before or leave out of it: two names of one disk are the same so.
    public static func bareName(_ name: String) -> String {
        var text = name.lowercased()[...]
        for prefix in ["naa.", "eui.", "0x", "wwn-0x"] where text.hasPrefix(prefix) {
            text = text.dropFirst(prefix.count)
            break
        }
        return String(text)
    }
}
