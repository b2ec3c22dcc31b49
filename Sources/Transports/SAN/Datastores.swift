// The VMFS datastores on the LUNs that this proxy sees, and their files as disks.
public import Block
public import Formats
import LinuxIO

/// Datastores of a SAN.
public struct Datastores: Sendable {
    /// What was found: a datastore, or why there is none of it.
    public struct Found: Sendable {
        /// The datastore; nil when it cannot be opened.
        public var volume: VMFSVolume?
        /// Why it cannot be opened.
        public var problem: BlockError?
        /// The nodes that it lies on, as far as they are there.
        public var nodes: [String]
        /// On which LUN a host has made it, where that is not the one it lies on: it is a copy then.
        public var copy: String?
    }

    private let units: LogicalUnits
    private let takesCopies: Bool

    /// Datastores on some LUNs.
    ///
    /// - Parameter takesCopies: whether a LUN may be another than the one that hosts have written the datastore to: a
    ///   snapshot or a replica that the storage has made of it.
    public init(on units: LogicalUnits = LogicalUnits(), takesCopies: Bool = false) {
        self.units = units
        self.takesCopies = takesCopies
    }

    /// Looks for datastores on all LUNs.
    ///
    /// - Returns: what was found, and which LUNs could not be read and why.
    /// - Throws: `BlockError` when the LUNs cannot be listed.
    public func all() throws(BlockError) -> (found: [Found], problems: [BlockError]) {
        var members: [VMFSMember] = []
        // Beside the others, for they would contradict each other.
        var copies: [VMFSMember] = []
        var origin: String?
        var problems: [BlockError] = []
        for unit in try units.open() {
            do throws(BlockError) {
                for member in try VMFSMember.probe(try unit.device.get()) {
                    if let id = member.diskID, unit.identity?.matches(id) == false, !takesCopies {
                        copies.append(member)
                        origin = "it was made on the LUN \(id.text), and \(unit.node) is \(unit.identity?.text ?? "")"
                    } else {
                        members.append(member)
                    }
                }
            } catch { problems.append(error) }
        }
        let found = Self.opened(members) + Self.opened(copies, origin: origin)
        return (found, problems)
    }

    private static func opened(_ members: [VMFSMember], origin: String? = nil) -> [Found] {
        VMFSMemberSet.grouped(members).map { set in
            let nodes = set.members.map(\.device.info.name)
            do throws(BlockError) {
                return Found(volume: try set.open(), problem: nil, nodes: nodes, copy: origin)
            } catch { return Found(volume: nil, problem: error, nodes: nodes, copy: origin) }
        }
    }

    /// A datastore by its label or UUID.
    ///
    /// - Throws: `.notFound`, which says what there is; `.invalid` when several have the label, or it is a replica or
    ///   a copy.
    public func volume(named name: String) throws(BlockError) -> VMFSVolume {
        let doing = "opening the datastore \(name)"
        let (found, problems) = try all()
        func isMeant(_ volume: VMFSVolume) -> Bool { volume.label == name || "\(volume.uuid)" == name.lowercased() }
        let volumes = found.filter { $0.copy == nil }.compactMap(\.volume)
        let meant = volumes.filter(isMeant)
        if meant.count > 1 {
            let names = meant.map { "\($0.uuid)" }.joined(separator: ", ")
            throw BlockError(
                .invalid, "\(doing): \(meant.count) datastores are called so; name one by its UUID: \(names)")
        }
        guard let volume = meant.first else {
            if let copy = found.first(where: { $0.volume.map(isMeant) == true })?.copy {
                throw BlockError(
                    .invalid,
                    "\(doing): \(copy): this is a copy of the datastore, as a storage's snapshot is; add copy=yes to "
                        + "read it all the same")
            }
            let names = volumes.map(\.label).joined(separator: ", ")
            let broken = (found.compactMap(\.problem) + problems).map(\.message)
            let rest = broken.isEmpty ? "" : "; not readable: \(broken.joined(separator: "; "))"
            throw BlockError(
                .notFound,
                "\(doing): there is none on the LUNs that this machine sees (datastores there: "
                    + "\(names.isEmpty ? "none" : names))\(rest)")
        }
        if let replica = volume.replica { throw BlockError(.invalid, "\(doing): \(replica)") }
        return volume
    }
}

