// Clusters made smaller: one zstd frame each, or none where it is not worth it.
import Block
import CZstd

/// Compresses one cluster at a time, with working memory that is kept.
final class ClusterCompressor {
    private let context: OpaquePointer
    private let level: Int32

    /// - Throws: `.noMemory`.
    init(level: Int) throws(BlockError) {
        guard let context = ZSTD_createCCtx() else { throw BlockError(.noMemory, "preparing to compress clusters") }
        self.context = context
        self.level = Int32(truncatingIfNeeded: level)
    }

    deinit { ZSTD_freeCCtx(context) }

    /// Compresses a whole cluster into the start of `output`.
    ///
    /// - Returns: the bytes used, at most `Qcow2Profile.payloadMax`; nil when it does not fit into so many.
    func compress(_ cluster: UnsafeRawBufferPointer, into output: UnsafeMutableRawBufferPointer) -> Int? {
        let capacity = min(output.count, Qcow2Profile.payloadMax)
        let length = ZSTD_compressCCtx(
            context, output.baseAddress, capacity, cluster.baseAddress, cluster.count, level)
        return ZSTD_isError(length) != 0 ? nil : length
    }
}
