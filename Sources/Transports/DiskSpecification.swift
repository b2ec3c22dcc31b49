// A disk as the command line describes it: a source, and the filters laid over it, opened in one fixed order.
public import Block
import Formats
import Glibc
import LinuxIO
public import NBD

/// A source with everything that is to be laid over it.
public struct DiskSpecification: Sendable {
    /// How the source may be changed.
    public enum Access: Sendable, Equatable {
        /// It is only read, and so is the disk.
        case readOnly
        /// What is written goes to the source.
        case writable
        /// What is written goes to scratch space that is gone when the disk is closed.
        case overlay
    }

    /// The source.
    public var source: SourceReference
    /// Other sources of the same disk, to be tried in order when it cannot be had from `source`.
    public var alternatives: [SourceReference] = []
    /// The transports that may be used, in the order in which they are wanted; nil for the order of the sources.
    public var transports: TransportOrder?
    /// What an inventory says of the disk; nil where it is of none.
    public var site: SiteDisk?
    /// The session that its source is opened in; nil for one that is taken with its opening.
    var session: HostSession?
    /// How the source may be changed.
    public var access = Access.readOnly
    /// Number of the partition to take; nil for the whole disk.
    public var partition: Int?
    /// Bytes to leave out at the start.
    public var offset: UInt64 = 0
    /// Bytes to take from `offset`; nil for all that follow.
    public var length: UInt64?
    /// The size to show instead of the real one, in bytes.
    public var size: UInt64?
    /// A power of two that the size is rounded up to, in bytes.
    public var roundedTo: UInt64?
    /// Directories, besides an image's own, beneath which images may name other files.
    public var imageDirectories: [String] = []
    /// Errors and corruption to inject.
    public var faults: [FaultPlan.Fault] = []
    /// Fingerprints of which the server's certificate must have one, besides those in the source's URI.
    public var fingerprints: [Fingerprint] = []
    /// Where overlays keep what is written; nil for TMPDIR, or /var/tmp.
    public var scratchDirectory: String?

    /// A source as it is, read-only.
    public init(_ source: SourceReference) { self.source = source }

    /// Opens the source and lays over it, from below: faults, partition, offset and length, size, overlay. Of several
    /// sources it is the first that can be opened and read from.
    ///
    /// - Throws: `BlockError` of whatever could not be opened.
    public func open() throws(BlockError) -> any BlockDevice {
        if !alternatives.isEmpty || transports != nil || site?.findings.isEmpty == false {
            return try openChosen().opened
        }
        let source = fingerprints.isEmpty ? source : try source.pinned(to: fingerprints)
        var device = try source.open(
            writable: access == .writable, imageDirectories: imageDirectories, in: try takeSession())
        if !faults.isEmpty { device = FaultDevice(device, plan: FaultPlan(faults)) }
        if let partition { device = try openPartition(partition, of: device) }
        if offset > 0 || length != nil {
            let size = device.info.size
            let (end, overflow) = offset.addingReportingOverflow(length ?? (size > offset ? size - offset : 0))
            guard !overflow, offset < end else {
                if length == 0 {
                    throw BlockError(.outOfRange, "taking 0 bytes of \(source): give a length of at least 1")
                }
                throw BlockError(.outOfRange, "taking bytes from \(offset) of \(source): it has only \(size)")
            }
            device = try SliceDevice(device, range: offset..<end, label: "from \(offset)")
        }
        if let size { device = try ResizedDevice(device, size: size) }
        if let roundedTo { device = try ResizedDevice(device, roundedUpTo: roundedTo) }
        if access == .overlay {
            let directory = scratchDirectory ?? NamelessFile.scratchDirectory
            let scratch = try NamelessFile.scratch(size: device.info.size, directory: directory)
            device = try OverlayDevice(device, scratch: scratch)
        }
        if access == .writable && device.info.isReadOnly {
            throw BlockError(
                .readOnly,
                "opening \(source) for writing: a \(device.info.format) source can only be read here "
                    + "(an overlay keeps what is written in scratch space)")
        }
        return device
    }

    /// Opens the disk, and tells which of its sources it came from.
    ///
    /// - Throws: as `open`.
    public func openChosen() throws(BlockError) -> Chosen<any BlockDevice> {
        try openFirst({ (disk) throws(BlockError) in try disk.open() }, device: { $0 })
    }

    /// Opens the source for writing, with checkpoints in a directory.
    ///
    /// - Parameter log: told what people have to know about the checkpoints.
    /// - Throws: `BlockError`: the source is none that can be written and told from its earlier states, or of whatever
    ///   could not be opened.
    public func openCheckpointed(in directory: String, log: @escaping @Sendable (String) -> Void) throws(BlockError)
        -> CheckpointedDisk
    {
        guard access == .writable, case .path(let path) = source.kind else {
            throw BlockError(
                .unsupported,
                "keeping checkpoints of \(source): only of files and block devices that are opened for writing")
        }
        let limits = [
            ("partition", partition.map(String.init)), ("length", length.map(String.init)),
            ("size", size.map(String.init)), ("rounded", roundedTo.map(String.init)),
            ("offset", offset == 0 ? nil : String(offset)),
        ]
        let part = limits.compactMap { key, value in value.map { "\(key)=\($0)" } }.joined(separator: " ")
        // Before the disk: what the path leads to before and after is what was opened between.
        let file = try Descriptor.open(path, O_RDONLY | O_NONBLOCK)
        return try CheckpointedDisk(try open(), file: file, path: path, part: part, directory: directory, log: log)
    }

