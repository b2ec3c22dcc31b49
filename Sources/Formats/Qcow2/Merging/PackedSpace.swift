// Room for compressed clusters in an image that is changed in place: packed byte by byte into clusters of their own.
import Block

/// Packs compressed clusters into free clusters. The last one of a merge is not filled any further by the next.
struct PackedSpace {
    /// Clusters taken at a time.
    private static let clustersMax = 64
    private var free: Range<UInt64> = 0..<0
    /// The first cluster of the region that nothing is packed into yet.
    private var firstUnused: UInt64 = 0

    /// The offset for so many bytes, at most a cluster.
    mutating func take(_ length: Int, _ counts: ReferenceCounts) throws(BlockError) -> UInt64 {
        let length = UInt64(length)
        if free.count64 < length {
            try giveBack(counts)
            let run = try counts.allocate(Self.clustersMax)
            free = (run.lowerBound << Qcow2Profile.clusterBits)..<(run.upperBound << Qcow2Profile.clusterBits)
            firstUnused = run.lowerBound
        }
        let start = free.lowerBound
        free = (start + length)..<free.upperBound
        for cluster in (start >> Qcow2Profile.clusterBits)..<Qcow2Profile.clusters(start + length) {
            // The reference it was allocated with stands for the first compressed cluster in it.
            if cluster < firstUnused { try counts.add(cluster) } else { firstUnused = cluster + 1 }
        }
        return start
    }

    /// Gives back the clusters that nothing was packed into.
    mutating func giveBack(_ counts: ReferenceCounts) throws(BlockError) {
        for cluster in firstUnused..<max(firstUnused, free.upperBound >> Qcow2Profile.clusterBits) {
            try counts.release(cluster)
        }
        free = 0..<0
        firstUnused = 0
    }
}
