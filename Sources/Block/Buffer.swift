// Memory for blocks: aligned for O_DIRECT, owned by exactly one holder.
import Glibc

/// A block of memory aligned to 4096 bytes, freed when its owner goes.
public struct Buffer: ~Copyable, @unchecked Sendable {
    // Sendable because it is owned by one holder at a time: it cannot be copied.

    /// The alignment of every buffer in bytes; enough for O_DIRECT on every device with sectors up to this size.
    public static let alignment = 4096

    /// The memory.
    public let bytes: UnsafeMutableRawBufferPointer

    /// Memory that is not initialised.
    ///
    /// - Parameters:
    ///   - count: bytes, at least 1.
    ///   - inHugePages: whether it lies in huge pages, where it fills any and the system has them. That is for what is
    ///     stored around the page cache, in large pieces: a request takes a limited number of pieces of memory
    ///     (`max_segments` of the device's queue, often 126 or 254), so that from ordinary pages 1 MiB is several.
    public init(count: Int, inHugePages: Bool = false) {
        precondition(count > 0)
        let hugePage = 2 << 20
        let isHuge = inHugePages && count >= hugePage
        bytes = .allocate(byteCount: count, alignment: isHuge ? hugePage : Self.alignment)
        // Where this is refused, the pages are ordinary ones.
        if isHuge { madvise(bytes.baseAddress, count, MADV_HUGEPAGE) }
    }

    deinit { bytes.deallocate() }

    /// Read-only view of the memory.
    public var readable: UnsafeRawBufferPointer { UnsafeRawBufferPointer(bytes) }
}

/// 64 KiB of zeros that never change, for sending and writing.
public enum ZeroPage {
    /// Bytes in the page.
    public static let count = 65536
    /// The zeros. Shared freely because nobody writes them after they are made.
    public nonisolated(unsafe) static let bytes: UnsafeRawBufferPointer = {
        let memory = UnsafeMutableRawBufferPointer.allocate(byteCount: count, alignment: Buffer.alignment)
        memory.initializeMemory(as: UInt8.self, repeating: 0)
        return UnsafeRawBufferPointer(memory)
    }()
}
