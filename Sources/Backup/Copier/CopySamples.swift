// When a copy goes on after a break, pieces of what is done are compared: another snapshot may have the same name.
import Block
import Glibc
import NBD

/// Compares pieces of what an earlier copy has done with the source.
enum CopySamples {
    private static let pieceMax: UInt64 = 65536
    /// Pieces next to the end of what is done, and as many all over it.
    private static let countMax = 8
    /// More ranges are thinned out.
    private static let rangesMax = 65536

    /// Looks where data was copied: holes are the same in all snapshots.
    ///
    /// - Parameters:
    ///   - done: what is copied, from 0.
    ///   - granularity: of the target.
    ///   - doing: what is going on, for people: "resuming".
    /// - Throws: `.denied` when a piece differs, or what reading throws.
    static func check(
        _ copy: any BlockDevice, _ done: Range<UInt64>, against source: CopySource, changed: String?,
        granularity: UInt64, doing: String
    ) throws(BlockError) {
        let context = try changed.map { (name) throws(BlockError) in try source.changedContext(name) }
        let block = max(granularity, UInt64(source.remote?.agreement.blockSizes.minimum ?? 1))
        var plan = CopyPlan(source.device, changed: context, granularity: block)
        let left = Buffer(count: Int(pieceMax))
        let right = Buffer(count: Int(pieceMax))
        for piece in pieces(of: try dataRanges(&plan, in: done)) {
            let one = UnsafeMutableRawBufferPointer(rebasing: left.bytes[..<Int(piece.count64)])
            let other = UnsafeMutableRawBufferPointer(rebasing: right.bytes[..<Int(piece.count64)])
            try copy.read(into: one, at: piece.lowerBound)
            try source.device.read(into: other, at: piece.lowerBound)
            guard let a = one.baseAddress, let b = other.baseAddress, memcmp(a, b, one.count) == 0 else {
                throw BlockError(
                    .denied,
                    "\(doing), the copy to \(copy.info.name): what was copied at \(piece.lowerBound) is not what "
                        + "\(source.device.info.name) has there now: it is another snapshot, or it is being changed; "
                        + "make a whole copy anew with --force")
            }
        }
    }

    /// Where the plan has data, in a range that begins at 0.
    private static func dataRanges(_ plan: inout CopyPlan, in done: Range<UInt64>) throws(BlockError)
        -> [Range<UInt64>]
    {
        var ranges: [Range<UInt64>] = []
        while !plan.isDone && plan.settledEnd < done.upperBound {
            var items: [CopyItem] = []
            try plan.next(into: &items)
            for item in items where item.kind == .data {
                let range = item.range.clamped(to: done)
                if !range.isEmpty { ranges.append(range) }
            }
            if ranges.count > rangesMax {
                let last = ranges.count - countMax
                ranges = ranges.indices.filter { $0 % 2 == 0 || $0 >= last }.map { ranges[$0] }
            }
        }
        return ranges
    }

    /// Pieces of ranges: the last ones, and some all over them.
    static func pieces(of ranges: [Range<UInt64>]) -> [Range<UInt64>] {
        var pieces: [Range<UInt64>] = []
        for range in ranges.reversed() {
            var end = range.upperBound
            while end > range.lowerBound && pieces.count < countMax {
                let start = end - min(pieceMax, end - range.lowerBound)
                pieces.append(start..<end)
                end = start
            }
            if pieces.count == countMax { break }
        }
        let total = ranges.reduce(0) { $0 + $1.count64 }
        let step = total / UInt64(countMax)
        var before: UInt64 = 0
        var next: UInt64 = 0
        for range in ranges {
            while next < before + range.count64 && pieces.count < 2 * countMax {
                // Blocks are not cut: the range begins with a whole one.
                let start = range.lowerBound + (next - before) / pieceMax * pieceMax
                pieces.append(start..<min(start + pieceMax, range.upperBound))
                next += max(step, 1)
            }
            before += range.count64
        }
        return pieces
    }
}
