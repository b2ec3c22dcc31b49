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
    }

    private let units: LogicalUnits

    /// Datastores on some LUNs.
    public init(on units: LogicalUnits = LogicalUnits()) { self.units = units }

    /// Looks for datastores on all LUNs.
    ///
    /// - Returns: what was found, and which LUNs could not be read and why.
    /// - Throws: `BlockError` when the LUNs cannot be listed.
    public func all() throws(BlockError) -> (found: [Found], problems: [BlockError]) {
        var members: [VMFSMember] = []
        var problems: [BlockError] = []
        for unit in try units.open() {
            do throws(BlockError) { members += try VMFSMember.probe(try unit.device.get()) } catch {
                problems.append(error)
            }
        }
        let found = VMFSMemberSet.grouped(members).map { set in
            let nodes = set.members.map(\.device.info.name)
            do throws(BlockError) { return Found(volume: try set.open(), problem: nil, nodes: nodes) } catch {
                return Found(volume: nil, problem: error, nodes: nodes)
            }
        }
        return (found, problems)
    }

    /// A datastore by its label or UUID.
    ///
    /// - Throws: `.notFound`, which says what there is; `.invalid` when several have the label, or it is a replica.
    public func volume(named name: String) throws(BlockError) -> VMFSVolume {
        let doing = "opening the datastore \(name)"
        let (found, problems) = try all()
        let volumes = found.compactMap(\.volume)
        let meant = volumes.filter { $0.label == name || "\($0.uuid)" == name.lowercased() }
        if meant.count > 1 {
            let names = meant.map { "\($0.uuid)" }.joined(separator: ", ")
            throw BlockError(
                .invalid, "\(doing): \(meant.count) datastores are called so; name one by its UUID: \(names)")
        }
        guard let volume = meant.first else {
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
    private static let sanParameters: Set<String> = ["lun", "snapshot", "inconsistent", "format", "physical-rdm"]

    /// The LUNs that `lun=` parameters name; all where there are none.
    public var logicalUnits: LogicalUnits {
        LogicalUnits(nodes: parameters.filter { $0.key == "lun" }.map(\.value))
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
            let volume = try Datastores(on: logicalUnits).volume(named: datastore)
            let device = try volume.open(path)
            let directory = path.split(separator: "/").dropLast().joined(separator: "/")
            let file = ResolvedFile(
                device: device, identity: "\(volume.uuid)/\(device.fingerprint.address)",
                resolver: VMFSResolver(
                    volume, directory: directory, allowed: imageDirectories,
                    openMapped: { (disk) throws(BlockError) in try LogicalUnits().open(disk) }))
            var options = VMDKOptions()
            options.allowsPhysicalMapping = try flag("physical-rdm")
            let hint = try formatHint() ?? .guess(name: path, isNodeOrRemote: false)
            return try openDisk(file, hint, vmdk: options)
        }
    }
}
