// A file in memory whose machine loses power after so many operations: what was not synced is there in parts only.
import Block
@testable import Formats

final class SimulatedFile: ImageFile, @unchecked Sendable {
    // Sendable because tests use it from one thread at a time.

    private enum Operation {
        case write([UInt8], UInt64)
        case discard(Range<UInt64>)
    }

    static let pageSize = 65536
    let name = "simulated file"
    let isDirect = false
    /// Pages of content, all operations done; pages that are missing are zeros.
    private var pages: [UInt64: [UInt8]] = [:]
    private var length: UInt64
    /// The same as the last sync left it.
    private var durablePages: [UInt64: [UInt8]] = [:]
    private var durableLength: UInt64
    private var unsynced: [Operation] = []
    /// Operations until the power goes.
    var operationsLeft = Int.max
    private(set) var operations = 0

    init(_ bytes: [UInt8]) {
        length = UInt64(bytes.count)
        durableLength = length
        for start in stride(from: 0, to: bytes.count, by: Self.pageSize) {
            let part = Array(bytes[start..<min(start + Self.pageSize, bytes.count)])
            pages[UInt64(start / Self.pageSize)] = part + [UInt8](repeating: 0, count: Self.pageSize - part.count)
        }
        durablePages = pages
    }

    func size() throws(BlockError) -> UInt64 { length }

    func read(into bytes: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(BlockError) {
        var done = 0
        while done < bytes.count {
            let (page, inside, part) = piece(offset + UInt64(done), bytes.count - done)
            let target = UnsafeMutableRawBufferPointer(rebasing: bytes[done..<(done + part)])
            if let known = pages[page] {
                known.withUnsafeBytes { target.copyMemory(from: .init(rebasing: $0[inside..<(inside + part)])) }
            } else {
                target.initializeMemory(as: UInt8.self, repeating: 0)
            }
            done += part
        }
    }

    private func piece(_ offset: UInt64, _ count: Int) -> (UInt64, Int, Int) {
        let inside = Int(offset % UInt64(Self.pageSize))
        return (offset / UInt64(Self.pageSize), inside, min(count, Self.pageSize - inside))
    }

    private func countOperation() throws(BlockError) {
        if operationsLeft == 0 { throw BlockError(.inputOutput, "the power is gone") }
        operationsLeft -= 1
        operations += 1
    }

    func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws(BlockError) {
        try countOperation()
        unsynced.append(.write(Array(bytes), offset))
        store(bytes, at: offset)
    }

    func discard(_ range: Range<UInt64>) throws(BlockError) {
        try countOperation()
        unsynced.append(.discard(range))
        erase(range)
    }

    func flush() throws(BlockError) {
        try countOperation()
        durablePages = pages
        durableLength = length
        unsynced = []
    }

    private func store(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) {
        var done = 0
        while done < bytes.count {
            let (page, inside, part) = piece(offset + UInt64(done), bytes.count - done)
            let from = UnsafeRawBufferPointer(rebasing: bytes[done..<(done + part)])
            pages[page, default: [UInt8](repeating: 0, count: Self.pageSize)].withUnsafeMutableBytes {
                UnsafeMutableRawBufferPointer(rebasing: $0[inside..<(inside + part)]).copyMemory(from: from)
            }
            done += part
        }
        length = max(length, offset + UInt64(bytes.count))
    }

    private func erase(_ range: Range<UInt64>) {
        for page in (range.lowerBound / UInt64(Self.pageSize))..<(range.upperBound / UInt64(Self.pageSize)) {
            pages[page] = nil
        }
    }

    /// The power goes and comes back: each operation since the last sync was done, or not, or in some sectors only.
    func losePower(_ random: inout SplitMix) {
        let lost = unsynced
        unsynced = []
        operationsLeft = .max
        pages = durablePages
        length = durableLength
        for operation in lost {
            let fate = Int.random(in: 0..<3, using: &random)
            if fate == 0 { continue }
            switch operation {
            case .discard(let range): erase(range)
            case .write(let bytes, let offset):
                bytes.withUnsafeBytes { all in
                    if fate == 1 { return store(all, at: offset) }
                    var start = 0
                    while start < all.count {
                        let end = min(start + 512 - Int((offset + UInt64(start)) % 512), all.count)
                        if Bool.random(using: &random) {
                            store(.init(rebasing: all[start..<end]), at: offset + UInt64(start))
                        }
                        start = end
                    }
                }
            }
        }
        durablePages = pages
        durableLength = length
    }

    /// All of the file; for small ones.
    var bytes: [UInt8] {
        var all = [UInt8](repeating: 0, count: Int(length))
        all.withUnsafeMutableBytes { bytes in try? read(into: bytes, at: 0) }
        return all
    }
}
