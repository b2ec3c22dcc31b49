// The file that an image is written into or changed in, and the few things that are done with it.
import Block
import CLinux
import Glibc
import LinuxIO

/// A file that grows as it is written. Calls may come from several threads.
protocol ImageFile: AnyObject, Sendable {
    /// What the file is to people.
    var name: String { get }
    /// Whether large pieces go around the page cache.
    var isDirect: Bool { get }
    /// Bytes in the file.
    func size() throws(BlockError) -> UInt64
    /// Reads bytes; those past the file's end are zeros.
    func read(into bytes: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(BlockError)
    /// Writes bytes, also past the file's end.
    func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws(BlockError)
    /// Gives storage back where the file system can; the bytes are zeros afterwards, or as they were.
    func discard(_ range: Range<UInt64>) throws(BlockError)
    /// Puts everything that was written on stable storage.
    func flush() throws(BlockError)
}

/// An image file on disk.
final class DiskImageFile: ImageFile {
    let name: String
    var isDirect: Bool { direct != nil }
    private let descriptor: Descriptor
    /// For large pieces of a new image.
    private let direct: DirectWriter?
    /// Whether the file system gives back parts of files.
    private let canPunch = Locked(true)

    /// - Parameter isNew: whether it is written from the beginning, in pieces that are not read again soon.
    init(_ descriptor: Descriptor, name: String, isNew: Bool = false) {
        self.descriptor = descriptor
        self.name = name
        direct = isNew ? DirectWriter(descriptor.number) : nil
    }

    func size() throws(BlockError) -> UInt64 { UInt64(clamping: try descriptor.status().st_size) }

    func read(into bytes: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(BlockError) {
        var done = 0
        while done < bytes.count {
            let position = offset + UInt64(done)
            let got = pread(
                descriptor.number, bytes.baseAddress?.advanced(by: done), bytes.count - done,
                off_t(truncatingIfNeeded: position))
            if got > 0 {
                done += got
            } else if got == 0 {
                UnsafeMutableRawBufferPointer(rebasing: bytes[done...])
                    .initializeMemory(as: UInt8.self, repeating: 0)
                return
            } else if errno != EINTR {
                throw BlockError(errno: errno, "reading \(bytes.count - done) bytes at \(position) of \(name)")
            }
        }
    }

    func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws(BlockError) {
        do throws(BlockError) {
            if let direct, try direct.write(bytes, at: offset) { return }
            try writeFully(descriptor.number, bytes, at: offset, flags: 0)
        } catch { throw error.during("writing to \(name)") }
    }

    func discard(_ range: Range<UInt64>) throws(BlockError) {
        if !canPunch.withLock({ $0 }) { return }
        let result = fallocate(
            descriptor.number, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
            off_t(truncatingIfNeeded: range.lowerBound), off_t(truncatingIfNeeded: range.count64))
        if result == 0 { return }
        switch errno {
        case EOPNOTSUPP, ENOSYS: canPunch.withLock { $0 = false }
        case EINTR: break  // Advice; the storage stays in use.
        default: throw BlockError(errno: errno, "giving back \(range.count64) bytes of \(name)")
        }
    }

    func flush() throws(BlockError) {
        if fsync(descriptor.number) < 0 { throw BlockError(errno: errno, "syncing \(name)") }
    }

    /// Starts to write a range to storage.
    func startWriteBack(_ range: Range<UInt64>) {
        sync_file_range(
            descriptor.number, off_t(truncatingIfNeeded: range.lowerBound), off_t(truncatingIfNeeded: range.count64),
            UInt32(SYNC_FILE_RANGE_WRITE))
    }

    /// Waits until a range is written and forgets its cached pages. Errors come up when the file is synced.
    func dropCache(_ range: Range<UInt64>) {
        let start = off_t(truncatingIfNeeded: range.lowerBound)
        let length = off_t(truncatingIfNeeded: range.count64)
        let flags = SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER
        sync_file_range(descriptor.number, start, length, UInt32(flags))
        posix_fadvise(descriptor.number, start, length, POSIX_FADV_DONTNEED)
    }
}
