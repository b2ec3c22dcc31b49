// The LUNs of a SAN as this proxy sees them: opened beside the hosts that use them, for reading only.
import Block
import Formats
import Glibc
import LinuxIO

/// LUNs that this proxy sees.
public struct LogicalUnits: Sendable {
    /// A LUN, or why it cannot be read.
    struct Unit {
        let node: String
        let device: Result<any BlockDevice, BlockError>
    }

    private let nodes: [String]

    /// - Parameter nodes: only these nodes or image files; empty for all SCSI disks of this machine.
    public init(nodes: [String] = []) { self.nodes = nodes }

    /// Whether no node was named.
    var isEverything: Bool { nodes.isEmpty }

    /// Opens all of them.
    ///
    /// - Throws: `BlockError` when they cannot be listed.
    func open() throws(BlockError) -> [Unit] {
        var units: [Unit] = []
        for node in nodes.isEmpty ? try found() : nodes {
            let result = Result { () throws(BlockError) in try Self.open(node) }
            units.append(Unit(node: node, device: result))
        }
        return units
    }

    /// The nodes of all SCSI disks; of several paths to one LUN the multipath map over them.
    private func found() throws(BlockError) -> [String] {
        var nodes: [String] = []
        for disk in try DiskInventory().disks() where disk.address != nil {
            let node = disk.multipath.map { "/dev/\($0.name)" } ?? disk.node
            if !nodes.contains(node) { nodes.append(node) }
        }
        return nodes
    }

    /// Opens a node or image past the page cache, which never hears of what other machines write, and beside others:
    /// several jobs may read one datastore.
    private static func open(_ node: String) throws(BlockError) -> any BlockDevice {
        var options = RawOptions()
        options.isDirect = true
        var status = stat()
        if stat(node, &status) < 0 { throw BlockError(errno: errno, "opening the LUN \(node)") }
        if status.st_mode & S_IFMT == S_IFBLK { return try BlockNodeDevice.open(node, options) }
        return try RawFileDevice.open(node, options)
    }

    /// Opens one LUN that is named by who it is.
    ///
    /// - Throws: `.notFound`, `.invalid` when several answer, or what opening throws.
    func open(_ selector: DiskSelector) throws(BlockError) -> any BlockDevice {
        try open("\(selector)") { selector.matches($0) }
    }

    /// Opens the LUN that a raw device mapping names.
    ///
    /// - Throws: as for one that is named otherwise.
    func open(_ disk: VMFSDiskID) throws(BlockError) -> any BlockDevice {
        try open("\(disk.text) of a raw device mapping") { Self.isMapped($0, by: disk.identifier) }
    }

    /// Whether an ESXi host's identifier is a disk's: its worldwide name or its serial number, with up to six
    /// characters of its model behind it.
    static func isMapped(_ disk: AttachedDisk, by identifier: [UInt8]) -> Bool {
        let modelMax = 6
        let digits = identifier.map { hexadecimal($0) }.joined()
        for name in disk.names {
            guard let dot = name.firstIndex(of: "."), ["naa", "eui"].contains(name[..<dot]) else { continue }
            let own = name[name.index(after: dot)...]
            if own.count >= 16, digits.hasPrefix(own), digits.count - own.count <= 2 * modelMax { return true }
        }
        guard let serial = disk.serial, !serial.isEmpty, identifier.starts(with: serial.utf8) else { return false }
        let rest = identifier.dropFirst(serial.utf8.count)
        let model = Array((disk.model ?? "").utf8)
        // Serial numbers are padded with blanks before the model follows.
        return rest.allSatisfy { $0 == 0x20 } || model.starts(with: rest.drop { $0 == 0x20 })
    }

    private static func hexadecimal(_ byte: UInt8) -> String {
        (byte < 16 ? "0" : "") + String(byte, radix: 16)
    }

    private func open(_ wanted: String, where matches: (AttachedDisk) -> Bool) throws(BlockError) -> any BlockDevice {
        let doing = "opening the LUN \(wanted)"
        let inventory = DiskInventory()
        let disks = try inventory.disks().filter { matches($0) && $0.address != nil }
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
        let node = disk.multipath.map { "/dev/\($0.name)" } ?? disk.node
        let device = try Self.open(node)
        guard disk.multipath == nil else { return device }
        let opened = try inventory.disk(of: try Descriptor.open(node, O_RDONLY))
        if opened != disk { throw BlockError(.invalid, "\(doing): \(node) became another disk while it was opened") }
        return device
    }
}
