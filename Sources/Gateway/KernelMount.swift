// `mount` and `unmount`: a server of our own, the kernel's NBD client on its socket, a file system on that, and back.
public import Block
import Formats
import Formats
import FoundationEssentials
import Glibc
import LinuxIO
import Transports

/// A file system of a disk, mounted through the kernel's NBD client. It is noted in the state directory before anything
/// is made, so that it can be undone whatever happens.
public struct KernelMount: Codable, Sendable {
    /// Names its files in the state directory.
    var id: String
    /// What was mounted.
    public var source: String
    /// Where, without symbolic links.
    public var directory: String
    /// The kernel's node; nil before one is chosen.
    public var node: String?
    /// The server's process; nil before it is started.
    var server: Int32?
    /// The file system's type.
    public var type: String?

    /// What is to be mounted.
    public struct Request: Sendable {
        public var source: String
        public var directory: String
        public var partition: Int?
        public var isOverlay: Bool

        /// A file system of a source.
        public init(source: String, directory: String, partition: Int?, isOverlay: Bool) {
            self.source = source
            self.directory = directory
            self.partition = partition
            self.isOverlay = isOverlay
        }

        /// The words behind `diskgate serve` that serve the same.
        var serveArguments: [String] {
            [source] + (partition.map { ["--partition", String($0)] } ?? []) + (isOverlay ? ["--overlay"] : [])
        }
    }

    private static var folder: String { "\(defaultStateDirectory())/mounts" }
    private var socket: String { "\(Self.folder)/\(id).socket" }
    private var log: String { "\(Self.folder)/\(id).log" }
    private var file: String { "\(Self.folder)/\(id).json" }

    /// Everything that is mounted, or was not undone.
    ///
    /// - Throws: `BlockError` when the state directory cannot be read.
    public static func list() throws(BlockError) -> [KernelMount] {
        if access(folder, F_OK) < 0 { return [] }
        var mounts: [KernelMount] = []
        for name in try namesInDirectory(folder) where name.hasSuffix(".json") {
            let bytes = try readSmallFile("\(folder)/\(name)")
            do { mounts.append(try JSONDecoder().decode(KernelMount.self, from: Data(bytes))) } catch {
                throw BlockError(.corrupt, "reading \(folder)/\(name): \(error)")
            }
        }
        return mounts
    }

    private func note() throws(BlockError) {
        do { try writeDurably(file, [UInt8](try JSONEncoder().encode(self))) } catch let error as BlockError {
            throw error
        } catch { throw BlockError(.invalid, "writing \(file): \(error)") }
    }

    /// Mounts a file system.
    ///
    /// - Throws: `.unsupported` where the kernel has no NBD client, with what to do instead; otherwise of whatever step
    ///   failed, after all before it is undone.
    public static func mount(_ request: Request) throws(BlockError) -> KernelMount {
        let directory = try checkedDirectory(request.directory)
        let found = try fileSystem(of: request)
        try requireKernelClient(request)
        try makeDirectories(folder)
        var mount = KernelMount(
            id: String(UUID().uuidString.lowercased().prefix(8)), source: request.source, directory: directory)
        try mount.note()
        do throws(BlockError) {
            try mount.startServer(request)
            try mount.attach(isReadOnly: !request.isOverlay)
            try mount.mountNode(found, isReadOnly: !request.isOverlay)
            try mount.note()
            return mount
        } catch {
            do throws(BlockError) { try mount.undo() } catch let second {
                throw BlockError(
                    error.kind,
                    "\(error.message); undoing it failed, too: \(second.message) (diskgate unmount \(directory))")
            }
            throw error
        }
    }

    /// Unmounts what `mount` has mounted on a directory, and takes everything back that was made for it.
    ///
    /// - Throws: `.notFound` when nothing is mounted there, or of whatever could not be undone, for example because the
    ///   file system is in use.
    public static func unmount(_ directory: String) throws(BlockError) -> KernelMount {
        let real = realpath(directory, nil).map { text in
            defer { free(text) }
            return String(cString: text)
        }
        // The newest one lies on top.
        guard let mount = try list().last(where: { $0.directory == real || $0.directory == directory }) else {
            throw BlockError(.notFound, "unmounting \(directory): diskgate has mounted nothing there")
        }
        try mount.undo()
        return mount
    }

