// Which disks this machine sees: asked of sysfs each time, with or without udev.
public import Block
import CLinux
import Glibc

/// The disks that this machine sees.
public struct DiskInventory: Sendable {
    private let sysfs: String

    /// - Parameter sysfs: where sysfs is; another place than /sys holds what tests have put there.
    public init(sysfs: String = "/sys") { self.sysfs = sysfs }

    /// All disks with at least one byte, in the order of their names.
    ///
    /// - Throws: `BlockError` when sysfs cannot be read. A disk that goes away meanwhile is left out.
    public func disks() throws(BlockError) -> [AttachedDisk] {
        try namesInDirectory("\(sysfs)/block").compactMap { disk(named: $0) }.sorted(by: Self.areInOrder)
    }

    /// sdb before sdaa, loop2 before loop10.
    private static func areInOrder(_ left: AttachedDisk, _ right: AttachedDisk) -> Bool {
        (left.name.utf8.count, left.name) < (right.name.utf8.count, right.name)
    }

    /// The disk with a name of the kernel's.
    ///
    /// - Returns: nil when there is none, or it has no bytes.
    public func disk(named name: String) -> AttachedDisk? { disk(in: "\(sysfs)/block/\(name)", name: name) }

    /// The disk that an open node is, or is a partition of, whatever its name has come to mean since.
    ///
    /// - Throws: `BlockError` when the descriptor cannot be asked, is no node, or its disk is gone.
    public func disk(of node: Descriptor) throws(BlockError) -> AttachedDisk {
        let status = try node.status()
        guard status.st_mode & S_IFMT == S_IFBLK else {
            throw BlockError(.invalid, "asking which disk it is: what is open is no block device")
        }
        let number = UInt64(status.st_rdev)
        let folder = "\(sysfs)/dev/block/\(dg_device_major(number)):\(dg_device_minor(number))"
        guard let real = realpath(folder, nil) else {
            throw BlockError(errno: errno, "asking which disk \(folder) is")
        }
        defer { free(real) }
        var path = String(cString: real)[...]
        if readText("\(path)/partition") != nil, let end = path.lastIndex(of: "/") { path = path[..<end] }
        guard let name = path.split(separator: "/").last, let disk = disk(in: String(path), name: String(name)) else {
            throw BlockError(.notFound, "asking which disk \(folder) is: it has gone away")
        }
        return disk
    }

    private func disk(in folder: String, name: String) -> AttachedDisk? {
        guard let sectors = readText("\(folder)/size").flatMap(UInt64.init), sectors > 0,
            let (major, minor) = deviceNumber(folder)
        else { return nil }
        // The kernel counts units of 512 bytes, whatever the disk's blocks are.
        let (size, overflow) = sectors.multipliedReportingOverflow(by: 512)
        if overflow { return nil }
        // sysfs writes / as ! in names.
        let shown = String(name.map { $0 == "!" ? "/" : $0 })
        var disk = AttachedDisk(name: shown, major: major, minor: minor, size: size)
        disk.vendor = text("\(folder)/device/vendor")
        disk.model = text("\(folder)/device/model")
        disk.logicalBlock = number("\(folder)/queue/logical_block_size") ?? 512
        disk.physicalBlock = number("\(folder)/queue/physical_block_size") ?? disk.logicalBlock
        disk.isReadOnly = readText("\(folder)/ro") == "1"
        disk.isRemovable = readText("\(folder)/removable") == "1"
        disk.isRotational = readText("\(folder)/queue/rotational") == "1"
        disk.diskSequence = readText("\(folder)/diskseq").flatMap(UInt64.init)
        disk.state = text("\(folder)/device/state")
        addNames(to: &disk, folder)
        addPlace(to: &disk, folder)
        addUsers(to: &disk, folder)
        return disk
    }

    private func deviceNumber(_ folder: String) -> (major: UInt32, minor: UInt32)? {
        let parts = (readText("\(folder)/dev") ?? "").split(separator: ":").map { UInt32($0) }
        guard parts.count == 2, let major = parts[0], let minor = parts[1] else { return nil }
        return (major, minor)
    }

    private func text(_ path: String) -> String? { readText(path).flatMap { $0.isEmpty ? nil : $0 } }

    private func number(_ path: String) -> UInt32? { readText(path).flatMap(UInt32.init) }

    private func addNames(to disk: inout AttachedDisk, _ folder: String) {
        let device = "\(folder)/device"
        if let page = try? readSmallFile("\(device)/vpd_pg83") { disk.names = VitalProductData.names(page) }
        // What the kernel has chosen; other kinds of disks have it in a place of their own.
        for path in ["\(device)/wwid", "\(folder)/wwid"] {
            guard let name = text(path) else { continue }
            disk.kernelName = disk.kernelName ?? name
            let known = disk.names.contains { $0 == name }
            if !known && (disk.names.isEmpty || !name.hasPrefix("t10.")) { disk.names.append(name) }
        }
        if let page = try? readSmallFile("\(device)/vpd_pg80") { disk.serial = VitalProductData.serial(page) }
        disk.serial = disk.serial ?? text("\(device)/serial") ?? text("\(folder)/serial")
    }

    private func addPlace(to disk: inout AttachedDisk, _ folder: String) {
        guard let real = realpath("\(folder)/device", nil) else { return }
        defer { free(real) }
        let parts = String(cString: real).split(separator: "/")
        disk.address = parts.last.flatMap { SCSIAddress($0) }
        let bus = parts.last { Self.isBusAddress($0) }.map(String.init)
        let driver: String?
        if let address = disk.address {
            driver = text("\(sysfs)/class/scsi_host/host\(address.host)/proc_name")
        } else {
            driver = linkName("\(folder)/device/driver")
        }
        if driver != nil || bus != nil { disk.controller = .init(driver: driver ?? "unknown", address: bus) }
    }

    /// Whether a name is a place on the PCI bus: 0000:03:00.0.
    private static func isBusAddress(_ text: Substring) -> Bool {
        let groups = text.split(whereSeparator: { $0 == ":" || $0 == "." })
        return groups.map(\.count) == [4, 2, 2, 1] && groups.allSatisfy { $0.allSatisfy(\.isHexDigit) }
    }

    private func linkName(_ path: String) -> String? {
        guard let real = realpath(path, nil) else { return nil }
        defer { free(real) }
        return String(cString: real).split(separator: "/").last.map(String.init)
    }

    private func addUsers(to disk: inout AttachedDisk, _ folder: String) {
        let names = (try? namesInDirectory(folder)) ?? []
        for name in names.sorted() where readText("\(folder)/\(name)/partition") != nil {
            guard let (major, minor) = deviceNumber("\(folder)/\(name)") else { continue }
            disk.partitions.append(.init(name: name, major: major, minor: minor))
        }
        for place in [folder] + disk.partitions.map({ "\(folder)/\($0.name)" }) {
            for name in ((try? namesInDirectory("\(place)/holders")) ?? []).sorted() {
                if disk.holders.contains(where: { $0.name == name }) { continue }
                let title = text("\(sysfs)/block/\(name)/dm/name")
                let isMap = isMultipathMap("\(sysfs)/block/\(name)")
                disk.holders.append(.init(name: name, title: title, isMultipath: isMap))
            }
        }
        disk.isMultipathMap = isMultipathMap(folder)
    }

    private func isMultipathMap(_ folder: String) -> Bool { text("\(folder)/dm/uuid")?.hasPrefix("mpath-") == true }
}
