// Numbers and columns as reports show them to people.

/// A number of bytes for people, for example "1.5 GiB".
public func readable(_ bytes: UInt64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"]
    var value = Double(bytes)
    var unit = 0
    while value >= 1024 && unit < units.count - 1 {
        value /= 1024
        unit += 1
    }
    let tenths = Int((value * 10).rounded())
    return unit == 0 || tenths % 10 == 0
        ? "\(tenths / 10) \(units[unit])" : "\(tenths / 10).\(tenths % 10) \(units[unit])"
}

/// A number with so many digits behind the point, from 0 to 9.
public func decimals(_ value: Double, _ digits: Int) -> String {
    var scale: Int64 = 1
    for _ in 0..<min(max(digits, 0), 9) { scale *= 10 }
    guard value.isFinite, abs(value) < 1e9 else { return "\(value)" }
    let whole = Int64((abs(value) * Double(scale)).rounded())
    let rest = "\(whole % scale)"
    let behind = scale == 1 ? "" : "." + String(repeating: "0", count: "\(scale)".count - 1 - rest.count) + rest
    return "\(value < 0 && whole > 0 ? "-" : "")\(whole / scale)\(behind)"
}

extension String {
    /// The text, with spaces behind it up to a width in characters.
    public func padded(_ width: Int) -> String {
        count >= width ? self : self + String(repeating: " ", count: width - count)
    }

    /// The text, with spaces in front of it up to a width in characters.
    public func paddedLeft(_ width: Int) -> String {
        count >= width ? self : String(repeating: " ", count: width - count) + self
    }
}
