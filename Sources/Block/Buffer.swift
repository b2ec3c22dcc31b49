// Memory for blocks: aligned for O_DIRECT, owned by exactly one holder.

/// A block of memory aligned to 4096 bytes, freed when its owner goes.
public struct Buffer: ~Copyable, @unchecked Sendable {
    // Sendable because it is owned by one holder at a time: it cannot be copied.

    /// The alignment of every buffer in bytes; enough for O_DIRECT on every device with sectors up to this size.
    public static let alignment = 4096

    /// The memory.
    public let bytes: UnsafeMutableRawBufferPointer

    /// Memory for `count` bytes, at least 1, not initialised.
    public init(count: Int) {
        precondition(count > 0)
        bytes = .allocate(byteCount: count, alignment: Self.alignment)
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
