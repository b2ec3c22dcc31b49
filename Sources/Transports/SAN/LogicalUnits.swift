// The LUNs of a SAN as this proxy sees them: opened beside the hosts that use them, for reading only.
public import Block
public import Formats
import Glibc
import LinuxIO

/// LUNs that this proxy sees.
public struct LogicalUnits: Sendable {
    /// A LUN, or why it cannot be read.
    struct Unit {
        let node: String
        let device: Result<any BlockDevice, BlockError>
        /// Who it is; nil for images, and for nodes that do not tell.
        let identity: UnitIdentity?
    }

    private let nodes: [String]

    /// - Parameter nodes: only these nodes, image files or iscsi: sources; empty for all SCSI disks of this machine.
    public init(nodes: [String] = []) { self.nodes = nodes }

    /// Whether no node was named.
    var isEverything: Bool { nodes.isEmpty }

    /// Opens all of them.
    ///
    /// - Throws: `BlockError` when they cannot be listed.
    func open() throws(BlockError) -> [Unit] {
        var units: [Unit] = []
        for node in nodes.isEmpty ? try found() : nodes {
            do throws(BlockError) { units.append(try Self.open(node)) } catch {
                units.append(Unit(node: node, device: .failure(error), identity: nil))
            }
        }
        return units
    }

    /// The nodes of all SCSI disks; of several paths to one LUN the multipath map over them. Disks that diskgate has
    /// added to this machine, or holds as such, belong to guests: what lies on them says what a guest wants it to say.
    private func found() throws(BlockError) -> [String] {
        let leases = try HotAddLeases()
        var nodes: [String] = []
        for disk in try DiskInventory().disks() where disk.address != nil && !leases.holds(disk) {
            let node = disk.multipath.map { "/dev/\($0.name)" } ?? disk.node
            if !nodes.contains(node) { nodes.append(node) }
        }
        return nodes
    }

    /// Opens a node or image past the page cache, which never hears of what other machines write, and beside others:
    /// several jobs may read one datastore.
    private static func open(_ node: String) throws(BlockError) -> Unit {
        if node.lowercased().hasPrefix("iscsi:"), case .iscsi(let reference) = try SourceReference(node).kind {
            let device = try ISCSIDevice(reference)
            let identity = UnitIdentity(names: device.names, serial: device.serial)
            return Unit(node: device.info.name, device: .success(device), identity: identity)
        }
        var options = RawOptions()
        options.isDirect = true
        var status = stat()
        if stat(node, &status) < 0 { throw BlockError(errno: errno, "opening the LUN \(node)") }
        guard status.st_mode & S_IFMT == S_IFBLK else {
            return Unit(node: node, device: .success(try RawFileDevice.open(node, options)), identity: nil)
        }
        let descriptor = try BlockNodeDevice.openNode(node, options)
        // A map is who its paths are. Partitions and images behind loop devices are nobody.
        let inventory = DiskInventory()
        let disk = try? inventory.disk(of: descriptor)
        let paths = disk.flatMap { $0.isMultipathMap ? try? inventory.paths(of: $0) : nil }
        let identity = (paths?.first ?? disk).flatMap { $0.address == nil ? nil : UnitIdentity($0) }
        return Unit(
            node: node, device: .success(try BlockNodeDevice(descriptor, name: node, options)), identity: identity)
    }

    /// Opens one LUN that is named by who it is.
    ///
    /// - Throws: `.notFound`, `.invalid` when several answer, or what opening throws.
    func open(_ selector: DiskSelector) throws(BlockError) -> any BlockDevice {
        let doing = "opening the LUN \(selector)"
        let inventory = DiskInventory()
        let disks = try inventory.disks().filter { selector.matches($0) && $0.address != nil }
        guard let disk = disks.first else {
            throw BlockError(.notFound, "\(doing): this machine sees no such LUN; diskgate disks shows those it sees")
        }
        let maps = Set(disks.map { $0.multipath?.name })
        if disks.count > 1 && (maps.count > 1 || disk.multipath == nil) {
            let places = disks.map { "\($0.node) at hctl=\($0.address.map { "\($0)" } ?? "?")" }
            throw BlockError(
                .invalid,
                "\(doing): \(disks.count) disks answer to that (\(places.joined(separator: ", "))); set multipath "
                    + "up, or name one by its hctl=")
        }
        var options = RawOptions()
        options.isDirect = true
        let node = disk.multipath.map { "/dev/\($0.name)" } ?? disk.node
        let descriptor = try BlockNodeDevice.openNode(node, options)
        try check(descriptor, is: disk, doing, inventory)
        return try BlockNodeDevice(descriptor, name: node, options)
    }

    /// Looks who was opened, whatever its name has come to mean since: the disk, or a map over it and its other paths,
    /// which are all the same LUN.
    private func check(_ node: Descriptor, is disk: AttachedDisk, _ doing: String, _ inventory: DiskInventory)
        throws(BlockError)
    {
        let opened = try inventory.disk(of: node)
        guard let map = disk.multipath else {
            guard opened.address == disk.address, opened.names == disk.names, opened.serial == disk.serial,
                opened.size == disk.size, opened.diskSequence == disk.diskSequence
            else {
                throw BlockError(.invalid, "\(doing): \(disk.node) became another disk while it was opened; try again")
            }
            return
        }
        let paths = try inventory.paths(of: opened)
        guard opened.name == map.name, opened.isMultipathMap, paths.contains(where: { $0.name == disk.name }) else {
            throw BlockError(.invalid, "\(doing): \(map.name) became another map while it was opened; try again")
        }
        let stranger = paths.first { $0.names != disk.names || $0.serial != disk.serial || $0.size != disk.size }
        if let stranger {
            throw BlockError(
                .invalid,
                "\(doing): the map \(map.title ?? map.name) joins \(disk.node) (\(disk.wwid ?? "without a name")) with "
                    + "\(stranger.node) (\(stranger.wwid ?? "without a name")), which is another LUN")
        }
        guard opened.size == disk.size else {
            throw BlockError(
                .invalid,
                "\(doing): the map \(map.title ?? map.name) has \(opened.size) bytes, and its paths have \(disk.size)")
        }
    }

    /// Opens the LUN that a raw device mapping names.
    ///
    /// - Parameter id: the mapping's word for it (`VMFSEntry.rawDevice`).
    /// - Throws: `.notFound` when no LUN answers to that, `.invalid` when several do, or what opening throws.
    public func open(_ id: VMFSDiskID) throws(BlockError) -> any BlockDevice {
        let doing = "opening the LUN \(id.text) of a raw device mapping"
        let units = try open()
        let meant = units.filter { $0.identity?.matches(id) == true }
        guard let unit = meant.first else {
            let seen = units.compactMap { $0.identity?.text }.joined(separator: ", ")
            throw BlockError(
                .notFound, "\(doing): there is none on this machine (LUNs there: \(seen.isEmpty ? "none" : seen))")
        }
        if meant.count > 1 {
            throw BlockError(
                .invalid,
                "\(doing): \(meant.map(\.node).joined(separator: ", ")) answer to that; set multipath up, or name the "
                    + "LUNs to look at by lun=")
        }
        return try unit.device.get()
    }
}

extension DiskInventory {
    /// The disks that a map lies over.
    func paths(of map: AttachedDisk) throws(BlockError) -> [AttachedDisk] {
        try disks().filter { disk in disk.holders.contains { $0.name == map.name } }
    }
}
