// A new stream-optimised VMDK as a copy's target: a file, or standard output.
public import Block
import Formats
import Glibc
import LinuxIO

/// A stream-optimised VMDK that is being written, from its first byte to its last.
public final class StreamOptimizedTarget: CopyTarget {
    public let name: String
    public let size: UInt64
    public let granularity = UInt64(StreamOptimizedWriter.grainBytes)
    public let pieceBytes = 1 << 20
    public let isSequential = true
    /// The file that is written; nil for standard output.
    let path: String?
    private let file: Descriptor?
    private let stream: StreamTarget
    private let writer: Locked<StreamOptimizedWriter>

    /// A target over a new file, which must not be there yet, or over standard output.
    ///
    /// - Parameters:
    ///   - path: of the file while it is written; nil for standard output.
    ///   - name: the file's path when it is complete.
    ///   - size: of the disk, in bytes.
    /// - Throws: `BlockError`: the file cannot be made, or the disk is too large.
    init(path: String?, name: String, size: UInt64) throws(BlockError) {
        self.path = path
        self.name = name
        self.size = size
        let file: Descriptor? =
            if let path { try Descriptor.open(path, O_RDWR | O_CREAT | O_EXCL) } else { nil }
        self.file = file
        let stream = StreamTarget(file?.number ?? STDOUT_FILENO, name: name, size: .max)
        self.stream = stream
        let written = Locked<UInt64>(0)
        let recorded = path == nil ? "disk.vmdk" : String(name.split(separator: "/").last ?? "disk.vmdk")
        do throws(BlockError) {
            writer = Locked(
                try StreamOptimizedWriter(size: size, name: recorded) { (bytes) throws(BlockError) in
                    let offset = written.withLock { (written) -> UInt64 in
                        defer { written += UInt64(bytes.count) }
                        return written
                    }
                    try stream.write(bytes, at: offset)
                })
        } catch {
            if let path { unlink(path) }
            throw error
        }
    }

    public func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws(BlockError) {
        try writer.withLock { (writer) throws(BlockError) in try writer.write(bytes, at: offset) }
    }

    public func zero(_ range: Range<UInt64>) throws(BlockError) {
        try writer.withLock { (writer) throws(BlockError) in try writer.zero(range) }
    }

    public func flush() throws(BlockError) { try stream.flush() }

    /// Writes what comes behind the disk's last byte, and makes all of it durable.
    func finish() throws(BlockError) {
        try writer.withLock { (writer) throws(BlockError) in try writer.finish() }
        try stream.flush()
    }

    /// Removes the file. Standard output is left as it is: somebody may still wait for its reader.
    func abandon() {
        guard let path else { return }
        writer.withLock { $0.abandon() }
        unlink(path)
    }
}
