// Files that share blocks with others (FICLONERANGE): what the reflink driver is built on.
import Block
import CLinux
import Glibc
import LinuxIO

/// Makes `to` a copy of `from` that shares all its blocks. Both are open; `to` is empty.
///
/// - Throws: `.unsupported` where the file system cannot.
func cloneFile(_ from: Descriptor, to: Descriptor, name: String) throws(BlockError) {
    let result = dg_clone_range(from.number, 0, 0, to.number, 0)
    if result < 0 {
        let kind: BlockError.Kind =
            result == -EOPNOTSUPP || result == -EXDEV || result == -EINVAL ? .unsupported : .inputOutput
        throw BlockError(kind, "sharing the blocks of \(name): \(systemErrorText(-result))")
    }
}

/// Looks whether files in a directory can share blocks.
///
/// - Throws: `.unsupported` where they cannot, saying what to do.
func requireReflinks(in directory: String) throws(BlockError) {
    let (one, other) = ("\(directory)/reflink-1.partial", "\(directory)/reflink-2.partial")
    defer {
        unlink(one)
        unlink(other)
    }
    let from = try Descriptor.open(one, O_RDWR | O_CREAT | O_TRUNC)
    let to = try Descriptor.open(other, O_RDWR | O_CREAT | O_TRUNC)
    var page = [UInt8](repeating: 1, count: 65536)
    guard write(from.number, &page, page.count) == page.count else { throw BlockError(errno: errno, "writing \(one)") }
    do throws(BlockError) { try cloneFile(from, to: to, name: one) } catch {
        guard error.kind == .unsupported else { throw error }
        throw BlockError(
            .unsupported,
            "making a repository of raw files in \(directory): files of its file system cannot share blocks; use XFS "
                + "(mkfs.xfs -m reflink=1) or Btrfs, or the driver qcow2")
    }
}
