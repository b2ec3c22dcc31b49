// The order in which the chunks of a disk are looked at again, a few in each run, until all have been.

/// All chunks of a disk in an order that looks random, so that what was looked at is spread over the disk, and comes to
/// each chunk once in a round.
struct ChunkRotation {
    /// Chunks on the disk, at least 1.
    let count: UInt64
    private let step: UInt64
    private let start: UInt64

    /// The order for a number of chunks, at least 1; another for each seed.
    init(count: UInt64, seed: UInt64) {
        self.count = count
        // The golden section spreads neighbours in the order far from each other on the disk.
        var step = max(UInt64(Double(count) * 0.618_033_988_749_895), 1)
        while Self.commonDivisor(step, count) != 1 { step += 1 }
        self.step = step
        start = seed % count
    }

    /// The chunk at a place in the order. Places go on and on, round after round.
    func chunk(at place: UInt64) -> UInt64 {
        let product = (place % count).multipliedFullWidth(by: step % count)
        let (_, remainder) = count.dividingFullWidth((product.high, product.low))
        let (sum, overflow) = remainder.addingReportingOverflow(start)
        return overflow || sum >= count ? sum &- count : sum
    }

    private static func commonDivisor(_ a: UInt64, _ b: UInt64) -> UInt64 {
        var (a, b) = (a, b)
        while b != 0 { (a, b) = (b, a % b) }
        return a
    }
}
