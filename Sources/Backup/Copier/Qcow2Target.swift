// A new qcow2 image as a copy's target.
public import Block
public import Formats

/// A qcow2 image that is being written. Who made the writer finishes or abandons it.
public final class Qcow2Target: CopyTarget {
    public let name: String
    public let readsAsZeros: Bool
    public let granularity: UInt64 = 65536
    public let isSequential = false
    /// What writes the image.
    public let writer: Qcow2Writer

    public var size: UInt64 { writer.size }
    public var pieceBytes: Int { writer.pieceBytes }
    public var waitsForStorage: Bool { writer.waitsForStorage }

    /// A target over a writer.
    ///
    /// - Parameters:
    ///   - name: what the image is to people; nil for the writer's path.
    ///   - readsAsZeros: whether the image has no backing file, so that what is not written reads as zeros.
    public init(_ writer: Qcow2Writer, name: String? = nil, readsAsZeros: Bool) {
        self.writer = writer
        self.name = name ?? writer.path
        self.readsAsZeros = readsAsZeros
    }

    public func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws(BlockError) {
        try writer.write(bytes, at: offset)
    }

    public func zero(_ range: Range<UInt64>) throws(BlockError) { try writer.zero(range) }

    public func flush() throws(BlockError) { try writer.flush() }
}
