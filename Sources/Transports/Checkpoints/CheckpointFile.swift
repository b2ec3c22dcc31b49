// The file of one checkpoint: what is known of it, and one bit for each chunk that has changed since.
import Block
import FoundationEssentials
import Glibc
import LinuxIO

/// What a checkpoint's file says before its bits.
struct CheckpointHeader: Codable, Sendable {
    /// The checkpoint's name.
    var name: String
    /// When it was made, in seconds since 1970.
    var created: Int64
    /// Bytes of the disk.
    var size: UInt64
    /// Bytes that one bit stands for.
    var granularity = CheckpointFile.granularity
    /// Whether the bits are exact and final, or were when the disk was closed. Otherwise somebody records, or was
    /// killed while recording.
    var isClosed = false
    /// Why everything counts as changed; nil when the bits are what really changed.
    var allDirty: String?
    /// What the disk was when it was closed; only in the newest checkpoint.
    var identity: DiskIdentity?
    /// The SHA-256 of the bits, where they are final.
    var digest: String?
}

/// Reading and writing checkpoint files: a block of 8192 bytes (magic, the length of the JSON in 4 bytes little-endian,
/// the JSON, at the end the SHA-256 of all that in hexadecimal), then the bits, the first in the lowest bit.
enum CheckpointFile {
    /// Bytes that one bit stands for.
    static let granularity: UInt64 = 65536
    /// Bytes before the bits.
    static let headerSize = 8192
    private static let magic = Array("DGCBT001".utf8)
    private static let digestSize = 64

    private static func digest(_ bytes: ArraySlice<UInt8>) throws(BlockError) -> String {
        var digest = try Digest("SHA256")
        let memory = UnsafeMutableRawBufferPointer.allocate(byteCount: max(bytes.count, 1), alignment: 8)
        defer { memory.deallocate() }
        memory.copyBytes(from: bytes)
        try digest.update(UnsafeRawBufferPointer(rebasing: memory[..<bytes.count]))
        return try digest.finish()
    }

    /// The digest of a text.
    static func digest(ofText text: String) throws(BlockError) -> String { try digest(Array(text.utf8)[...]) }

    /// The bytes of a file.
    private static func encoded(_ header: CheckpointHeader, _ bits: DirtyBitmap) throws(BlockError) -> [UInt8] {
        var header = header
        let memory = UnsafeMutableRawBufferPointer.allocate(byteCount: max(bits.byteCount, 1), alignment: 8)
        defer { memory.deallocate() }
        bits.store(into: UnsafeMutableRawBufferPointer(rebasing: memory[..<bits.byteCount]))
        let words = Array(memory[..<bits.byteCount])
        header.digest = header.isClosed ? try digest(words[...]) : nil
        let encoder = JSONEncoder()
        encoder.outputFormatting = [.sortedKeys, .withoutEscapingSlashes]
        guard let json = try? encoder.encode(header), json.count <= headerSize - magic.count - 4 - digestSize else {
            throw BlockError(.tooLarge, "writing the checkpoint \(header.name): its header is too long")
        }
        var bytes = magic
        let count = UInt32(json.count)
        for shift in [0, 8, 16, 24] as [UInt32] { bytes.append(UInt8(truncatingIfNeeded: count >> shift)) }
        bytes += json
        bytes += [UInt8](repeating: 0, count: headerSize - digestSize - bytes.count)
        bytes += Array(try digest(bytes[...]).utf8)
        return bytes + words
    }

    /// Writes a whole file in one step: after a crash it is the old one or this one.
    ///
    /// - Throws: `BlockError` of the system's reason.
    static func write(_ path: String, _ header: CheckpointHeader, _ bits: DirtyBitmap) throws(BlockError) {
        do throws(BlockError) {
            try writeDurably(path, try encoded(header, bits))
        } catch { throw error.during("storing the checkpoint \(header.name)") }
    }

    /// Reads a file.
    ///
    /// - Returns: the header, and the bits where they are final.
    /// - Throws: `.corrupt` when it is damaged, or `BlockError` of the system's reason.
    static func read(_ path: String) throws(BlockError) -> (header: CheckpointHeader, bits: DirtyBitmap?) {
        let damaged = BlockError(.corrupt, "\(path) is damaged, or no checkpoint")
        let bytes = try readSmallFile(path, limit: headerSize + Int(DirtyBitmap.bitCountMax / 8))
        guard bytes.count >= headerSize, bytes.starts(with: magic) else { throw damaged }
        let end = headerSize - digestSize
        guard try digest(bytes[..<end]) == String(decoding: bytes[end..<headerSize], as: UTF8.self) else {
            throw damaged
        }
        let start = magic.count + 4
        let count = (0..<4).reduce(0) { $0 | Int(bytes[magic.count + $1]) << (8 * $1) }
        guard count <= end - start,
            let header = try? JSONDecoder().decode(
                CheckpointHeader.self, from: Data(bytes[start..<(start + count)]))
        else { throw damaged }
        guard header.isClosed else { return (header, nil) }
        let bits = try DirtyBitmap(size: header.size, granularity: header.granularity)
        let words = bytes[headerSize...]
        guard words.count == bits.byteCount, try digest(words) == header.digest else { throw damaged }
        let memory = UnsafeMutableRawBufferPointer.allocate(byteCount: max(words.count, 1), alignment: 8)
        defer { memory.deallocate() }
        memory.copyBytes(from: words)
        bits.load(UnsafeRawBufferPointer(rebasing: memory[..<words.count]))
        return (header, bits)
    }
}
