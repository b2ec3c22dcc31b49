// What holds for every device, checked on whatever an input made of one.
public import Block
import Glibc

/// A map covers what it says: in order, without gaps, not past the end of what was asked.
///
/// - Returns: the end of what is covered; nil when the device refused.
@discardableResult
public func checkMap(_ device: any BlockDevice, _ range: Range<UInt64>, _ patience: Patience) -> UInt64? {
    var extents = ExtentList(capacity: 64)
    guard let end = try? device.map(range, patience, into: &extents) else { return nil }
    require(end >= range.lowerBound && end <= range.upperBound, "a map of \(range) ends at \(end)")
    require(extents.length == end - range.lowerBound, "a map to \(end) of \(range) covers \(extents.length) bytes")
    require(patience == .resident || end > range.lowerBound, "a map of \(range) covers nothing")
    for index in 0..<extents.count { require(extents[index].length > 0, "an extent of no bytes") }
    return end
}

/// A status covers what it says, as a map does.
public func checkStatus(_ device: any BlockDevice, _ context: StatusContext, _ range: Range<UInt64>) {
    var list = StatusList(capacity: 64)
    guard let end = try? device.status(context, of: range, into: &list) else { return }
    require(end > range.lowerBound && end <= range.upperBound, "a status of \(range) ends at \(end)")
    let length = list.extents.reduce(0) { $0 + $1.length }
    require(length == end - range.lowerBound, "a status to \(end) of \(range) covers \(length) bytes")
}

/// Whether two buffers hold the same bytes.
public func areEqual(_ left: UnsafeRawBufferPointer, _ right: UnsafeRawBufferPointer) -> Bool {
    guard left.count == right.count, let a = left.baseAddress, let b = right.baseAddress else {
        return left.isEmpty && right.isEmpty
    }
    return memcmp(a, b, left.count) == 0
}

/// A range reads the same at once and in two parts, and fails at once if a part fails.
public func checkRead(_ device: any BlockDevice, _ range: Range<UInt64>) {
    let whole = Buffer(count: Int(range.count64))
    let parts = Buffer(count: Int(range.count64))
    let middle = whole.bytes.count / 3
    let canReadWhole = (try? device.read(into: whole.bytes, at: range.lowerBound)) != nil
    let first = UnsafeMutableRawBufferPointer(rebasing: parts.bytes[..<middle])
    let second = UnsafeMutableRawBufferPointer(rebasing: parts.bytes[middle...])
    let canReadParts =
        (try? device.read(into: first, at: range.lowerBound)) != nil
        && (try? device.read(into: second, at: range.lowerBound + UInt64(middle))) != nil
    require(canReadWhole == canReadParts, "\(range) can be read at once: \(canReadWhole), in parts: \(canReadParts)")
    if canReadWhole {
        require(
            areEqual(whole.readable, parts.readable), "\(range) reads differently at once and in parts")
    }
}
