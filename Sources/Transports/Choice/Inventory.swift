// What is known of a site when a transport is chosen: the proxy, hosts, datastores and machines, as a JSON document.

/// A word of the inventory. Words that this version does not know are `unknown`, and never an error.
public protocol InventoryWord: RawRepresentable, Codable, Sendable, Equatable where RawValue == String {
    /// What words that are not known are taken for.
    static var unknown: Self { get }
    /// What hypervisors call the same, in lower case.
    static var synonyms: [String: Self] { get }
}

extension InventoryWord {
    public static var synonyms: [String: Self] { [:] }

    public init(from decoder: any Decoder) throws {
        let word = try decoder.singleValueContainer().decode(String.self).lowercased()
            .filter { $0 != "-" && $0 != "_" && $0 != " " && $0 != "." }
        self = Self(rawValue: word) ?? Self.synonyms[word] ?? .unknown
    }

    public func encode(to encoder: any Encoder) throws {
        var container = encoder.singleValueContainer()
        try container.encode(rawValue)
    }
}

/// What is known of a site. What is missing is not known: rules then say so, and never guess.
public struct Inventory: Codable, Sendable, Equatable {
    /// This machine.
    public var proxy: Proxy?
    /// Other proxies of the site, which could take over what this one cannot.
    public var proxies: [Proxy] = []
    public var hosts: [Host] = []
    public var datastores: [Datastore] = []
    public var machines: [Machine] = []
    /// What the administrator wants, besides what works.
    public var policy = ChoicePolicy()

    /// Nothing is known.
    public init() {}

    public init(from decoder: any Decoder) throws {
        let all = try decoder.container(keyedBy: CodingKeys.self)
        proxy = try all.decodeIfPresent(Proxy.self, forKey: .proxy)
        proxies = try all.decodeIfPresent([Proxy].self, forKey: .proxies) ?? []
        hosts = try all.decodeIfPresent([Host].self, forKey: .hosts) ?? []
        datastores = try all.decodeIfPresent([Datastore].self, forKey: .datastores) ?? []
        machines = try all.decodeIfPresent([Machine].self, forKey: .machines) ?? []
        policy = try all.decodeIfPresent(ChoicePolicy.self, forKey: .policy) ?? ChoicePolicy()
    }

    /// The host of a name.
    public func host(_ name: String?) -> Host? { name.flatMap { name in hosts.first { $0.name == name } } }

    /// The datastore of a name.
    public func datastore(_ name: String) -> Datastore? { datastores.first { $0.name == name } }
}

extension Inventory {
    /// How a machine's SCSI, IDE, SATA or NVMe adapter is called.
    public enum ControllerKind: String, InventoryWord {
        case pvscsi, lsilogic, lsisas, buslogic, virtioscsi, scsi, ide, sata, nvme, virtioblk, usb, unknown

        public static var synonyms: [String: Self] {
            [
                "paravirtualscsicontroller": .pvscsi, "virtuallsilogiccontroller": .lsilogic, "lsilogicsas": .lsisas,
                "virtuallsilogicsascontroller": .lsisas, "virtualbuslogiccontroller": .buslogic,
                "virtualidecontroller": .ide, "ahci": .sata, "virtualahcicontroller": .sata,
                "virtualnvmecontroller": .nvme, "virtio": .virtioblk,
            ]
        }

        /// Whether disks on it are SCSI disks; nil where that is not known.
        public var isSCSI: Bool? {
            switch self {
            case .pvscsi, .lsilogic, .lsisas, .buslogic, .virtioscsi, .scsi: true
            case .ide, .sata, .nvme, .virtioblk, .usb: false
            case .unknown: nil
            }
        }

        /// Units of an adapter, the adapter's own included. VMware's PVSCSI takes 64 from hardware version 14 on, which
        /// an inventory then says.
        var units: Int {
            switch self {
            case .virtioscsi: 256
            default: 16
            }
        }
    }