    // MARK: Checks

    private static func checkedDirectory(_ path: String) throws(BlockError) -> String {
        guard let real = realpath(path, nil) else { throw BlockError(errno: errno, "mounting on \(path)") }
        defer { free(real) }
        let directory = String(cString: real)
        var status = stat()
        if stat(directory, &status) < 0 || status.st_mode & S_IFMT != S_IFDIR {
            throw BlockError(.invalid, "mounting on \(path): it is no directory")
        }
        if try list().contains(where: { $0.directory == directory }) {
            throw BlockError(.invalid, "mounting on \(path): something is mounted there; diskgate unmount \(path)")
        }
        return directory
    }

    /// Looks whether there is something to mount, before anything is started.
    private static func fileSystem(of request: Request) throws(BlockError) -> FileSystemType {
        var disk = DiskSpecification(try SourceReference(request.source))
        disk.partition = request.partition
        let device = try disk.open()
        if request.partition == nil, let table = try PartitionTable.read(from: device), !table.partitions.isEmpty {
            let numbers = table.partitions.map { String($0.number) }.joined(separator: ", ")
            throw BlockError(
                .invalid,
                "mounting \(request.source): it has partitions; choose one with --partition (\(numbers), see "
                    + "diskgate info)")
        }
        if let found = try FileSystemType.recognised(on: device) { return found }
        throw BlockError(
            .unsupported,
            "mounting \(request.source): it begins with no file system that is known here (ext2 to ext4, XFS, Btrfs, "
                + "NTFS, FAT, ISO 9660, squashfs)")
    }

    private static func requireKernelClient(_ request: Request) throws(BlockError) {
        let line = "diskgate serve " + request.serveArguments.map(quoted).joined(separator: " ")
        let instead = "; to use the disk in another way, serve it: \(line)"
        if geteuid() != 0 { throw BlockError(.denied, "mounting \(request.source): only root may mount\(instead)") }
        if access("/dev/nbd0", F_OK) < 0 { _ = try? ChildProgram.run(["modprobe", "nbd"], seconds: 30) }
        if access("/dev/nbd0", F_OK) < 0 {
            throw BlockError(
                .unsupported, "mounting \(request.source): this kernel has no NBD client (no /dev/nbd0)\(instead)")
        }
        let client = try? ChildProgram.run(["nbd-client", "-V"], seconds: 30)
        if client == nil || client?.status == 127 {
            throw BlockError(
                .notFound,
                "mounting \(request.source): nbd-client is not installed (Debian package nbd-client)\(instead)")
        }
    }

    private static func quoted(_ word: String) -> String {
        word.allSatisfy { $0.isLetter || $0.isNumber || "/._-:=".contains($0) }
            ? word : "'" + word.replacing("'", with: "'\\''") + "'"
    }

    // MARK: Steps

    private mutating func startServer(_ request: Request) throws(BlockError) {
        let errors = try Descriptor.open(log, O_WRONLY | O_CREAT | O_TRUNC)
        var words = ["/proc/self/exe", "serve"] + request.serveArguments
        words += ["--listen", "unix:\(socket)", "--exit-with-last"]
        let process = try ChildProgram.start(words, input: nil, output: errors.number, errors: errors.number)
        server = process
        try note()
        // The server may have to wait for a session of the source's host first.
        let deadline = monotonicSeconds() + 60 + SiteSessions.siteWaitSeconds
        while access(socket, F_OK) < 0 {
            if ChildProgram.reapIfEnded(process) != nil || monotonicSeconds() > deadline {
                let said = (try? readSmallFile(log)).map { String(decoding: $0, as: UTF8.self) } ?? ""
                throw BlockError(.inputOutput, "mounting \(source): the server did not start: \(said)")
            }
            usleep(10_000)
        }
    }

