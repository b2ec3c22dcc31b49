// An open file descriptor with one owner, and the system calls that are used on it.
public import Block
import CLinux
public import Glibc

/// An open descriptor, closed when its owner goes.
public final class Descriptor: Sendable {
    /// The descriptor's number.
    public let number: Int32

    /// Takes over an open descriptor.
    public init(owning number: Int32) { self.number = number }

    deinit { close(number) }

    /// Opens a path. The descriptor is closed on exec.
    ///
    /// - Parameter flags: open(2) flags.
    /// - Throws: `BlockError` of the system's reason.
    public static func open(_ path: String, _ flags: Int32, mode: UInt32 = 0o600) throws(BlockError) -> Descriptor {
        while true {
            let number = dg_open(path, flags, mode)
            if number >= 0 { return Descriptor(owning: number) }
            if number != -EINTR { throw BlockError(errno: -number, "opening \(path)") }
        }
    }

    /// Takes O_NONBLOCK back that it was opened with.
    public func makeBlocking() {
        let flags = dg_get_flags(number)
        if flags >= 0 { _ = dg_set_flags(number, flags & ~O_NONBLOCK) }
    }

    /// The file's status.
    public func status() throws(BlockError) -> stat {
        var status = stat()
        if fstat(number, &status) < 0 { throw BlockError(errno: errno, "asking for the status of an open file") }
        return status
    }
}

/// Writes all bytes at an offset of a descriptor.
///
/// - Parameter flags: pwritev2 flags, for example RWF_DSYNC.
/// - Throws: `BlockError` of the system's reason; part of the bytes may then be written.
public func writeFully(_ descriptor: Int32, _ bytes: UnsafeRawBufferPointer, at offset: UInt64, flags: Int32)
    throws(BlockError)
{
    var done = 0
    while done < bytes.count {
        let position = offset + UInt64(done)
        var vector = iovec(
            iov_base: UnsafeMutableRawPointer(mutating: bytes.baseAddress?.advanced(by: done)),
            iov_len: bytes.count - done)
        let written = pwritev2(descriptor, &vector, 1, off_t(truncatingIfNeeded: position), flags)
        if written > 0 {
            done += written
        } else if written == 0 {
            throw BlockError(.noSpace, "writing at \(position): nothing more could be written")
        } else if errno != EINTR {
            throw BlockError(errno: errno, "writing \(bytes.count - done) bytes at \(position)")
        }
    }
}
