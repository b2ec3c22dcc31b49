// A VMFS datastore: what is in it, by path. Read-only, and nothing that another host may change is remembered.
public import Block
import Glibc

/// How datastores are read.
public struct VMFSOptions: Sendable {
    /// Memory for the addresses of each open file, in bytes; 16 MiB map 2 TiB in blocks of 1 MiB.
    public var cacheBytes = 16 << 20
    /// How often what looks damaged is read again, because a host may just be writing it.
    public var attempts = 3
    /// Milliseconds between these attempts.
    public var pauseMS: UInt32 = 100
    /// Seconds after which a file that is being read is looked at again, to see whether it is still where it was; nil
    /// for never.
    public var recheckSeconds: Double? = 10

    /// Three attempts, 16 MiB for each file, and a look at it every 10 seconds.
    public init() {}
}

/// An entry of a directory of a datastore.
public struct VMFSEntry: Sendable {
    /// Its name, without its directory's.
    public let name: String
    /// What it is.
    public let kind: VMFSFileKind
    /// Bytes; for a raw device mapping, of the LUN.
    public let size: UInt64
    /// Bytes of blocks that it has, whether they were written or not.
    public let allocatedBytes: UInt64
    /// When it was last changed, in seconds since 1970.
    public let modifiedSeconds: UInt32
    /// Who uses it.
    public let lock: VMFSLock
    /// The LUN that a raw device mapping names.
    public let rawDevice: VMFSDiskID?
    /// Why nothing but its name is known: its file descriptor cannot be read. Nil when all is well.
    public let problem: BlockError?
    /// The address of its file descriptor.
    let address: UInt32

    init(_ name: String, _ descriptor: VMFSDescriptor, _ geometry: VMFSGeometry) {
        self.name = name
        kind = descriptor.kind
        size = descriptor.size
        allocatedBytes =
            descriptor.addressing == .none
            ? 0 : descriptor.blockCount.multipliedReportingOverflow(by: descriptor.blockSize).partialValue
        modifiedSeconds = descriptor.modifiedSeconds
        lock = descriptor.lock
        rawDevice = descriptor.diskID(geometry)
        problem = nil
        address = descriptor.address
    }

    init(_ entry: VMFSDirectoryEntry, problem: BlockError) {
        name = entry.name
        kind = .unknown(0)
        size = 0
        allocatedBytes = 0
        modifiedSeconds = 0
        lock = VMFSLock.none
        rawDevice = nil
        self.problem = problem
        address = entry.address
    }
}

/// A host that uses a datastore, as its heartbeat says.
public struct VMFSHost: Sendable, Equatable {
    /// Its UUID.
    public let uuid: VMFSUUID
    /// Its address as text, empty where it did not write one.
    public let address: String
}

/// A datastore.
public final class VMFSVolume: Sendable {
    /// The most symbolic links that are followed on the way to a file.
    static let linksMax = 16

    /// Its LUNs, in order.
    public let members: [VMFSMember]
    /// Its name.
    public var label: String { header.label }
    /// Its UUID, as in /vmfs/volumes/UUID.
    public var uuid: VMFSUUID { header.uuid }
    /// The version of its file system, for example "VMFS 6.82".
    public var version: String { header.versionText }
    /// Bytes in a file block.
    public var blockSize: UInt64 { header.geometry.blockSize }
    /// Bytes on all its LUNs.
    public var capacity: UInt64 { span.info.size }
    /// Why this is a snapshot or a replica of the datastore, not itself; nil when nothing says so. Only what is on the
    /// LUNs is compared: a copy that no host has signed anew differs from the original by the LUN's identity alone, and
    /// `VMFSMember.diskID` says which that was.
    public let replica: String?
    let options: VMFSOptions
    let span: VMFSSpan
    let resources: VMFSResources
    private let header: VMFSHeader

    /// Opens the datastore on LUNs that belong together.
    ///
    /// - Throws: `.corrupt`, `.unsupported`, or what reading throws.
    init(_ set: VMFSMemberSet, _ options: VMFSOptions) throws(BlockError) {
        members = set.members
        self.options = options
        let names = set.members.map(\.device.info.name).joined(separator: ", ")
        span = try VMFSSpan(set.members, name: "the datastore on \(names)")
        header = try VMFSHeader(of: span)
        let first = set.members.first
        if let first, first.lvmVersion > 0, header.volumeUUID != first.volumeUUID {
            replica = "it was made on volume \(header.volumeUUID), but lies on volume \(first.volumeUUID)"
        } else if let first, first.lvmVersion > 0, header.snapshotID != first.snapshotID {
            replica = "its volume has another snapshot number (\(first.snapshotID)) than it (\(header.snapshotID))"
        } else {
            replica = nil
        }
        resources = try VMFSResources(span, header.geometry)
    }

