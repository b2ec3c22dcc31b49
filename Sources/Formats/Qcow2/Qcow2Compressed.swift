// Compressed clusters of a qcow2 image: where their bytes are, and how they are made whole.
import Block

extension Qcow2Header.Compression {
    /// How the bytes of a cluster are compressed.
    var unitCompression: UnitCompression {
        switch self {
        case .zlib: .deflate
        case .zstd: .zstd
        }
    }
}

extension Qcow2Image: CompressedUnits {
    var unitSize: UInt64 { header.clusterSize }

    func makeInflater() -> Inflater {
        Inflater(header.compression.unitCompression, inputMax: 2 * Int(header.clusterSize))
    }

    func compressedEntry(at position: UInt64) throws(BlockError) -> UInt64 {
        guard let run = try run(at: position, limit: position + 1, .blocking), run.kind == .compressed else {
            throw corrupt("the cluster at guest offset \(position) was compressed when it was mapped")
        }
        return run.host
    }

    /// - Parameter entry: the L2 entry without its flags: below bit x the offset, from there the count of further
    ///   512-byte sectors that the compressed bytes touch, x being 62 - (cluster bits - 8).
    func decompress(
        _ entry: UInt64, at position: UInt64, with inflater: Inflater, into target: UnsafeMutableRawBufferPointer
    ) throws(BlockError) {
        let split = 62 - (geometry.clusterBits - 8)
        let host = entry & ((1 << split) - 1)
        let sectors = (entry >> split) + 1
        guard host < lowerSize else {
            throw corrupt("the compressed cluster for guest offset \(position) lies past the end of the file")
        }
        // The file may end inside the last sector.
        let count = Int(min(sectors * 512 - (host & 511), lowerSize - host))
        do throws(BlockError) {
            let input = UnsafeMutableRawBufferPointer(rebasing: inflater.input.bytes[..<count])
            try lower.read(into: input, at: host)
        } catch { throw error.during("reading a compressed cluster of \(name)") }
        if let problem = try inflater.inflate(0..<count, into: target) {
            throw corrupt("the compressed cluster for guest offset \(position) is damaged: \(problem)")
        }
    }
}