extension SourceReference {
    /// Parameters of `san:` sources.
    private static let sanParameters: Set<String> = ["lun", "snapshot", "inconsistent", "format", "copy", "physical"]

    /// The LUNs that `lun=` parameters name; all where there are none.
    public var logicalUnits: LogicalUnits {
        LogicalUnits(nodes: parameters.filter { $0.key == "lun" }.map(\.value))
    }

    /// The datastores on the LUNs that `lun=` parameters name, copies among them where `copy=yes` says so.
    ///
    /// - Throws: `.invalid` for a copy= that is neither yes nor no.
    public func datastores() throws(BlockError) -> Datastores {
        Datastores(on: logicalUnits, takesCopies: try flag("copy"))
    }

    /// Opens the LUN that a raw device mapping leads to.
    private func openMapped(_ id: VMFSDiskID, _ entry: VMFSEntry) throws(BlockError) -> any BlockDevice {
        if VMDKDescriptor.mayBePhysicalMapping(named: entry.name), try !flag("physical") {
            throw BlockError(
                .denied,
                "opening \(self): it is a raw device mapping in physical mode, or does not say which: no snapshot of "
                    + "the machine keeps its LUN still; add physical=yes when something else does")
        }
        let device = try logicalUnits.open(id)
        if device.info.size == entry.size { return device }
        guard entry.size > 0, device.info.size > entry.size else {
            throw BlockError(
                .invalid,
                "opening \(self): the mapping has \(entry.size) bytes, and its LUN \(device.info.name) "
                    + "\(device.info.size)")
        }
        return try SliceDevice(device, range: 0..<entry.size, label: "as mapped")
    }

    /// Opens what `san:` names.
    ///
    /// A running machine writes to its disks all the time: only a disk below a snapshot stands still. This side cannot
    /// see whether there is one, so somebody has to say so.
    func openSAN(_ reference: SANReference, writable: Bool, imageDirectories: [String]) throws(BlockError)
        -> any BlockDevice
    {
        try allow(Self.sanParameters)
        if writable {
            throw BlockError(.readOnly, "opening \(self) for writing: LUNs that hosts use are only read here")
        }
        let mayBeTorn = try flag("inconsistent")
        if parameter("snapshot") ?? "" == "" && !mayBeTorn {
            throw BlockError(
                .denied,
                "opening \(self): say which snapshot of the machine keeps the disk still while it is read "
                    + "(?snapshot=NAME), or that the machine is off or the content may be torn (?inconsistent=yes)")
        }
        switch reference {
        case .unit(let selector):
            if !logicalUnits.isEverything { throw BlockError(.invalid, "opening \(self): lun= is for datastores") }
            return try logicalUnits.open(selector)
        case .file(let datastore, let path):
            if datastore.isEmpty || path.isEmpty {
                throw BlockError(
                    .invalid,
                    "opening \(self): name a file, san:DATASTORE/DIRECTORY/NAME-flat.vmdk; diskgate ls lists them")
            }
            let volume = try datastores().volume(named: datastore)
            let entry = try volume.entry(path)
            if let id = entry.rawDevice { return try openMapped(id, entry) }
            let device = try volume.open(path)
            let units = logicalUnits
            let directory = path.split(separator: "/").dropLast().joined(separator: "/")
            let file = ResolvedFile(
                device: device, identity: "\(volume.uuid)/\(device.fingerprint.address)",
                resolver: VMFSResolver(
                    volume, directory: directory, allowed: imageDirectories,
                    openMapped: { (disk) throws(BlockError) in try units.open(disk) }))
            var options = VMDKOptions()
            options.allowsPhysicalMapping = try flag("physical")
            let hint = try formatHint() ?? .guess(name: path, isNodeOrRemote: false)
            return try openDisk(file, hint, vmdk: options)
        }
    }
}
