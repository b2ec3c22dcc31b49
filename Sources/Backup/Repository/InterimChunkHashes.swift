// Hashes of chunks in memory and in a text file, until the binary sidecar of bounded memory takes this place.
import Block
import LinuxIO
import CXXHash

enum ChunkHash: Equatable {
    case absent, zero, data(UInt64, UInt64)
    init(of bytes: UnsafeRawBufferPointer) {
        if !bytes.contains(where: { $0 != 0 }) { self = .zero; return }
        let h = XXH3_128bits(bytes.baseAddress, bytes.count)
        self = .data(h.high64, h.low64)
    }
}
final class ChunkHashWriter: Sendable {
    let map = Locked<[UInt64: ChunkHash]>([:]); let path: String
    init(path: String, diskSize: UInt64) throws(BlockError) { self.path = path }
    func record(_ c: UInt64, _ b: UnsafeRawBufferPointer) throws(BlockError) {
        let h = ChunkHasher().hash(of: b); map.withLock { $0[c] = h }
    }
    func recordZeros(_ r: Range<UInt64>) throws(BlockError) { map.withLock { for c in r { $0[c] = .zero } } }
    func finish() throws(BlockError) { try ChunkHashes.save(map.withLock { $0 }, path) }
}
final class ChunkHashes: Sendable {
    static let chunkSize: UInt64 = 65536
    let map: [UInt64: ChunkHash]
    init(_ m: [UInt64: ChunkHash]) { map = m }
    static func save(_ m: [UInt64: ChunkHash], _ path: String) throws(BlockError) {
        var s = ""
        for (c, h) in m.sorted(by: { $0.key < $1.key }) {
            if case .data(let a, let b) = h { s += "\(c) \(a) \(b)\n" } else { s += "\(c) 0 0\n" }
        }
        try writeDurably(path, Array(s.utf8))
    }
    static func open(_ path: String) throws(BlockError) -> ChunkHashes {
        var m: [UInt64: ChunkHash] = [:]
        for line in String(decoding: try readSmallFile(path, limit: 1 << 30), as: UTF8.self).split(separator: "\n") {
            let p = line.split(separator: " ").map { UInt64($0) ?? 0 }
            m[p[0]] = p[1] == 0 && p[2] == 0 ? .zero : .data(p[1], p[2])
        }
        return ChunkHashes(m)
    }
    func hash(of c: UInt64) throws(BlockError) -> ChunkHash { map[c] ?? .absent }
    static func merge(base: String, child: String, into: String) throws(BlockError) {
        try save(try open(base).map.merging(try open(child).map) { $1 }, into)
    }
}
