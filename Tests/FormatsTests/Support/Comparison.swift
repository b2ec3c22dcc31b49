// Compares a disk with what qemu says it is: every byte, and what is allocated where.
import Block
import Foundation
import Testing

/// Reads part of a disk into memory that held something else before.
func readBytes(_ device: any BlockDevice, _ offset: UInt64, _ count: Int) throws -> [UInt8] {
    var bytes = [UInt8](repeating: 0xEE, count: count)
    try bytes.withUnsafeMutableBytes { try device.read(into: $0, at: offset) }
    return bytes
}

/// Compares the whole content of an image with qemu's conversion to raw, and its allocation and depth with qemu's map.
func expectSameAsQEMU(
    _ scratch: Scratch, _ image: String, _ device: any BlockDevice, depth: Bool = true,
    sourceLocation: SourceLocation = #_sourceLocation
) throws {
    try scratch.qemuImg("convert -f qcow2 -O raw \(image) expected.raw")
    let expected = try scratch.bytes("expected.raw")
    try expectSame(device, expected, sourceLocation: sourceLocation)
    try expectSameAllocation(scratch, image, device, expected, depth: depth, sourceLocation: sourceLocation)
}

/// Compares the whole content in large pieces, then many small unaligned ones.
func expectSame(_ device: any BlockDevice, _ expected: [UInt8], sourceLocation: SourceLocation = #_sourceLocation)
    throws
{
    #expect(device.info.size == UInt64(expected.count), sourceLocation: sourceLocation)
    guard device.info.size == UInt64(expected.count) else { return }
    func compare(_ offset: Int, _ count: Int) throws -> Bool {
        let bytes = try readBytes(device, UInt64(offset), count)
        let isSame = expected.withUnsafeBytes { all in
            bytes.withUnsafeBytes { read in
                UnsafeRawBufferPointer(rebasing: all[offset..<(offset + count)]).isSame(as: read)
            }
        }
        if !isSame {
            let first = zip(bytes, expected[offset...]).enumerated().first { $1.0 != $1.1 }?.offset ?? 0
            Issue.record(
                "\(count) bytes at \(offset): byte \(offset + first) differs", sourceLocation: sourceLocation)
        }
        return isSame
    }
    for offset in stride(from: 0, to: expected.count, by: 1 << 20) {
        if try !compare(offset, min(1 << 20, expected.count - offset)) { return }
    }
    var random = SplitMix(seed: 42)
    for _ in 0..<200 {
        let offset = Int.random(in: 0..<expected.count, using: &random)
        if try !compare(offset, min(Int.random(in: 1...20000, using: &random), expected.count - offset)) { return }
    }
}

extension UnsafeRawBufferPointer {
    /// Whether the bytes are the same. Quick in debug builds, too, unlike a loop.
    func isSame(as other: UnsafeRawBufferPointer) -> Bool {
        guard count == other.count else { return false }
        guard let a = baseAddress, let b = other.baseAddress else { return true }
        return memcmp(a, b, count) == 0
    }
}

/// A segment of `qemu-img map --output=json`.
struct MapSegment: Decodable {
    let start: UInt64
    let length: UInt64
    let depth: UInt32
    let present: Bool
    let zero: Bool
    let data: Bool
}

func qemuMap(_ scratch: Scratch, _ image: String, format: String = "qcow2") throws -> [MapSegment] {
    let text = try scratch.qemuImg("map -f \(format) --output=json \(image)")
    return try JSONDecoder().decode([MapSegment].self, from: Data(text.utf8))
}

/// What a context says of a whole disk, asked in pieces so that lists overflow.
func wholeStatus(_ device: any BlockDevice, _ context: StatusContext, capacity: Int = 5) throws -> [StatusExtent] {
    var all = StatusList(capacity: 1 << 20)
    var list = StatusList(capacity: capacity)
    var position: UInt64 = 0
    while position < device.info.size {
        list.removeAll()
        let end = try device.status(context, of: position..<device.info.size, into: &list)
        guard end > position, list.length == end - position else {
            throw BlockError(.inputOutput, "status at \(position) ended at \(end) with \(list.length) bytes")
        }
        for extent in list.extents { _ = all.append(extent.length, extent.value) }
        position = end
    }
    return all.extents
}

/// The value at an offset.
func value(_ extents: [StatusExtent], at offset: UInt64) -> UInt32? {
    var position: UInt64 = 0
    for extent in extents {
        position += extent.length
        if offset < position { return extent.value }
    }
    return nil
}

/// Compares at every place where either side changes. Where we know zeros that qemu calls data, they must be zeros.
func expectSameAllocation(
    _ scratch: Scratch, _ image: String, _ device: any BlockDevice, _ content: [UInt8], depth: Bool,
    format: String = "qcow2", sourceLocation: SourceLocation = #_sourceLocation
) throws {
    let ours = try wholeStatus(device, .allocation)
    let ourDepths = try wholeStatus(device, .depth)
    #expect(ours.reduce(0) { $0 + $1.length } == device.info.size, sourceLocation: sourceLocation)
    for segment in try qemuMap(scratch, image, format: format) {
        var places = Set([segment.start])
        var position: UInt64 = 0
        for extent in ours + ourDepths {
            if position >= device.info.size { position = 0 }
            if position > segment.start, position < segment.start + segment.length { places.insert(position) }
            position += extent.length
        }
        for place in places.sorted() {
            let flags = value(ours, at: place) ?? 99
            let isZero = flags & AllocationFlags.zero != 0
            if isZero, !segment.zero {
                #expect(content[Int(place)] == 0, "zero at \(place)", sourceLocation: sourceLocation)
            } else {
                #expect(isZero == segment.zero, "allocation at \(place): \(segment)", sourceLocation: sourceLocation)
            }
            if depth {
                let expected = segment.present ? segment.depth + 1 : 0
                #expect(
                    value(ourDepths, at: place) == expected, "depth at \(place): \(segment)",
                    sourceLocation: sourceLocation)
            }
        }
    }
}
