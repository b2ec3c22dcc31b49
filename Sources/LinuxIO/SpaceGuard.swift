// Keeps scratch space from filling a file system to the last byte.
public import Block
import Glibc

/// Watches the free space of the file system that a directory lies on.
public final class SpaceGuard: Sendable {
    /// The directory.
    public let directory: String
    /// Bytes that are to stay free.
    public let reserve: UInt64
    private let descriptor: Descriptor

    /// A guard for a directory.
    ///
    /// - Parameter reserve: bytes that are to stay free; nil for 5 % of the file system, at most 1 GiB.
    /// - Throws: `BlockError` when the directory cannot be opened or its file system does not tell its size.
    public init(_ directory: String, reserve: UInt64? = nil) throws(BlockError) {
        descriptor = try Descriptor.open(directory, O_RDONLY | O_DIRECTORY)
        self.directory = directory
        let space = try Self.space(descriptor, directory)
        self.reserve = reserve ?? min(space.size / 20, 1 << 30)
    }

    private static func space(_ descriptor: Descriptor, _ directory: String) throws(BlockError) -> (
        size: UInt64, free: UInt64
    ) {
        var status = statvfs()
        if fstatvfs(descriptor.number, &status) < 0 {
            throw BlockError(errno: errno, "asking for the free space in \(directory)")
        }
        let block = UInt64(status.f_frsize)
        return (
            UInt64(status.f_blocks).multipliedReportingOverflow(by: block).partialValue,
            UInt64(status.f_bavail).multipliedReportingOverflow(by: block).partialValue
        )
    }

    /// Bytes that ordinary users may still take.
    public var free: UInt64 {
        get throws(BlockError) { try Self.space(descriptor, directory).free }
    }

    /// Looks whether the reserve is still free.
    ///
    /// - Throws: `.noSpace` when it is not.
    public func check() throws(BlockError) {
        let free = try free
        if free < reserve {
            throw BlockError(
                .noSpace,
                "scratch space in \(directory): \(free) bytes are free there, and \(reserve) are to stay free (make "
                    + "room, or choose another place with --scratch)")
        }
    }
}
