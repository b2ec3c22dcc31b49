// What a disk was when it was last looked at, so that somebody can tell later whether others have changed it since.
public import Block
import CLinux
import Glibc

/// What tells one state of a disk from another: for files size and times, for block nodes what the kernel counts.
public struct DiskIdentity: Codable, Equatable, Sendable {
    /// The path without symbolic links.
    public var path: String
    /// The boot of this machine: device numbers and the kernel's counters hold for one boot.
    public var boot: String
    /// Bytes of the file or node.
    public var size: UInt64
    /// Files: the device number of the file system. Nodes: their own.
    public var device: UInt64
    /// Files: the inode.
    public var inode: UInt64?
    /// Files: when the content changed last, in nanoseconds since 1970.
    public var modified: Int64?
    /// Files: when anything of the inode changed last, in nanoseconds since 1970.
    public var changed: Int64?
    /// Nodes: the number that the kernel gave this disk when it appeared.
    public var diskSequence: UInt64?
    /// Nodes: sectors that this machine has written to the whole disk and discarded, since it appeared.
    public var sectorsChanged: UInt64?

    /// Looks at an open file or block node, which nobody in this process writes at this time, flushed before.
    ///
    /// Waits a little where the file was changed just now, so that every change that comes later has another time.
    ///
    /// - Parameter path: its path without symbolic links.
    /// - Throws: `BlockError` when it cannot be looked at, or is neither.
    public init(of file: Descriptor, path: String) throws(BlockError) {
        self.path = path
        var status = try file.status()
        boot = readText("/proc/sys/kernel/random/boot_id") ?? ""
        switch status.st_mode & S_IFMT {
        case S_IFREG:
            for _ in 0..<100 where Self.isRecent(status.st_ctim) || Self.isRecent(status.st_mtim) {
                usleep(5000)
                status = try file.status()
            }
            size = UInt64(clamping: status.st_size)
            device = UInt64(status.st_dev)
            inode = UInt64(status.st_ino)
            modified = Self.nanoseconds(status.st_mtim)
            changed = Self.nanoseconds(status.st_ctim)
        case S_IFBLK:
            var bytes: UInt64 = 0
            if dg_block_size64(file.number, &bytes) < 0 { throw BlockError(.invalid, "\(path) tells no size") }
            size = bytes
            device = UInt64(status.st_rdev)
            var sequence: UInt64 = 0
            if dg_block_disk_sequence(file.number, &sequence) == 0 { diskSequence = sequence }
            sectorsChanged = Self.sectorsChanged(status.st_rdev)
        default:
            throw BlockError(
                .unsupported, "\(path) is neither a file nor a block device: nothing tells its states apart")
        }
    }

    /// Whether a path leads to an open file or block node, and not to another that has taken its place.
    public static func leads(_ path: String, to file: Descriptor) throws(BlockError) -> Bool {
        let opened = try file.status()
        var found = stat()
        guard stat(path, &found) == 0, found.st_mode & S_IFMT == opened.st_mode & S_IFMT else { return false }
        if opened.st_mode & S_IFMT == S_IFBLK { return found.st_rdev == opened.st_rdev }
        return found.st_dev == opened.st_dev && found.st_ino == opened.st_ino
    }

    /// Timestamps advance in steps of some milliseconds: a change within the same step would not show.
    private static func isRecent(_ time: timespec) -> Bool {
        var now = timespec()
        clock_gettime(CLOCK_REALTIME, &now)
        let age = nanoseconds(now) &- nanoseconds(time)
        return age >= 0 && age < 30_000_000
    }

    private static func nanoseconds(_ time: timespec) -> Int64 {
        Int64(time.tv_sec) &* 1_000_000_000 &+ Int64(time.tv_nsec)
    }

    /// Sectors written and discarded on the disk of a node (kernel: Documentation/block/stat.rst).
    private static func sectorsChanged(_ number: dev_t) -> UInt64? {
        let folder = "/sys/dev/block/\(dg_device_major(UInt64(number))):\(dg_device_minor(UInt64(number)))"
        let disk = readText("\(folder)/partition") == nil ? folder : "\(folder)/.."
        let fields = (readText("\(disk)/stat") ?? "").split(separator: " ").map { UInt64($0) ?? 0 }
        return fields.count > 13 ? fields[6] &+ fields[13] : fields.count > 6 ? fields[6] : nil
    }

    /// How this state, the later one, differs from an earlier one; nil when it is the same, as far as can be told.
    public func difference(from earlier: DiskIdentity) -> String? {
        if path != earlier.path { return "it is \(path) now, and was \(earlier.path)" }
        if size != earlier.size { return "its size is \(size) now, and was \(earlier.size)" }
        if inode != earlier.inode { return "it is another file than it was" }
        if inode == nil {
            // Counters begin anew with each boot, and who has no counters cannot tell.
            if boot != earlier.boot { return "the machine has been booted since" }
            if diskSequence != earlier.diskSequence { return "it was taken away and came back" }
            guard let sectorsChanged, sectorsChanged == earlier.sectorsChanged else {
                return "it was written to by somebody else"
            }
            return device == earlier.device ? nil : "it is another device than it was"
        }
        if boot == earlier.boot && device != earlier.device { return "it lies on another file system" }
        if modified != earlier.modified || changed != earlier.changed { return "it was changed by somebody else" }
        return nil
    }
}
