// What regular files and block nodes have in common: probing, O_DIRECT writes, zeros by writing.
import Block
import CLinux
import Glibc
import Synchronization

/// Whether preadv2 with RWF_NOWAIT is known on a file (tmpfs refuses it, and O_DIRECT on ext4 would block).
func probeTryable(_ descriptor: Int32) -> Bool {
    var byte: UInt8 = 0
    let result = withUnsafeMutableBytes(of: &byte) { bytes in
        var vector = iovec(iov_base: bytes.baseAddress, iov_len: 1)
        return preadv2(descriptor, &vector, 1, 0, RWF_NOWAIT)
    }
    return result >= 0 || errno == EAGAIN
}

/// The alignment in bytes that O_DIRECT needs on an open file.
///
/// - Throws: `.unsupported` when the file does not take O_DIRECT or needs more than a buffer's alignment.
func directAlignment(_ descriptor: Int32, name: String) throws(BlockError) -> UInt32 {
    var memory: UInt32 = 0
    var offset: UInt32 = 0
    let result = dg_direct_alignment(descriptor, &memory, &offset)
    var alignment = max(memory, offset)
    if result < 0 || alignment == 0 {
        // A kernel before 6.1 does not tell; the logical sector of a node, or a page, is always enough.
        var sector: UInt32 = 0
        alignment = dg_block_logical_size(descriptor, &sector) == 0 && sector > 0 ? sector : 4096
    }
    guard alignment <= UInt32(Buffer.alignment), alignment.nonzeroBitCount == 1 else {
        throw BlockError(.unsupported, "opening \(name) with O_DIRECT: it needs an alignment of \(alignment) bytes")
    }
    return alignment
}

/// Writes to an O_DIRECT file of `size` bytes. What is not aligned goes through an aligned buffer; parts of sectors are
/// read, changed and written back, alone, so that nothing that others write to the sector meanwhile is lost.
func writeDirect(
    _ file: FileRef, _ bytes: UnsafeRawBufferPointer, at offset: UInt64, size: UInt64, flags: Int32, lock: SharedLock
) throws(BlockError) {
    let mask = file.traits.alignment - 1
    let address = UInt64(UInt(bitPattern: bytes.baseAddress))
    let parts = (offset | UInt64(bytes.count)) & mask != 0
    try lock.withLock(alone: parts) { () throws(BlockError) in
        if !parts && address & mask == 0 { return try writeFully(file.descriptor, bytes, at: offset, flags: flags) }
        let bounce = Buffer(count: 1 << 20)
        var done = 0
        while done < bytes.count {
            let position = offset + UInt64(done)
            let start = position & ~mask
            let skip = Int(position - start)
            let take = min(bytes.count - done, bounce.bytes.count - skip)
            let end = (position + UInt64(take) + mask) & ~mask
            let whole = UnsafeMutableRawBufferPointer(rebasing: bounce.bytes[..<Int(end - start)])
            if skip != 0 || end != position + UInt64(take) {
                let known = Int(min(end, size) - start)
                whole.initializeMemory(as: UInt8.self, repeating: 0)
                try file.read(into: UnsafeMutableRawBufferPointer(rebasing: whole[..<known]), at: start)
            }
            UnsafeMutableRawBufferPointer(rebasing: whole[skip..<(skip + take)])
                .copyMemory(from: UnsafeRawBufferPointer(rebasing: bytes[done..<(done + take)]))
            try writeFully(file.descriptor, UnsafeRawBufferPointer(whole), at: start, flags: flags)
            // The last sector of a file may be a part only; its rest is not to stay.
            if end > size, ftruncate(file.descriptor, off_t(truncatingIfNeeded: size)) < 0 {
                throw BlockError(errno: errno, "cutting the file back to its \(size) bytes")
            }
            done += take
        }
    }
}

/// Remembers that written data was lost. The kernel tells of a failed write-back once for each open file; every
/// connection flushes the same one, so all but the first would be told that their data is safe.
final class LostWrites: Sendable {
    private let happened = Atomic<Bool>(false)

    /// Runs a call that makes data durable, unless data is known to be lost.
    func guarding(_ name: String, _ body: () throws(BlockError) -> Void) throws(BlockError) {
        if happened.load(ordering: .relaxed) {
            throw BlockError(
                .inputOutput, "flushing \(name): data written before could not be stored; it has to be opened anew")
        }
        do throws(BlockError) {
            try body()
        } catch {
            if error.kind == .inputOutput { happened.store(true, ordering: .relaxed) }
            throw error
        }
    }
}

/// Zeroes a range by writing zeros, 64 KiB at a time.
func writeZeros(to device: some BlockDevice, _ range: Range<UInt64>) throws(BlockError) {
    var position = range.lowerBound
    while position < range.upperBound {
        let count = Int(min(UInt64(ZeroPage.count), range.upperBound - position))
        try device.write(UnsafeRawBufferPointer(rebasing: ZeroPage.bytes[..<count]), at: position, durable: false)
        position += UInt64(count)
    }
}
