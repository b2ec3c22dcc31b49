// Which restore points are kept: a pure function of their times and order.
import Block

/// How many points are to stay, counted in five ways; a point stays when one of them keeps it.
public struct RetentionRule: Sendable, Equatable {
    /// The newest points.
    public var last = 0
    /// The newest point of each of so many days, weeks (from Monday), months and years that have points, in UTC.
    public var daily = 0
    public var weekly = 0
    public var monthly = 0
    public var yearly = 0

    /// A rule that keeps nothing.
    public init() {}

    /// Why points are kept, by their sequence numbers. Newer means of a greater number, whatever the clock said.
    ///
    /// - Parameter points: in the order they were made.
    func reasons(for points: [RestorePoint]) -> [Int: [String]] {
        var reasons: [Int: [String]] = [:]
        for point in points.suffix(last) { reasons[point.sequence, default: []].append("last") }
        func keep(_ count: Int, _ name: String, _ period: (UTCTime) -> Int64) {
            var seen: Set<Int64> = []
            for point in points.reversed() {
                if seen.count == count { return }
                if seen.insert(period(point.time)).inserted { reasons[point.sequence, default: []].append(name) }
            }
        }
        keep(daily, "daily", \.day)
        keep(weekly, "weekly", \.week)
        keep(monthly, "monthly", \.month)
        keep(yearly, "yearly", \.year)
        return reasons
    }

    /// - Throws: `.invalid` for a rule that keeps nothing, or counts below 0.
    func check() throws(BlockError) {
        let counts = [last, daily, weekly, monthly, yearly]
        if counts.contains(where: { $0 < 0 }) || counts.allSatisfy({ $0 == 0 }) {
            throw BlockError(.invalid, "pruning: say what to keep (--keep-last, --keep-daily, ...), at least one point")
        }
    }
}