    /// Connects a free node of the kernel.
    private mutating func attach(isReadOnly: Bool) throws(BlockError) {
        var reason = "all of /dev/nbd* are in use"
        for number in 0..<256 {
            let path = "/dev/nbd\(number)"
            if access(path, F_OK) < 0 { break }
            if access("/sys/block/nbd\(number)/pid", F_OK) == 0 { continue }
            node = path
            try note()
            let words = ["nbd-client", "-unix", socket, path] + (isReadOnly ? ["-R"] : [])
            let result = try ChildProgram.run(words, seconds: 60)
            if result.status == 0 { return try awaitSize(path) }
            reason = Self.text(result.errors)
            node = nil
        }
        throw BlockError(.inputOutput, "mounting \(source): connecting the kernel's NBD client: \(reason)")
    }

    /// The kernel tells the size a moment after the connection.
    private func awaitSize(_ path: String) throws(BlockError) {
        let deadline = monotonicSeconds() + 10
        while monotonicSeconds() < deadline {
            if let device = try? BlockNodeDevice.open(path), device.info.size > 0 { return }
            usleep(10_000)
        }
        throw BlockError(.inputOutput, "mounting \(source): \(path) has no size")
    }

    private mutating func mountNode(_ found: FileSystemType, isReadOnly: Bool) throws(BlockError) {
        guard let node else { return }
        type = found.name
        // What is in a backup is not to be trusted: it may hold set-user-ID programs and device nodes.
        let options = found.options(isReadOnly: isReadOnly) + ",nosuid,nodev"
        let result = try ChildProgram.run(["mount", "-t", found.name, "-o", options, node, directory], seconds: 120)
        if result.status != 0 {
            throw BlockError(
                .inputOutput, "mounting \(source) (\(found.name), \(options)): \(Self.text(result.errors))")
        }
    }

    private static func text(_ bytes: [UInt8]) -> String {
        String(decoding: bytes, as: UTF8.self).split(separator: "\n").joined(separator: "; ")
    }

    // MARK: Undoing

    private var isMounted: Bool {
        guard let node, let bytes = try? readSmallFile("/proc/self/mounts", limit: 16 << 20) else { return false }
        return String(decoding: bytes, as: UTF8.self).split(separator: "\n").contains { $0.hasPrefix("\(node) ") }
    }

    /// Undoes everything, in reverse; what is undone already stays so.
    private func undo() throws(BlockError) {
        if isMounted {
            let result = try ChildProgram.run(["umount", directory], seconds: 120)
            if result.status != 0 {
                throw BlockError(.inputOutput, "unmounting \(directory): \(Self.text(result.errors))")
            }
        }
        if let node, access("/sys/block/\(node.dropFirst("/dev/".count))/pid", F_OK) == 0, isOurs {
            let result = try ChildProgram.run(["nbd-client", "-d", node], seconds: 60)
            if result.status != 0 {
                throw BlockError(.inputOutput, "disconnecting \(node): \(Self.text(result.errors + result.output))")
            }
        }
        endServer()
        for path in [socket, log] { unlink(path) }
        if unlink(file) < 0 && errno != ENOENT { throw BlockError(errno: errno, "removing \(file)") }
    }

    /// Whether the process is the server that was started for this: it has our socket among its arguments.
    private var isOurs: Bool {
        guard let server, let bytes = try? readSmallFile("/proc/\(server)/cmdline") else { return false }
        return String(decoding: bytes, as: UTF8.self).contains(socket)
    }

    private func endServer() {
        guard let server else { return }
        // It ends by itself with its last client; one that never had a client is told to.
        for attempt in 0..<1000 {
            if ChildProgram.reapIfEnded(server) != nil || !isOurs { return }
            if attempt == 100 { kill(server, SIGTERM) }
            usleep(10_000)
        }
        if isOurs { kill(server, SIGKILL) }
    }
}
