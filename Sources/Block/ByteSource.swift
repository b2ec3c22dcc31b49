// Bytes that only a device can produce: a decompressor, a generator, a remote server.

/// Produces bytes that exist in no file as they are. A leaf of the device tree, never a device that maps to itself.
public protocol ByteSource: AnyObject, Sendable {
    /// Whether `read` only computes, without waiting for storage or a network, so that it may run on a connection's
    /// own thread.
    var isPrompt: Bool { get }

    /// Fills the buffer with the bytes from `offset` of the source's own numbering. May block unless `isPrompt`.
    ///
    /// - Throws: `BlockError` when the bytes cannot be had; the buffer's content is then undefined.
    func read(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(BlockError)
}

/// Makes a byte source referable from extents, which are plain bytes; its owner keeps it alive.
public final class SourceHandle: Sendable {
    /// The source behind the handle.
    public let source: any ByteSource

    /// A handle for a source.
    public init(_ source: any ByteSource) { self.source = source }

    /// The reference that extents carry. It is valid while this handle lives.
    public var reference: SourceRef { SourceRef(handle: .passUnretained(self)) }
}

/// A reference to a byte source that owns nothing: the device that put it in a map keeps the source alive.
@frozen public struct SourceRef: BitwiseCopyable, @unchecked Sendable, Equatable {
    // Sendable because SourceHandle is immutable and its source is Sendable.
    @usableFromInline let handle: Unmanaged<SourceHandle>

    @usableFromInline init(handle: Unmanaged<SourceHandle>) { self.handle = handle }

    /// The source. The device that owns it must be kept alive by the caller.
    public var source: any ByteSource { handle.takeUnretainedValue().source }

    @inlinable public static func == (left: SourceRef, right: SourceRef) -> Bool {
        left.handle.toOpaque() == right.handle.toOpaque()
    }
}
