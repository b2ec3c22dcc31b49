// The suite's part about reading: every range, every alignment of offset, length and memory, nothing written beyond.
public import Block
import Glibc

/// The bytes of a device from an offset, read into memory that starts `shift` bytes behind an aligned address.
///
/// - Throws: also when anything outside the buffer was touched.
public func readBytes(_ device: any BlockDevice, at offset: UInt64, count: Int, shift: Int = 0) throws -> [UInt8] {
    let guarded = 64
    let buffer = Buffer(count: shift + count + guarded)
    buffer.bytes.initializeMemory(as: UInt8.self, repeating: 0xA5)
    let middle = UnsafeMutableRawBufferPointer(rebasing: buffer.bytes[shift..<(shift + count)])
    try device.read(into: middle, at: offset)
    try checkGuards(buffer, shift, count, "reading \(count) bytes at \(offset)")
    return Array(UnsafeRawBufferPointer(middle))
}

private func checkGuards(_ buffer: borrowing Buffer, _ shift: Int, _ count: Int, _ what: String) throws {
    let outside = [buffer.readable[..<shift], buffer.readable[(shift + count)...]]
    try require(outside.allSatisfy { $0.allSatisfy { $0 == 0xA5 } }, "\(what) wrote outside of the buffer")
}

extension DeviceConformance {
    func checkReads(_ subject: ConformanceSubject) throws {
        let device = subject.device
        try device.read(into: UnsafeMutableRawBufferPointer(start: nil, count: 0), at: 0)
        for (index, range) in ranges(of: device.info.size, random: 30).enumerated() {
            let shift = [0, 1, 512, 3, 4095][index % 5]
            let bytes = try readBytes(device, at: range.lowerBound, count: range.count, shift: shift)
            try requireEqual(
                bytes, subject.content[Int(range.lowerBound)..<Int(range.upperBound)], "reading \(range)",
                at: range.lowerBound)
        }
        device.prefetch(0..<device.info.size)
    }

    /// A resident read is right, or says that it is not.
    func checkResidentReads(_ subject: ConformanceSubject) throws {
        for range in ranges(of: subject.device.info.size, random: 10) {
            let count = range.count
            let buffer = Buffer(count: count + 64)
            buffer.bytes.initializeMemory(as: UInt8.self, repeating: 0xA5)
            let middle = UnsafeMutableRawBufferPointer(rebasing: buffer.bytes[..<count])
            if try subject.device.readResident(into: middle, at: range.lowerBound) {
                try requireEqual(
                    Array(UnsafeRawBufferPointer(middle)),
                    subject.content[Int(range.lowerBound)..<Int(range.upperBound)], "resident read of \(range)",
                    at: range.lowerBound)
            }
            try checkGuards(buffer, 0, count, "a resident read of \(range)")
        }
    }
}
