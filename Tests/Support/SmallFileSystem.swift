// A file system that is full after 1 MiB, for those who may mount one.
import Glibc

/// A mounted tmpfs of 1 MiB.
public enum SmallFileSystem {
    /// Whether one can be mounted here.
    public static let isAvailable = Tool.isRoot && (try? with { _ in }) != nil

    /// Runs a body with a directory that is the root of such a file system.
    public static func with<R>(_ body: (TemporaryDirectory) throws -> R) throws -> R {
        try withTemporaryDirectory { directory in
            if mount("tmpfs", directory.path, "tmpfs", 0, "size=1m") < 0 {
                throw CheckFailure("mounting a tmpfs: errno \(errno)")
            }
            defer { umount2(directory.path, Int32(MNT_DETACH)) }
            return try body(directory)
        }
    }
}