    /// An adapter of a proxy.
    public struct Controller: Codable, Sendable, Equatable {
        public var name: String?
        public var kind: ControllerKind
        /// Units that it has, its own (7) included; nil for what its kind has.
        public var units: Int?
        /// Units that are taken.
        public var usedUnits: [Int]?
        /// Whether it is shared with other machines.
        public var busSharing: BusSharing?
    }

    /// Whether machines share an adapter.
    public enum BusSharing: String, InventoryWord {
        case none, virtual, physical, unknown

        public static var synonyms: [String: Self] {
            ["nosharing": .none, "virtualsharing": .virtual, "physicalsharing": .physical]
        }
    }

    /// A machine that runs diskgate.
    public struct Proxy: Codable, Sendable, Equatable {
        /// What the hypervisor calls the virtual machine that it is; nil for none, or where that is not known.
        public var id: String?
        public var name: String?
        /// Whether it is no virtual machine.
        public var isPhysical: Bool?
        public var host: String?
        public var datacenter: String?
        /// The management server that knows it.
        public var manager: String?
        public var power: Power?
        public var isEncrypted: Bool?
        /// The datastore that its own configuration lies on.
        public var datastore: String?
        public var controllers: [Controller]?
        /// The most disks that it may have on SCSI adapters.
        public var maximumDisks: Int?
        /// Worldwide names of the LUNs that it sees; nil where that is not known.
        public var luns: [String]?
        /// Whether this machine's own disks, protection and libraries are to be asked for.
        public var discover: Bool?
        /// Whether udev, LVM, mdadm and multipath are kept away from disks that come.
        public var isProtected: Bool?
        /// Whether its disks show the names that the hypervisor knows them by (disk.enableUUID).
        public var hasDiskUUIDs: Bool?
        /// Libraries that are there: openssl, libiscsi, vddk; nil where that is not known.
        public var libraries: [String]?
    }

    /// Whether a machine runs.
    public enum Power: String, InventoryWord {
        case on, off, suspended, unknown

        public static var synonyms: [String: Self] {
            ["poweredon": .on, "running": .on, "poweredoff": .off, "shutoff": .off]
        }
    }

    /// What kind of hypervisor a host is.
    public enum HostKind: String, InventoryWord {
        /// VMware ESX and ESXi, whose disks come through NFC and the VDDK library.
        case esx
        /// QEMU, with an NBD server of its own.
        case qemu
        /// Sangfor HCI.
        case hci
        case unknown
    }

    /// A host.
    public struct Host: Codable, Sendable, Equatable {
        public var name: String
        /// Other names and addresses that sources reach it by, besides its name.
        public var addresses: [String]?
        public var kind: HostKind?
        /// As the host tells it: 7.0.3.
        public var version: String?
        /// The management server through which its disks are asked for; nil when it is asked directly.
        public var manager: String?
        /// The most sessions at a time, instead of what its version has.
        public var sessionLimit: Int?
        public var isInMaintenance: Bool?
        /// Network transports that it allows: nbd, nbdssl; nil where that is not known.
        public var transports: [String]?
    }

    /// What kind of file system a datastore is.
    public enum DatastoreType: String, InventoryWord {
        /// `vmfs` is one whose version is not known.
        case vmfs, vmfs3, vmfs5, vmfs6, nfs, vsan, vvol, local, unknown

        public static var synonyms: [String: Self] { ["nfs3": .nfs, "nfs4": .nfs, "nfs41": .nfs] }

        /// Whether it is a file system on LUNs that our reader knows.
        public var isVMFS: Bool { [.vmfs, .vmfs3, .vmfs5, .vmfs6].contains(self) }
    }

    /// A datastore.
    public struct Datastore: Codable, Sendable, Equatable {
        public var name: String
        public var type: DatastoreType?
        /// Bytes of a block.
        public var blockSize: UInt64?
        /// Worldwide names of the LUNs that it lies on.
        public var extents: [String]?
        /// Hosts that mount it.
        public var hosts: [String]?
        public var isAccessible: Bool?
        /// The directory of this machine where it is mounted, too.
        public var mount: String?
    }

