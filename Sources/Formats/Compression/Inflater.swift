// One compressed unit of an image made whole: zlib and zstd with their working memory, kept for the next one.
import Block
import CZlib
import CZstd

/// How a unit of an image is compressed.
enum UnitCompression: Sendable {
    /// Deflate without anything around it (qcow2).
    case deflate
    /// Deflate with zlib's header and checksum (VMDK).
    case zlib
    /// One zstd frame (qcow2).
    case zstd
}

/// Decompresses one unit at a time.
final class Inflater {
    /// Where the compressed bytes go before they are decompressed.
    let input: Buffer
    private let compression: UnitCompression
    private let zlib: UnsafeMutablePointer<z_stream>
    private var zlibIsReady = false
    private var zstd: OpaquePointer?

    /// Working memory for input of at most `inputMax` bytes.
    init(_ compression: UnitCompression, inputMax: Int) {
        self.compression = compression
        input = Buffer(count: inputMax)
        zlib = .allocate(capacity: 1)
        zlib.initialize(to: z_stream())
    }

    deinit {
        if zlibIsReady { inflateEnd(zlib) }
        zlib.deallocate()
        if let zstd { ZSTD_freeDCtx(zstd) }
    }

    /// Decompresses bytes of `input`, which may be followed by bytes that do not belong to them.
    ///
    /// - Parameters:
    ///   - range: where they are in `input`.
    ///   - least: the bytes that there have to be; nil for as many as the output takes. What is missing then is zeros.
    /// - Returns: nil when they fill the output so far and no farther than its end, otherwise what is wrong with them.
    func inflate(_ range: Range<Int>, into output: UnsafeMutableRawBufferPointer, least: Int? = nil)
        throws(BlockError) -> String?
    {
        let least = least ?? output.count
        switch compression {
        case .deflate, .zlib: return try inflateZlib(range, into: output, least)
        case .zstd: return try inflateZstd(range, into: output, least)
        }
    }

    private func inflateZlib(_ range: Range<Int>, into output: UnsafeMutableRawBufferPointer, _ least: Int)
        throws(BlockError) -> String?
    {
        if zlibIsReady {
            inflateReset(zlib)
        } else {
            // Negative: raw deflate. qemu writes with windows of 2^12; larger ones cost nothing but are accepted.
            let windowBits: Int32 = compression == .zlib ? 15 : -15
            guard inflateInit2_(zlib, windowBits, ZLIB_VERSION, Int32(MemoryLayout<z_stream>.size)) == Z_OK else {
                throw BlockError(.noMemory, "preparing to decompress")
            }
            zlibIsReady = true
        }
        zlib.pointee.next_in =
            input.bytes.baseAddress?.advanced(by: range.lowerBound).assumingMemoryBound(to: UInt8.self)
        zlib.pointee.avail_in = UInt32(range.count)
        zlib.pointee.next_out = output.baseAddress?.assumingMemoryBound(to: UInt8.self)
        zlib.pointee.avail_out = UInt32(output.count)
        let result = CZlib.inflate(zlib, Z_FINISH)
        let missing = Int(zlib.pointee.avail_out)
        switch result {
        case Z_STREAM_END: return filled(output, output.count - missing, least)
        case Z_BUF_ERROR, Z_OK:
            return missing == 0 ? "it holds more than it should" : "it ends before it is complete"
        case Z_MEM_ERROR: throw BlockError(.noMemory, "decompressing")
        default: return compression == .zlib ? "it is no zlib stream" : "it is no deflate stream"
        }
    }

    private func inflateZstd(_ range: Range<Int>, into output: UnsafeMutableRawBufferPointer, _ least: Int)
        throws(BlockError) -> String?
    {
        if zstd == nil { zstd = ZSTD_createDCtx() }
        guard let zstd else { throw BlockError(.noMemory, "preparing to decompress") }
        let start = input.bytes.baseAddress.map { $0 + range.lowerBound }
        // The frame's own length first: the entry knows it in sectors only. Decompressing whole frames needs no window,
        // so memory does not depend on what the frame claims.
        let frame = ZSTD_findFrameCompressedSize(start, range.count)
        if ZSTD_isError(frame) != 0 { return "it is no whole zstd frame" }
        let written = ZSTD_decompressDCtx(zstd, output.baseAddress, output.count, start, frame)
        if ZSTD_isError(written) != 0 { return "zstd says: \(String(cString: ZSTD_getErrorName(written)))" }
        return filled(output, written, least)
    }

    /// Zeros for what the bytes do not fill, where they need not.
    private func filled(_ output: UnsafeMutableRawBufferPointer, _ count: Int, _ least: Int) -> String? {
        if count < least { return "it holds \(count) bytes, fewer than \(least)" }
        UnsafeMutableRawBufferPointer(rebasing: output[count...]).initializeMemory(as: UInt8.self, repeating: 0)
        return nil
    }
}
