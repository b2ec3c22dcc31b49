// A target that writes nothing and compares instead: the copier reads the source once more, and this the copy.
import Block
import Glibc

/// What a comparison has found.
public struct VerifyResult: Sendable {
    /// Bytes compared.
    public var bytes: UInt64 = 0
    /// The first byte that differs; nil when all are equal.
    public var firstDifference: UInt64?
    /// Pieces with a difference in them, of 64 KiB at most.
    public var differences: UInt64 = 0
}

/// Compares what is written to it with a disk.
final class VerifyTarget: CopyTarget {
    let name: String
    let size: UInt64
    let granularity: UInt64
    let isSequential = false
    private let copy: any BlockDevice
    private let state = Locked(VerifyResult())
    private static let pieceMax = 65536

    init(_ copy: any BlockDevice) {
        self.copy = copy
        name = copy.info.name
        size = copy.info.size
        granularity = UInt64(copy.info.minimumBlock)
    }

    /// What was found so far.
    var result: VerifyResult { state.withLock { $0 } }

    func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws(BlockError) {
        let buffer = Buffer(count: Self.pieceMax)
        var done = 0
        while done < bytes.count {
            let count = min(Self.pieceMax, bytes.count - done)
            let piece = UnsafeMutableRawBufferPointer(rebasing: buffer.bytes[..<count])
            try copy.read(into: piece, at: offset + UInt64(done))
            compare(
                UnsafeRawBufferPointer(piece), UnsafeRawBufferPointer(rebasing: bytes[done..<(done + count)]),
                at: offset + UInt64(done))
            done += count
        }
    }

    func zero(_ range: Range<UInt64>) throws(BlockError) {
        // What the copy itself calls a hole needs no reading.
        var list = StatusList(capacity: 256)
        var position = range.lowerBound
        while position < range.upperBound {
            list.removeAll()
            let end = try copy.status(.allocation, of: position..<range.upperBound, into: &list)
            if end <= position || end > range.upperBound {
                throw BlockError(.inputOutput, "verifying \(name): it does not tell its holes at \(position)")
            }
            for extent in list.extents {
                if extent.value & AllocationFlags.zero == 0 { try readZeros(position..<(position + extent.length)) }
                state.withLock { $0.bytes += extent.value & AllocationFlags.zero == 0 ? 0 : extent.length }
                position += extent.length
            }
        }
    }

    private func readZeros(_ range: Range<UInt64>) throws(BlockError) {
        let buffer = Buffer(count: Self.pieceMax)
        var position = range.lowerBound
        while position < range.upperBound {
            let count = Int(min(UInt64(Self.pieceMax), range.upperBound - position))
            let piece = UnsafeMutableRawBufferPointer(rebasing: buffer.bytes[..<count])
            try copy.read(into: piece, at: position)
            compare(
                UnsafeRawBufferPointer(piece), UnsafeRawBufferPointer(rebasing: ZeroPage.bytes[..<count]), at: position)
            position += UInt64(count)
        }
    }

    private func compare(_ copy: UnsafeRawBufferPointer, _ source: UnsafeRawBufferPointer, at offset: UInt64) {
        var difference: UInt64?
        if let left = copy.baseAddress, let right = source.baseAddress, memcmp(left, right, copy.count) != 0 {
            difference = copy.indices.first { copy[$0] != source[$0] }.map { offset + UInt64($0) }
        }
        state.withLock { (result) in
            result.bytes += UInt64(copy.count)
            guard let difference else { return }
            result.differences += 1
            result.firstDifference = min(result.firstDifference ?? .max, difference)
        }
    }

    func flush() throws(BlockError) {}
}
