// A SCSI disk of the proxy's own, by what stays the same of it: every other one is a guest's, and is kept out.
public import LinuxIO

/// A disk of the proxy's own, as `setup` has recorded it.
public struct OwnDisk: Sendable, Codable, Equatable {
    /// The worldwide name that the kernel has chosen (sysfs: wwid); nil where the disk has none.
    public var wwid: String?
    /// The adapter's place on the PCI bus, as 0000:03:00.0; nil where it is on none.
    public var bus: String?
    /// The adapter's driver: vmw_pvscsi, virtio_scsi.
    public var driver: String?
    /// The SCSI address. The number of the adapter changes from boot to boot, and counts only where `bus` is nil.
    public var hctl: String
    /// The unit's serial number, for people.
    public var serial: String?
    /// Vendor and model, for people.
    public var model: String?
    /// Bytes on it when it was recorded, for people: disks grow.
    public var size: UInt64
    /// Why it is one of the proxy's own: where it is mounted, what holds it, or that somebody has named it.
    public var reason: String
    /// Whether the machine runs from it: `/`, `/boot` or swap was on it when it was recorded. Nil in older records.
    public var isSystem: Bool?

    /// Records a disk.
    ///
    /// - Returns: nil for what is no SCSI disk, which nothing keeps out.
    public init?(_ disk: AttachedDisk, reason: String, isSystem: Bool) {
        guard let address = disk.address else { return nil }
        wwid = disk.kernelName
        bus = disk.controller?.address
        driver = disk.controller?.driver
        hctl = "\(address)"
        serial = disk.serial
        let kind = [disk.vendor, disk.model].compactMap(\.self).joined(separator: " ")
        model = kind.isEmpty ? nil : kind
        size = disk.size
        self.reason = reason
        self.isSystem = isSystem
    }

    /// Adapters of virtual machines: a place on them is one slot, which no other disk can have while this one is there.
    /// On others (FC, iSCSI) places change hands.
    private static let slotted: Set<String> = [
        "vmw_pvscsi", "virtio_scsi", "mptspi", "mptsas", "storvsc", "sym53c8xx",
    ]
    /// Drivers of which each port or device is a SCSI host of its own (libata, USB): all disks of one adapter are
    /// N:0:0:0, and nothing in that tells one from another.
    private static let portNames = ["ahci", "acard-ahci", "pdc_adma", "usb-storage", "uas"]
    private static let portPrefixes = ["ata_", "pata_", "sata_", "ums-"]

    private var isOnItsOwnHost: Bool {
        guard let driver else { return false }
        return Self.portNames.contains(driver) || Self.portPrefixes.contains(where: driver.hasPrefix)
    }

    /// What passes for this disk at its place; a disk of its name does anywhere.
    enum Place {
        /// No other.
        case none
        /// Disks without a name.
        case nameless
        /// Whatever is there: a machine that was cloned or restored has disks with other names, and has to boot.
        case whatever
    }

    var place: Place {
        if isSystem != false, bus != nil, driver.map(Self.slotted.contains) == true { return .whatever }
        if wwid == nil { return .nameless }
        // A LUN whose name could not be asked for when it came.
        let isLUN = !isOnItsOwnHost && driver.map(Self.slotted.contains) != true
        return isLUN ? .nameless : .none
    }

    /// Whether a disk is this one, as udev's rule sees it: by its name, or by its place, as far as that says so.
    public func isSame(as disk: AttachedDisk) -> Bool {
        if let wwid, wwid == disk.kernelName { return true }
        switch place {
        case .none: return false
        case .nameless: return disk.kernelName == nil && isAtPlace(of: disk)
        case .whatever: return isAtPlace(of: disk)
        }
    }

    private func isAtPlace(of disk: AttachedDisk) -> Bool {
        guard let place = SCSIAddress(hctl), let other = disk.address else { return false }
        let isSameAdapter = bus == nil ? place.host == other.host : bus == disk.controller?.address
        return isSameAdapter && place.channel == other.channel && place.target == other.target
            && place.unit == other.unit
    }
}

/// What `setup` has found and been told on this machine, beneath /etc/diskgate.
struct ProtectionRecord: Codable, Equatable {
    /// The record's form: a later one is refused.
    var version = 1
    /// The disks of the proxy's own.
    var disks: [OwnDisk] = []
}