    /// Finds the datastores on LUNs and opens them all.
    ///
    /// - Throws: why one of them cannot be opened. `VMFSMemberSet.grouped(_:)` tells of each by itself.
    public static func assemble(_ members: [VMFSMember], _ options: VMFSOptions = VMFSOptions())
        throws(BlockError) -> [VMFSVolume]
    {
        var volumes: [VMFSVolume] = []
        for set in VMFSMemberSet.grouped(members) { volumes.append(try set.open(options)) }
        return volumes
    }

    /// The entries of a directory, without "." and "..", in the order in which they stand there.
    ///
    /// - Parameter path: from the root, with or without a slash at its start; empty for the root itself.
    /// - Throws: `.notFound`, `.invalid` when it is no directory, `.corrupt`, or what reading throws.
    public func list(_ path: String) throws(BlockError) -> [VMFSEntry] {
        try retrying { () throws(BlockError) in
            let place = try find(path)
            var entries: [VMFSEntry] = []
            for entry in try VMFSDirectory.entries(place.descriptor, resources) {
                do throws(BlockError) {
                    let descriptor = try resources.descriptor(entry.address)
                    entries.append(VMFSEntry(entry.name, descriptor, header.geometry))
                } catch  where error.kind == .corrupt {
                    // Perhaps the file is just being deleted. The others are there all the same.
                    entries.append(VMFSEntry(entry, problem: error))
                }
            }
            return entries
        }
    }

    /// What is at a path. Symbolic links are followed, unless they are its last part.
    ///
    /// - Throws: `.notFound`, `.corrupt`, or what reading throws.
    public func entry(_ path: String) throws(BlockError) -> VMFSEntry {
        try retrying { () throws(BlockError) in
            let place = try find(path, followsLast: false)
            return VMFSEntry(place.path.last ?? "", place.descriptor, header.geometry)
        }
    }

    /// Opens a file as a disk. Every address of it is looked at, and the file once more afterwards.
    ///
    /// - Parameter path: from the root, for example "vm/vm-flat.vmdk". Symbolic links are followed.
    /// - Throws: `.notFound`, `.invalid` for a directory, `.unsupported` for a raw device mapping, which has no bytes
    ///   here (`VMFSEntry.rawDevice` says where they are), `.changed` when it changes all the time, `.corrupt`, or what
    ///   reading throws.
    public func open(_ path: String) throws(BlockError) -> VMFSFile {
        try retrying { () throws(BlockError) in
            let place = try find(path)
            let text = "[\(label)] \(place.path.joined(separator: "/"))"
            switch place.descriptor.kind {
            case .file, .system: break
            case .rawDevice:
                let disk = place.descriptor.diskID(header.geometry)?.text ?? ""
                throw BlockError(
                    .unsupported, "opening \(text): it is a raw device mapping; its bytes are on the LUN \(disk)")
            case let kind: throw BlockError(.invalid, "opening \(text): it is a \(kind), not a file")
            }
            do throws(BlockError) {
                return try VMFSFile(self, place, name: text)
            } catch { throw error.during("opening \(text)") }
        }
    }

    /// The host that has locked a file, if it is alive as far as its heartbeat says; whether the heartbeat still beats
    /// only two readings some seconds apart can tell.
    ///
    /// - Returns: nil when nobody has locked the file, or whoever did has left the datastore since.
    /// - Throws: what reading throws.
    public func host(holding lock: VMFSLock) throws(BlockError) -> VMFSHost? {
        let geometry = header.geometry
        let area = 0x30_0000..<(0x30_0000 + (geometry.isVMFS6 ? geometry.alignment << 10 : 1 << 20))
        let offset = lock.heartbeatOffset
        guard lock.mode != .free, area.contains(offset), offset & 511 == 0, offset + 512 <= span.info.size else {
            return nil
        }
        let slot = Buffer(count: 512)
        try span.read(into: slot.bytes, at: offset)
        let bytes = slot.readable
        guard bytes.littleEndian(0, as: UInt32.self) == 0xABCD_EF02, bytes.littleEndian(4, as: UInt64.self) == offset,
            bytes.littleEndian(0x0C, as: UInt64.self) == lock.heartbeatGeneration
        else { return nil }
        return VMFSHost(uuid: VMFSUUID(bytes, at: 0x1C), address: fieldText(bytes, 0x36..<0x76))
    }

