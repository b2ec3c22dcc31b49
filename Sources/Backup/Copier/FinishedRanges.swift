// Ranges of a disk that need no work any more, because an earlier copy has done it.
import Block

/// A set of ranges: sorted, apart from each other.
public struct FinishedRanges: Sendable, Equatable {
    /// The ranges, in order.
    public private(set) var ranges: [Range<UInt64>] = []

    /// No range.
    public init() {}

    /// Whether there is no range.
    public var isEmpty: Bool { ranges.isEmpty }

    /// Bytes in all ranges.
    public var byteCount: UInt64 { ranges.reduce(0) { $0 + $1.count64 } }

    /// Adds a range, which may overlap others.
    public mutating func insert(_ range: Range<UInt64>) {
        if range.isEmpty { return }
        var joined = range
        let first = ranges.firstIndex { $0.upperBound >= range.lowerBound } ?? ranges.count
        var end = first
        while end < ranges.count, ranges[end].lowerBound <= range.upperBound {
            joined = min(joined.lowerBound, ranges[end].lowerBound)..<max(joined.upperBound, ranges[end].upperBound)
            end += 1
        }
        ranges.replaceSubrange(first..<end, with: [joined])
    }

    /// What is left of items, which are in order, and the bytes that are not.
    func removed(from items: [CopyItem]) -> (left: [CopyItem], skipped: UInt64) {
        var left: [CopyItem] = []
        var skipped: UInt64 = 0
        var index = 0
        for item in items {
            while index < ranges.count, ranges[index].upperBound <= item.range.lowerBound { index += 1 }
            var start = item.range.lowerBound
            var next = index
            while next < ranges.count, ranges[next].lowerBound < item.range.upperBound {
                let part = ranges[next].clamped(to: start..<item.range.upperBound)
                if start < part.lowerBound { left.append(CopyItem(start..<part.lowerBound, item.kind)) }
                skipped += part.count64
                start = part.upperBound
                next += 1
            }
            if start < item.range.upperBound { left.append(CopyItem(start..<item.range.upperBound, item.kind)) }
        }
        return (left, skipped)
    }
}
