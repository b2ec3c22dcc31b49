// The descriptor of a VMDK: who the disk is, what its parent was, and which files its bytes are in.

/// What the text of a descriptor says (VMware Virtual Disk Format 5.0, "The Descriptor File").
public struct VMDKDescriptor: Sendable, Equatable {
    /// The parent's content id of a disk without a parent.
    static let noParent: UInt32 = 0xFFFF_FFFF
    /// The content id of a disk that nobody has written to yet; the long one may say more.
    static let untouched: UInt32 = 0xFFFF_FFFE
    /// The most bytes of a descriptor: 20 sectors are usual, disks of many extents need more.
    static let bytesMax: UInt64 = 1 << 20
    /// The most extents: 8 TiB in extents of 2 GiB.
    static let extentsMax = 4096

    /// What may be done with an extent.
    public enum Access: String, Sendable {
        case readWrite = "RW"
        case readOnly = "RDONLY"
        /// Not even read.
        case none = "NOACCESS"
    }

    /// How the bytes of an extent are kept.
    public enum Kind: String, Sendable {
        /// As they are, in a file of a host.
        case flat = "FLAT"
        /// In grains, in a hosted sparse file.
        case sparse = "SPARSE"
        /// Nowhere: zeros.
        case zero = "ZERO"
        /// As they are, in a file of an ESXi host.
        case vmfs = "VMFS"
        /// In grains, in a COWD file.
        case vmfsSparse = "VMFSSPARSE"
        /// As they are, on a LUN that a mapping file names.
        case vmfsMapping = "VMFSRDM"
        /// As they are, on a LUN that the extent names itself.
        case vmfsRaw = "VMFSRAW"
        /// In grains, in an seSparse file.
        case seSparse = "SESPARSE"
    }

    /// A part of the disk: the extents follow each other in the descriptor's order.
    public struct Extent: Sendable, Equatable {
        public var access: Access
        /// Sectors of 512 bytes, at least 1.
        public var sectors: UInt64
        public var kind: Kind
        /// The file's name; empty where the kind has none.
        public var fileName: String
        /// Where it begins in a flat file, in sectors.
        public var offset: UInt64
    }

    /// 1; 3 where the host tracks changed blocks. Others are refused.
    public internal(set) var version: UInt32 = 0
    /// The content id: another one with every change of the disk's content while it is open by itself.
    public internal(set) var contentID: UInt32 = 0
    /// The content id that the parent had; nil for a disk without a parent.
    public internal(set) var parentContentID: UInt32?
    /// The kind of disk, for example "vmfsSparse".
    public internal(set) var createType = ""
    /// The parent's name as the disk has it.
    public internal(set) var parentName: String?
    /// The file that tracks changed blocks, which nothing here reads.
    public internal(set) var changeTrackName: String?
    /// The extents in order, at least one.
    public internal(set) var extents: [Extent] = []
    /// The disk database: values by their keys in lower case, without "ddb." before them.
    public internal(set) var database: [String: String] = [:]

    /// Sectors of the disk. Cannot overflow: reading the descriptor has checked it.
    public var sectors: UInt64 { extents.reduce(0) { $0 + $1.sectors } }

    /// Whether a raw device mapping may be one in physical mode, which no snapshot of a machine covers, by the name of
    /// its mapping file. Hosts call that of a virtual one NAME-rdm.vmdk and that of a physical one NAME-rdmp.vmdk.
    public static func mayBePhysicalMapping(named name: String) -> Bool { !name.hasSuffix("-rdm.vmdk") }

    /// Whether the disk may be mapped in physical mode: its type and the names of its mapping files both have to say
    /// that it is not.
    var mayBePhysicalMapping: Bool {
        if !["vmfsrawdevicemap", "vmfsrdm"].contains(createType.lowercased()) { return true }
        return extents.contains { $0.kind == .vmfsMapping && Self.mayBePhysicalMapping(named: $0.fileName) }
    }

    /// The content ids that a child may know this disk by: its own, and, where that only says that nobody has written
    /// to it, the last digits of the long one.
    var contentIDs: [UInt32] {
        guard contentID == Self.untouched, let long = database["longcontentid"],
            let last = UInt32(long.suffix(8), radix: 16)
        else { return [contentID] }
        return [contentID, last]
    }
}
