// One compressed cluster made whole: zlib and zstd with their working memory, kept for the next one.
import Block
import CZlib
import CZstd

/// Decompresses one cluster at a time.
final class Inflater {
    /// Where the compressed bytes go before they are decompressed.
    let input: Buffer
    private let compression: Qcow2Header.Compression
    private let zlib: UnsafeMutablePointer<z_stream>
    private var zlibIsReady = false
    private var zstd: OpaquePointer?

    /// Working memory for input of at most `inputMax` bytes.
    init(_ compression: Qcow2Header.Compression, inputMax: Int) {
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

    /// Decompresses the first `count` bytes of `input`, which may be followed by bytes that do not belong to them.
    ///
    /// - Returns: nil when they fill the output exactly, otherwise what is wrong with them.
    func inflate(_ count: Int, into output: UnsafeMutableRawBufferPointer) throws(BlockError) -> String? {
        switch compression {
        case .zlib: try inflateZlib(count, into: output)
        case .zstd: try inflateZstd(count, into: output)
        }
    }

    private func inflateZlib(_ count: Int, into output: UnsafeMutableRawBufferPointer) throws(BlockError) -> String? {
        if zlibIsReady {
            inflateReset(zlib)
        } else {
            // Negative: raw deflate. qemu writes with windows of 2^12; larger ones cost nothing but are accepted.
            guard inflateInit2_(zlib, -15, ZLIB_VERSION, Int32(MemoryLayout<z_stream>.size)) == Z_OK else {
                throw BlockError(.noMemory, "preparing to decompress a cluster")
            }
            zlibIsReady = true
        }
        zlib.pointee.next_in = input.bytes.baseAddress?.assumingMemoryBound(to: UInt8.self)
        zlib.pointee.avail_in = UInt32(count)
        zlib.pointee.next_out = output.baseAddress?.assumingMemoryBound(to: UInt8.self)
        zlib.pointee.avail_out = UInt32(output.count)
        let result = CZlib.inflate(zlib, Z_FINISH)
        let missing = Int(zlib.pointee.avail_out)
        switch result {
        case Z_STREAM_END: return missing == 0 ? nil : "it holds \(output.count - missing) bytes, fewer than a cluster"
        case Z_BUF_ERROR, Z_OK:
            return missing == 0 ? "it holds more than a cluster" : "it ends before its cluster is complete"
        case Z_MEM_ERROR: throw BlockError(.noMemory, "decompressing a cluster")
        default: return "it is no deflate stream"
        }
    }

    private func inflateZstd(_ count: Int, into output: UnsafeMutableRawBufferPointer) throws(BlockError) -> String? {
        if zstd == nil { zstd = ZSTD_createDCtx() }
        guard let zstd else { throw BlockError(.noMemory, "preparing to decompress a cluster") }
        // The frame's own length first: the entry knows it in sectors only. Decompressing whole frames needs no window,
        // so memory does not depend on what the frame claims.
        let frame = ZSTD_findFrameCompressedSize(input.bytes.baseAddress, count)
        if ZSTD_isError(frame) != 0 { return "it is no whole zstd frame" }
        let written = ZSTD_decompressDCtx(zstd, output.baseAddress, output.count, input.bytes.baseAddress, frame)
        if ZSTD_isError(written) != 0 { return "zstd says: \(String(cString: ZSTD_getErrorName(written)))" }
        return written == output.count ? nil : "it holds \(written) bytes, fewer than a cluster"
    }
}
