// Comparing bytes, with a message that says where and how they differ.
import Glibc

/// Whether two buffers of one length hold the same bytes.
public func areEqual(_ left: UnsafeRawBufferPointer, _ right: UnsafeRawBufferPointer) -> Bool {
    guard left.count == right.count else { return false }
    guard let a = left.baseAddress, let b = right.baseAddress else { return true }
    return memcmp(a, b, left.count) == 0
}

/// Throws, with the first difference and the bytes around it, unless both hold the same bytes.
///
/// - Parameter offset: where the buffers begin on the disk, for the message.
public func requireEqual(
    _ actual: [UInt8], _ expected: some Collection<UInt8>, _ what: @autoclosure () -> String, at offset: UInt64 = 0
) throws {
    let expected = Array(expected)
    if actual.withUnsafeBytes({ left in expected.withUnsafeBytes { areEqual(left, $0) } }) { return }
    throw CheckFailure("\(what()): \(differenceText(actual, expected, at: offset))")
}

/// Says how two arrays of bytes differ.
public func differenceText(_ actual: [UInt8], _ expected: [UInt8], at offset: UInt64 = 0) -> String {
    if actual.count != expected.count { return "\(actual.count) bytes where \(expected.count) were expected" }
    guard let first = actual.indices.first(where: { actual[$0] != expected[$0] }) else { return "no difference" }
    let count = actual.indices.reduce(0) { $0 + (actual[$1] == expected[$1] ? 0 : 1) }
    let shown = first..<min(first + 16, actual.count)
    return "\(count) of \(actual.count) bytes differ, the first at \(offset + UInt64(first)): "
        + "\(hex(actual[shown])) where \(hex(expected[shown])) was expected"
}

/// Bytes in hexadecimal.
public func hex(_ bytes: some Sequence<UInt8>) -> String {
    bytes.map { ($0 < 16 ? "0" : "") + String($0, radix: 16) }.joined()
}

/// Whether all bytes are zero.
public func areZeros(_ bytes: ArraySlice<UInt8>) -> Bool {
    bytes.withUnsafeBytes { (bytes: UnsafeRawBufferPointer) -> Bool in
        guard let start = bytes.baseAddress, bytes[0] == 0 else { return bytes.isEmpty }
        // Each byte equals the one before it, and the first is zero.
        return memcmp(start, start + 1, bytes.count - 1) == 0
    }
}

/// Bytes that are not zero, differ from place to place and follow from the seed.
public func patternBytes(_ count: Int, seed: UInt64) -> [UInt8] {
    [UInt8](unsafeUninitializedCapacity: count) { buffer, initialized in
        var generator = SeededGenerator(seed: seed)
        var done = 0
        while done < count {
            var word = generator.next() | 0x0101_0101_0101_0101
            let part = min(8, count - done)
            if let target = buffer.baseAddress { memcpy(target + done, &word, part) }
            done += part
        }
        initialized = count
    }
}
