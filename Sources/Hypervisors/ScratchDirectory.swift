// Directories of scratch files: whether there is room enough, and how they are removed.
import Block
import Glibc
import LinuxIO

/// Looks whether a directory's file system has bytes left to spare.
///
/// - Throws: `.noSpace` when it has not.
func checkSpace(in directory: String, reserve: UInt64, doing: String) throws(BlockError) {
    var space = statvfs()
    if statvfs(directory, &space) < 0 { throw BlockError(errno: errno, "\(doing): looking at \(directory)") }
    let (free, overflow) = UInt64(space.f_bavail).multipliedReportingOverflow(by: UInt64(space.f_frsize))
    if !overflow && free < reserve {
        throw BlockError(
            .noSpace,
            "\(doing): only \(free) bytes are left for scratch files in \(directory), \(reserve) are to stay free: "
                + "the backup ends before the guest suffers (name a larger directory for scratch files)")
    }
}

/// Refuses a scratch directory that is another one for whoever runs elsewhere: QEMU, or `diskgate doctor`.
func requireAbsolute(scratch: String?) throws(BlockError) {
    if let scratch, !scratch.hasPrefix("/") {
        throw BlockError(.invalid, "keeping scratch files in \(scratch): it is relative: give an absolute path")
    }
}

/// Removes a scratch directory and what a snapshot puts there, nothing else.
func removeScratchDirectory(_ path: String) throws(BlockError) {
    if access(path, F_OK) < 0 && errno == ENOENT { return }
    for name in try namesInDirectory(path) where name == "nbd.sock" || name.hasPrefix("scratch-") {
        if unlink("\(path)/\(name)") < 0 && errno != ENOENT {
            throw BlockError(errno: errno, "removing the scratch file \(path)/\(name)")
        }
    }
    if rmdir(path) < 0 && errno != ENOENT { throw BlockError(errno: errno, "removing the directory \(path)") }
}