    private func openPartition(_ number: Int, of device: any BlockDevice) throws(BlockError) -> any BlockDevice {
        guard let table = try PartitionTable.read(from: device) else {
            throw BlockError(.notFound, "taking partition \(number) of \(device.info.name): it has no partition table")
        }
        return try table.open(number, of: device)
    }
}

extension SourceReference {
    /// Opens what the reference names.
    ///
    /// - Parameters:
    ///   - imageDirectories: directories, besides an image's own, beneath which images may name other files.
    ///   - session: the session of its host, where one was taken; otherwise it is taken where there is a limit.
    /// - Throws: `BlockError` of the reason.
    public func open(writable: Bool = false, imageDirectories: [String] = [], in session: HostSession? = nil)
        throws(BlockError) -> any BlockDevice
    {
        switch kind {
        case .path(let path): return try openPath(path, writable: writable, imageDirectories: imageDirectories)
        case .memory(let size):
            try allow([])
            if size == 0 { throw BlockError(.invalid, "opening \(self): a disk has at least 1 byte") }
            return try NamelessFile.memory(size: size)
        case .pattern(let size):
            try allow(["seed", "allocated"])
            let text = parameter("allocated") ?? "100%"
            let number = text.last == "%" ? text.dropLast() : text[...]
            guard let seed = UInt64(parameter("seed") ?? "0"), let percent = Double(number) else {
                throw BlockError(.invalid, "opening \(self): give seed=NUMBER and allocated=PERCENT%")
            }
            return try PatternDevice(size: size, seed: seed, allocatedShare: percent / 100)
        case .point(let point):
            try allow(["repository", "vm", "disk"])
            if writable {
                throw BlockError(
                    .readOnly,
                    "opening \(self) for writing: a restore point never changes (an overlay keeps what is written in "
                        + "scratch space)")
            }
            return try point.open()
        case .san(let reference):
            return try openSAN(reference, writable: writable, imageDirectories: imageDirectories)
        case .iscsi(let reference):
            if writable {
                throw BlockError(
                    .readOnly,
                    "opening \(reference) for writing: iscsi: sources are read-only; log in with the kernel's "
                        + "initiator (iscsiadm) and give its node, or keep what is written in scratch space "
                        + "(--overlay)")
            }
            let file = ResolvedFile(device: try ISCSIDevice(reference), identity: "\(reference)", resolver: nil)
            return try openDisk(file, try formatHint() ?? .guess(name: reference.target, isNodeOrRemote: true))
        case .hotAdd(let reference): return try openHotAdded(reference, writable: writable)
        case .nbd(let uri):
            var session = session
            if session == nil { session = try SiteSessions.take(for: uri) }
            let device = try NBDDevice.open(uri, isWritable: writable, keeping: session)
            // Its guest may have written what it begins like, and what an image names lies on the server.
            let file = ResolvedFile(device: device, identity: uri.description, resolver: nil)
            return try openDisk(file, try formatHint() ?? .guess(name: uri.exportName, isNodeOrRemote: true))
        }
    }

    private func openPath(_ path: String, writable: Bool, imageDirectories: [String]) throws(BlockError)
        -> any BlockDevice
    {
        try allow(["format", "direct", "exclusive"])
        var options = RawOptions()
        options.isWritable = writable
        options.isDirect = try flag("direct")
        options.isExclusive = try flag("exclusive")
        let hint = try formatHint()
        var status = stat()
        if stat(path, &status) < 0 { throw BlockError(errno: errno, "opening \(path)") }
        let isNode = status.st_mode & S_IFMT == S_IFBLK
        let device: any BlockDevice =
            isNode ? try BlockNodeDevice.open(path, options) : try RawFileDevice.open(path, options)
        let decided = hint ?? .guess(name: path, isNodeOrRemote: isNode)
        let real = try realPath(path)
        let directory = parent(real)
        var siblingOptions = RawOptions()
        siblingOptions.isDirect = options.isDirect
        var allowed = [directory]
        for other in imageDirectories { allowed.append(try realPath(other)) }
        let reopen: ResolvedFile.Reopening = { () throws(BlockError) in try RawFileDevice.open(real) }
        let file = ResolvedFile(
            device: device, identity: isNode ? "node \(status.st_rdev)" : "\(status.st_dev):\(status.st_ino)",
            resolver: DirectoryResolver(directory: directory, allowed: allowed, options: siblingOptions),
            reopen: isNode ? nil : reopen)
        return try openDisk(file, decided)
    }

    /// What format= says; nil without it.
    func formatHint() throws(BlockError) -> FormatHint? {
        guard let name = parameter("format") else { return nil }
        guard let format = ImageFormat(rawValue: name) else {
            let known = ImageFormat.allCases.filter(\.isSupported).map(\.rawValue).joined(separator: ", ")
            throw BlockError(.invalid, "opening \(self): there is no format \(name), only \(known)")
        }
        return .explicit(format)
    }
}
