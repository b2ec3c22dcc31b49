// The hashes that a disk's chunks have at a point: looked up from the newest sidecar of its chain to the oldest.
import Block

/// The sidecars of a chain, the newest first.
struct HashChain: Sendable {
    private let layers: [(hashes: ChunkHashes, link: ChainLink)]

    /// Opens the sidecars of a chain.
    ///
    /// - Throws: `BlockError` when one cannot be read or is corrupt.
    init(_ links: [ChainLink]) throws(BlockError) {
        var layers: [(hashes: ChunkHashes, link: ChainLink)] = []
        for link in links { layers.append((try ChunkHashes.open(link.hashes), link)) }
        self.layers = layers
    }

    /// The hash that a chunk has, and the link that holds it; zeros, and nil, where none does.
    func expected(_ chunk: UInt64) throws(BlockError) -> (hash: ChunkHash, link: ChainLink?) {
        for layer in layers {
            let hash = try layer.hashes.hash(of: chunk)
            if hash != .absent { return (hash, layer.link) }
        }
        return (.zero, nil)
    }

    /// What one sidecar says of a chunk, the newest being 0.
    func own(_ chunk: UInt64, at index: Int) throws(BlockError) -> ChunkHash {
        try layers[index].hashes.hash(of: chunk)
    }

    /// What is known of a chunk in the point's own file: its sidecar says, and that of a point whose file has become
    /// this one's while it is being removed.
    func own(_ chunk: UInt64) throws(BlockError) -> ChunkHash {
        for (index, layer) in layers.enumerated() {
            if index > 0 && !(layer.link.isDoomed && layer.link.data == nil) { break }
            let hash = try layer.hashes.hash(of: chunk)
            if hash != .absent { return hash }
        }
        return .absent
    }
}

/// Hashes chunks: those of the disk's end as if zeros followed, so that a disk can grow.
struct ChunkHasher: ~Copyable {
    private let padded = Buffer(count: Int(ChunkHashes.chunkSize))

    /// The hash of a chunk, or of the part of it that the disk has.
    func hash(of bytes: UnsafeRawBufferPointer) -> ChunkHash {
        guard bytes.count < padded.bytes.count else { return ChunkHash(of: bytes) }
        padded.bytes.initializeMemory(as: UInt8.self, repeating: 0)
        padded.bytes.copyMemory(from: bytes)
        return ChunkHash(of: padded.readable)
    }
}