    /// A virtual machine.
    public struct Machine: Codable, Sendable, Equatable {
        public var id: String
        public var name: String?
        public var host: String?
        public var datacenter: String?
        public var manager: String?
        public var power: Power?
        public var hasSnapshot: Bool?
        public var isEncrypted: Bool?
        public var disks: [Disk]

        /// How people call it.
        public var title: String { name.map { $0 == id ? id : "\($0) (\(id))" } ?? id }
    }

    /// Whether several machines may write to a disk.
    public enum Sharing: String, InventoryWord {
        case none, multiwriter, unknown

        public static var synonyms: [String: Self] { ["sharingnone": .none, "sharingmultiwriter": .multiwriter] }
    }

    /// Whether a disk is a LUN of its own.
    public enum RawMapping: String, InventoryWord {
        case none, virtual, physical, unknown

        public static var synonyms: [String: Self] { ["virtualmode": .virtual, "physicalmode": .physical] }
    }

    /// A disk of a virtual machine.
    public struct Disk: Codable, Sendable, Equatable {
        /// What the hypervisor calls it: 2000, vda.
        public var key: Key
        /// Bytes.
        public var capacity: UInt64?
        /// Its file: [DATASTORE] web/web.vmdk, or a path of its host.
        public var file: String?
        /// The other files of its chain: what lies below a snapshot.
        public var chain: [String]?
        public var controller: ControllerKind?
        public var unit: Int?
        /// Whether the adapter that it hangs on is shared.
        public var busSharing: BusSharing?
        /// persistent, independent_persistent, ...: what begins with independent is left out of snapshots.
        public var mode: String?
        public var sharing: Sharing?
        public var rawMapping: RawMapping?
        /// The worldwide name of the LUN that it is mapped to.
        public var lun: String?
        /// Sources that name it, for backups of its machine and for `check --try`.
        public var sources: [String]?

        /// Whether snapshots leave it out.
        public var isIndependent: Bool { mode?.lowercased().hasPrefix("independent") == true }
    }

    /// A key that is written as a number or as text.
    public struct Key: Codable, Sendable, Hashable, CustomStringConvertible, ExpressibleByStringLiteral {
        public let description: String

        /// A key.
        public init(stringLiteral text: String) { description = text }

        public init(from decoder: any Decoder) throws {
            let value = try decoder.singleValueContainer()
            if let number = try? value.decode(Int64.self) {
                description = String(number)
            } else {
                description = try value.decode(String.self)
            }
        }

        public func encode(to encoder: any Encoder) throws {
            var container = encoder.singleValueContainer()
            try container.encode(description)
        }
    }
}

extension Inventory.Disk {
    /// The datastores that its files lie on, each once.
    var datastores: [String] {
        var names: [String] = []
        for path in [file].compactMap(\.self) + (chain ?? []) {
            if let name = Self.place(path)?.datastore, !names.contains(name) { names.append(name) }
        }
        return names
    }

    /// Takes [DATASTORE] PATH apart; nil for anything else.
    static func place(_ file: String) -> (datastore: String, path: String)? {
        guard file.first == "[", let end = file.firstIndex(of: "]") else { return nil }
        let name = file[file.index(after: file.startIndex)..<end]
        let path = file[file.index(after: end)...].drop { $0 == " " }
        return name.isEmpty ? nil : (String(name), String(path))
    }
}

/// What an administrator wants, besides what works.
public struct ChoicePolicy: Codable, Sendable, Equatable {
    /// The largest disk to be read over nbd and nbdssl, in bytes.
    public var maximumNetworkDisk: UInt64?
    /// The smallest disk that is worth being hot-added, in bytes.
    public var minimumHotAddDisk: UInt64?
    /// Whether nbd in clear text is out of the question.
    public var requiresTLS: Bool?
    /// Whether a disk on NFS is hot-added to a proxy on another host than its machine's, which can stun the machine.
    public var allowsHotAddAcrossHostsOnNFS: Bool?
    /// Whether a disk may wait for a session of its host; otherwise a host whose sessions are all taken is excluded.
    public var waitsForSessions: Bool?
    /// For how many seconds a disk waits for a session.
    public var sessionWaitSeconds: Int?

    /// No wishes.
    public init() {}
}
