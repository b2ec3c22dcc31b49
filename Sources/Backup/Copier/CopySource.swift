// Where a copy's bytes come from: an opened disk, and whether more connections to it can be had.
public import Block
import Glibc
import LinuxIO
public import NBD
public import Transports

/// A disk to copy from. It must not change while it is copied: a snapshot, or a disk that nobody writes.
public final class CopySource: Sendable {
    /// The disk.
    public let device: any BlockDevice
    /// What names this very content, as far as that can be told: a copy is resumed only from a source of the same
    /// identity.
    public let identity: String
    /// The disk as an NBD export, which workers read over connections of their own.
    let remote: NBDDevice?
    private let connectionsMax: Int

    /// A source over an opened disk. An NBD export should be opened with one connection; the workers make others.
    ///
    /// - Parameters:
    ///   - identity: nil for the disk's name and size.
    ///   - connectionsMax: the most connections to make where the disk is an NBD export.
    public init(_ device: any BlockDevice, identity: String? = nil, connectionsMax: Int = 4) {
        self.device = device
        self.connectionsMax = connectionsMax
        remote = device as? NBDDevice
        let info = device.info
        let facts = info.identity.filter { ["export", "description", "wwn", "serial", "diskseq"].contains($0.key) }
        self.identity =
            identity
            ?? ([info.name, "\(info.size) bytes"] + facts.map { "\($0.key) \($0.value)" }).joined(separator: ", ")
    }

    /// Opens the export of a server for copying.
    ///
    /// - Throws: as `NBDDevice.openInSession`.
    public static func open(_ uri: NBDURI, identity: String? = nil) throws(BlockError) -> CopySource {
        var single = uri
        single.connectionsMax = 1
        let device = try NBDDevice.openInSession(single)
        return CopySource(device, identity: identity, connectionsMax: uri.connectionsMax)
    }

    /// Opens a disk for copying.
    ///
    /// - Parameter reconnects: whether a lost connection to a server is made again.
    /// - Throws: as `DiskSpecification.open`.
    public static func open(_ disk: DiskSpecification, reconnects: Bool = true) throws(BlockError) -> CopySource {
        let isWhole =
            disk.partition == nil && disk.offset == 0 && disk.length == nil && disk.size == nil
            && disk.roundedTo == nil && disk.faults.isEmpty && disk.access == .readOnly
        let source = disk.fingerprints.isEmpty ? disk.source : try disk.source.pinned(to: disk.fingerprints)
        if isWhole, case .nbd(var uri) = source.kind, (uri.format ?? "raw") == "raw" {
            if !reconnects { uri.reconnectSeconds = 0 }
            let connectionsMax = uri.connectionsMax
            uri.connectionsMax = 1
            return CopySource(try disk.openExport(uri), connectionsMax: connectionsMax)
        }
        let device = try disk.open()
        let part = "partition \(disk.partition ?? 0), from \(disk.offset), \(device.info.size) bytes"
        var facts = device.info.identity.filter { $0.key != "connections" }.map { "\($0.key) \($0.value)" }
        // A disk that is added for each copy is another one each time; samples tell whether its content is.
        if case .hotAdd(.image) = source.kind { facts = [] }
        return CopySource(device, identity: ([try fileIdentity(source), part] + facts).joined(separator: ", "))
    }

    /// What names a file's content: which file it is, and when it was written last.
    private static func fileIdentity(_ source: SourceReference) throws(BlockError) -> String {
        guard case .path(let path) = source.kind else { return source.description }
        var status = stat()
        if stat(path, &status) < 0 { throw BlockError(errno: errno, "asking for the status of \(path)") }
        if status.st_mode & S_IFMT == S_IFBLK {
            let facts = try BlockNodeDevice.open(path).info.identity.map { "\($0.key) \($0.value)" }
            return ([path] + facts).joined(separator: ", ")
        }
        return "file \(status.st_dev):\(status.st_ino), \(status.st_size) bytes, written "
            + "\(status.st_mtim.tv_sec).\(status.st_mtim.tv_nsec)"
    }

    /// The context of a dirty bitmap by its name, with or without `qemu:dirty-bitmap:` before it.
    ///
    /// - Throws: `.notFound`, with the names there are.
    public func changedContext(_ name: String) throws(BlockError) -> StatusContext {
        let prefix = MetaContext.dirtyBitmapPrefix
        let bare = name.hasPrefix(prefix) ? String(name.dropFirst(prefix.count)) : name
        let known = device.info.dirtyBitmaps
        guard let index = known.firstIndex(of: bare) else {
            let names = known.isEmpty ? "it has none" : "only " + known.joined(separator: ", ")
            throw BlockError(
                .notFound,
                "copying what changed on \(device.info.name): it has no dirty bitmap \(bare) (\(names)); name another "
                    + "one, or copy everything without --changed")
        }
        return .dirtyBitmap(index)
    }

    /// The most workers that can read side by side.
    var workersMax: Int {
        guard let remote else { return 16 }
        return remote.agreement.flags.contains(.canMultiConn) ? connectionsMax : 1
    }

    /// The workers to take for a target unless somebody says otherwise.
    func workersByDefault(for target: any CopyTarget) -> Int {
        let processors = max(2, Int(sysconf(Int32(_SC_NPROCESSORS_ONLN))))
        return min(workersMax, target.waitsForStorage ? 4 : min(4, processors))
    }
}
