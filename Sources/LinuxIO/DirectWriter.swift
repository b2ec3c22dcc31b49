// Writing large pieces of a new file around the page cache, beside a descriptor that goes through it.
public import Block
import CLinux
import Glibc

/// Writes large, aligned pieces of a regular file with O_DIRECT.
///
/// Copying into new pages of the page cache is most of what writing a large file costs a processor, and pushes out of
/// memory what others use. Smaller pieces are better off in the cache, which writes them back together. Both may go on
/// side by side: the kernel keeps them coherent.
public final class DirectWriter: Sendable {
    /// Pieces of fewer bytes are not worth a wait for the storage.
    private static let pieceMin = 256 << 10

    private let descriptor: Descriptor
    private let mask: UInt64
    private let isRefused = Locked(false)

    /// A second way to write an open file.
    ///
    /// - Parameter file: its descriptor, which stays the caller's.
    /// - Returns: nil where direct writes cannot be had, or gain nothing.
    public init?(_ file: Int32) {
        guard dg_writes_directly(file) else { return nil }
        let own = try? Descriptor.open("/proc/self/fd/\(file)", O_WRONLY | O_DIRECT)
        guard let own, let alignment = try? directAlignment(own.number, name: "") else { return nil }
        descriptor = own
        // Whole pages, so that none is both in the cache and written around it.
        mask = UInt64(max(Int(alignment), sysconf(Int32(_SC_PAGESIZE)), 4096)) - 1
    }

    /// Writes bytes, if that is worth it.
    ///
    /// - Returns: false, and nothing was written, for what has to be written otherwise.
    /// - Throws: the system's reason.
    public func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws(BlockError) -> Bool {
        let address = UInt64(UInt(bitPattern: bytes.baseAddress))
        guard bytes.count >= Self.pieceMin, (offset | UInt64(bytes.count)) & mask == 0,
            address & UInt64(Buffer.alignment - 1) == 0, !isRefused.withLock({ $0 })
        else { return false }
        do throws(BlockError) {
            try writeFully(descriptor.number, bytes, at: offset, flags: 0)
        } catch {
            if error.kind != .invalid { throw error }
            // Some layer below does not take it after all.
            isRefused.withLock { $0 = true }
            return false
        }
        return true
    }
}