    /// Runs a body again when it finds damage, which may be a host's half-finished write.
    func retrying<R>(_ body: () throws(BlockError) -> R) throws(BlockError) -> R {
        var attempt = 1
        while true {
            do throws(BlockError) {
                return try body()
            } catch {
                guard error.kind == .corrupt || error.kind == .changed, attempt < options.attempts else { throw error }
            }
            attempt += 1
            usleep(options.pauseMS &* 1000)
        }
    }
}

// MARK: - Paths

/// What a path leads to.
struct VMFSPlace: Sendable {
    /// The names from the root, without symbolic links.
    var path: [String]
    /// The descriptor.
    var descriptor: VMFSDescriptor
}

extension VMFSVolume {
    private static let root: UInt32 = 4
    /// The longest text of a symbolic link.
    private static let linkLengthMax: UInt64 = 4096

    /// Walks a path from the root.
    func find(_ path: String, followsLast: Bool = true) throws(BlockError) -> VMFSPlace {
        var rest = Self.names(path)
        var walked = [VMFSPlace(path: [], descriptor: try resources.descriptor(Self.root))]
        var links = 0
        while let name = rest.popLast() {
            guard let here = walked.last else { break }
            if name == ".." {
                if walked.count > 1 { walked.removeLast() }
                continue
            }
            let shown = (here.path + [name]).joined(separator: "/")
            guard here.descriptor.kind == .directory else {
                throw BlockError(
                    .notFound, "looking for \(path) in \(label): \(here.path.joined(separator: "/")) is no directory")
            }
            let entries = try VMFSDirectory.entries(here.descriptor, resources)
            guard let entry = entries.first(where: { $0.name == name }) else {
                throw BlockError(.notFound, "looking for \(path) in \(label): there is no \(shown)")
            }
            let descriptor = try resources.descriptor(entry.address)
            if descriptor.kind == .symbolicLink, followsLast || !rest.isEmpty {
                links += 1
                guard links <= Self.linksMax else {
                    throw BlockError(
                        .invalid, "looking for \(path) in \(label): more than \(Self.linksMax) symbolic links")
                }
                let target = try target(of: descriptor, at: shown)
                if target.isFromRoot { walked.removeLast(walked.count - 1) }
                rest += target.names
            } else {
                walked.append(VMFSPlace(path: here.path + [name], descriptor: descriptor))
            }
        }
        guard let found = walked.last else { throw BlockError(.notFound, "looking for \(path) in \(label)") }
        return found
    }

    /// The parts of a path, the last one first.
    private static func names(_ path: String) -> [String] {
        path.split(separator: "/").map(String.init).filter { $0 != "." }.reversed()
    }

    /// Where a symbolic link leads.
    private func target(of descriptor: VMFSDescriptor, at path: String) throws(BlockError)
        -> (isFromRoot: Bool, names: [String])
    {
        guard descriptor.size > 0, descriptor.size <= Self.linkLengthMax else {
            throw BlockError(.corrupt, "following \(path) in \(label): a symbolic link of \(descriptor.size) bytes")
        }
        let buffer = Buffer(count: Int(descriptor.size))
        let pieces = try VMFSLayout(descriptor, resources).allPieces()
        try VMFSResource.read(buffer.bytes, at: 0, pieces, span)
        let text = fieldText(buffer.readable, 0..<buffer.bytes.count)
        guard text.hasPrefix("/") else { return (false, Self.names(text)) }
        if let inside = pathInside(text) { return (true, Self.names(inside)) }
        throw BlockError(.notFound, "following \(path) in \(label): it leads to \(text), out of the datastore")
    }

    /// A path from a host's root, where this datastore is below /vmfs/volumes by its UUID or its name, as a path from
    /// the datastore's root; nil when it leads elsewhere.
    func pathInside(_ path: String) -> String? {
        for name in [uuid.description, label] where path.hasPrefix("/vmfs/volumes/\(name)/") {
            return String(path.dropFirst("/vmfs/volumes/\(name)/".count))
        }
        return nil
    }
}
