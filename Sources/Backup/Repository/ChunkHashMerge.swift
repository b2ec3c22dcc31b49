// The hashes of a merged restore point, from those of the base and of the child that was merged into it.
import Block
import LinuxIO

extension ChunkHashes {
    /// Writes the hash file of a base that a child was merged into: the child's chunks, and the base's where the child
    /// has none. Durable on return.
    ///
    /// - Parameters:
    ///   - path: where; must not be there yet, and gets its final name from the caller.
    ///   - base: the path of the hashes of the image below.
    ///   - child: the path of the hashes of the image that was merged; the disk's size is the child's.
    /// - Throws: what reading and writing throws; the file may then be there in part.
    static func merge(base: String, child: String, into path: String) throws(BlockError) {
        let base = try open(base)
        let child = try open(child)
        var output = try ChunkHashFile(creating: path, diskSize: child.diskSize)
        try forEachSegment(base, child) { (run, _) throws(BlockError) in
            try output.add(first: run.first, count: run.count, isZero: run.hash == nil)
        }
        try output.endRuns()
        let buffer = Buffer(count: 256 << 10)
        let most = UInt64(buffer.bytes.count / hashBytes)
        try forEachSegment(base, child) { (run, source) throws(BlockError) in
            guard var hash = run.hash else { return }
            let end = hash + run.count
            while hash < end {
                let count = min(most, end - hash)
                let part = UnsafeMutableRawBufferPointer(rebasing: buffer.bytes[..<(Int(count) * hashBytes)])
                try source.readHashes(hash, into: part)
                try output.add(hashes: UnsafeRawBufferPointer(part))
                hash += count
            }
        }
        try output.finish()
    }

    /// Goes through the runs of both in order; where both have chunks, those of the child count.
    private static func forEachSegment(
        _ base: ChunkHashes, _ child: ChunkHashes, _ body: (Run, ChunkHashes) throws(BlockError) -> Void
    ) throws(BlockError) {
        var lower = base.runs()
        var upper = child.runs()
        var below = try lower.next()
        var position: UInt64 = 0
        let end = chunks(child.diskSize)
        while true {
            let above = try upper.next()
            let limit = above?.first ?? end
            // The base's chunks up to the child's next ones.
            while let run = below, position < limit {
                if run.end > position && run.first < limit {
                    let first = max(run.first, position)
                    let part = Run(
                        first: first, count: min(run.end, limit) - first,
                        hash: run.hash.map { $0 + (first - run.first) })
                    try body(part, base)
                }
                if run.end > limit { break }
                below = try lower.next()
            }
            guard let above else { return }
            try body(above, child)
            position = above.end
        }
    }
}
