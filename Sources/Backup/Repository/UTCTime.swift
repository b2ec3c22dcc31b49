// Moments as restore points have them: UTC, readable in names and manifests, with the calendar of retention.
import Glibc

/// A moment in UTC, to the millisecond.
public struct UTCTime: Sendable, Codable, Comparable, Hashable, CustomStringConvertible {
    /// Milliseconds since 1970-01-01T00:00:00Z.
    public let milliseconds: Int64

    /// A moment in seconds since 1970; what lies outside the years 1970 to 9999 becomes the nearest moment inside.
    public init(seconds: Double) {
        let latest = 253_402_300_799_999.0
        milliseconds = seconds.isFinite ? Int64(min(max((seconds * 1000).rounded(), 0), latest)) : 0
    }

    private init(milliseconds: Int64) { self.milliseconds = milliseconds }

    /// The moment of the call.
    public static var now: UTCTime {
        var time = timespec()
        clock_gettime(CLOCK_REALTIME, &time)
        return UTCTime(seconds: Double(time.tv_sec) + Double(time.tv_nsec) / 1e9)
    }

    /// Seconds since 1970.
    public var seconds: Double { Double(milliseconds) / 1000 }

    public static func < (left: UTCTime, right: UTCTime) -> Bool { left.milliseconds < right.milliseconds }

    /// 2026-11-21T04:20:00.125Z; without the fraction where it is zero.
    public var description: String {
        let part = calendar
        let fraction = milliseconds % 1000
        return "\(part.day)T\(two(part.hour)):\(two(part.minute)):\(two(part.second))"
            + (fraction == 0 ? "" : "." + padded(Int(fraction), 3)) + "Z"
    }

    /// 20261121T042000Z: for names of files.
    public var compact: String {
        let part = calendar
        let day = part.day.filter { $0 != "-" }
        return "\(day)T\(two(part.hour))\(two(part.minute))\(two(part.second))Z"
    }

    /// The year, as a number that grows.
    public var year: Int64 { Int64(calendar.year) }
    /// The month, as a number that grows.
    public var month: Int64 { Int64(calendar.year) * 12 + Int64(calendar.month) }
    /// The week, from Monday to Sunday, as a number that grows. (1970 began on a Thursday.)
    public var week: Int64 { (day + 3) / 7 }
    /// The day, counted from 1970-01-01.
    public var day: Int64 { milliseconds / 86_400_000 }

    private struct Calendar {
        var year: Int, month: Int, day: String, hour: Int, minute: Int, second: Int
    }

    private var calendar: Calendar {
        var seconds = time_t(milliseconds / 1000)
        var parts = tm()
        gmtime_r(&seconds, &parts)
        let (year, month) = (Int(parts.tm_year) + 1900, Int(parts.tm_mon) + 1)
        return Calendar(
            year: year, month: month, day: "\(padded(year, 4))-\(two(month))-\(two(Int(parts.tm_mday)))",
            hour: Int(parts.tm_hour), minute: Int(parts.tm_min), second: Int(parts.tm_sec))
    }

    /// Reads what `description` writes, and shorter forms of it: a date, or a date and a time without seconds, with or
    /// without the Z. What is left out is taken as late as it can be: a date means the end of its day.
    public init?(_ text: String) {
        var rest = text.utf8[...]
        func number(_ digits: Int, _ range: ClosedRange<Int>) -> Int? {
            let part = rest.prefix(digits)
            guard part.count == digits, part.allSatisfy({ (48...57).contains($0) }),
                let value = Int(String(decoding: part, as: UTF8.self)), range.contains(value)
            else { return nil }
            rest = rest.dropFirst(digits)
            return value
        }
        func take(_ character: Character) -> Bool {
            guard let first = rest.first, first == character.asciiValue else { return false }
            rest = rest.dropFirst()
            return true
        }
        guard let year = number(4, 1970...9999), take("-"), let month = number(2, 1...12), take("-"),
            let day = number(2, 1...31)
        else { return nil }
        var clock = (hour: 23, minute: 59, second: 59, millisecond: 999)
        if take("T") || take(" ") {
            guard let hour = number(2, 0...23), take(":"), let minute = number(2, 0...59) else { return nil }
            (clock.hour, clock.minute) = (hour, minute)
            if take(":") {
                guard let second = number(2, 0...60) else { return nil }
                clock.second = second
                if take(".") {
                    guard let fraction = number(3, 0...999) else { return nil }
                    clock.millisecond = fraction
                } else if take("Z") {
                    clock.millisecond = 0
                    guard rest.isEmpty else { return nil }
                    self.init(Self.milliseconds(year, month, day, clock))
                    return
                }
            }
            _ = take("Z")
        }
        guard rest.isEmpty else { return nil }
        self.init(Self.milliseconds(year, month, day, clock))
    }

    private init?(_ milliseconds: Int64?) {
        guard let milliseconds else { return nil }
        self.init(milliseconds: milliseconds)
    }

    /// nil for days that no month has.
    private static func milliseconds(
        _ year: Int, _ month: Int, _ day: Int, _ clock: (hour: Int, minute: Int, second: Int, millisecond: Int)
    ) -> Int64? {
        var parts = tm()
        parts.tm_year = Int32(year - 1900)
        parts.tm_mon = Int32(month - 1)
        parts.tm_mday = Int32(day)
        parts.tm_hour = Int32(clock.hour)
        parts.tm_min = Int32(clock.minute)
        parts.tm_sec = Int32(clock.second)
        let seconds = timegm(&parts)
        // The 31st of a shorter month has become a day of the next one.
        guard Int(parts.tm_mday) == day || clock.second == 60, seconds >= 0 else { return nil }
        return Int64(seconds) * 1000 + Int64(clock.millisecond)
    }

    public init(from decoder: any Decoder) throws {
        let text = try decoder.singleValueContainer().decode(String.self)
        guard let time = UTCTime(text) else {
            throw DecodingError.dataCorrupted(
                .init(codingPath: decoder.codingPath, debugDescription: "\(text) is no time in UTC"))
        }
        self = time
    }

    public func encode(to encoder: any Encoder) throws {
        var container = encoder.singleValueContainer()
        try container.encode(description)
    }
}

private func two(_ number: Int) -> String { padded(number, 2) }

/// A number with zeros in front, for names that sort as their numbers do.
func padded(_ number: Int, _ width: Int) -> String {
    let text = String(number)
    return text.count >= width ? text : String(repeating: "0", count: width - text.count) + text
}
