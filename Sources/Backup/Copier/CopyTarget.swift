// What the copier writes to: a file, a node, a stream, an NBD export, or a disk of a restore point.
public import Block

/// The receiving end of a copy: a disk of a fixed size that is filled range by range.
///
/// Every call may come from any thread, several at a time, for ranges that do not overlap; with `isSequential` they
/// come one at a time, in order, and cover every byte from 0.
public protocol CopyTarget: AnyObject, Sendable {
    /// What the target is to people: a path or a URI.
    var name: String { get }
    /// Bytes on the target.
    var size: UInt64 { get }
    /// Ranges begin at multiples of it, and end at multiples or at the target's end. A power of two, in bytes.
    var granularity: UInt64 { get }
    /// Bytes of one write that suit the target: a power of two, at least 64 KiB. What goes through the page cache is
    /// best read and written while it is in the processor's cache; storage likes larger pieces.
    var pieceBytes: Int { get }
    /// Whether a write waits for the storage and not for a processor, so that several at a time are worth it whatever
    /// the number of processors.
    var waitsForStorage: Bool { get }
    /// Whether ranges have to come in order, without gaps.
    var isSequential: Bool { get }
    /// Whether everything that was never written reads as zeros, so that a full copy has nothing to do for zeros.
    var readsAsZeros: Bool { get }

    /// Writes bytes. They are the target's when the call returns, not yet durable.
    func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws(BlockError)

    /// Makes a range read as zeros, as a hole or zero cluster where the target has such.
    func zero(_ range: Range<UInt64>) throws(BlockError)

    /// Puts everything that returned before on stable storage.
    func flush() throws(BlockError)

    /// Lets a range share its blocks with a range of the same length in an open file.
    ///
    /// - Returns: false, and nothing changed, where that cannot be: the bytes have to be written then.
    func clone(_ file: FileRef, from offset: UInt64, to range: Range<UInt64>) -> Bool

    /// Starts to put what was written on stable storage, without waiting, so that the flush at the end is short.
    func startFlushing()
}

extension CopyTarget {
    public var pieceBytes: Int { 256 << 10 }
    public var waitsForStorage: Bool { false }
    public var readsAsZeros: Bool { false }
    public func clone(_ file: FileRef, from offset: UInt64, to range: Range<UInt64>) -> Bool { false }
    public func startFlushing() {}
}
