// A file system whose files can share blocks (XFS), on a loop device, for those who may mount one.
import Block
import Glibc
import LinuxIO

/// A mounted XFS.
public enum ReflinkFileSystem {
    /// Whether one can be mounted here.
    public static let isAvailable =
        LoopDevice.areAvailable && Tool.exists("mkfs.xfs") && (try? with { _ in }) != nil

    /// Why tests that need it are skipped.
    public static let reason = "needs root, loop devices, mkfs.xfs (xfsprogs) and a kernel with XFS"

    /// Runs a body with a directory that is the root of such a file system.
    public static func with<R>(_ body: (TemporaryDirectory) throws -> R) throws -> R {
        // As LoopDevice does: one at a time on this machine.
        let control = try Descriptor.open("/dev/loop-control", O_RDWR)
        try require(flock(control.number, LOCK_EX) == 0, "locking /dev/loop-control: \(systemErrorText(errno))")
        defer { flock(control.number, LOCK_UN) }
        return try withTemporaryDirectory { directory in
            // The least that mkfs.xfs takes.
            let image = try directory.makeSparseFile("xfs", size: 320 << 20)
            _ = try Tool.output("mkfs.xfs", ["-q", "-m", "reflink=1", image])
            let root = directory.file("root")
            mkdir(root, 0o700)
            _ = try Tool.output("mount", ["-o", "loop", image, root])
            defer { _ = try? Tool.run("umount", [root]) }
            return try body(TemporaryDirectory(path: root))
        }
    }
}
