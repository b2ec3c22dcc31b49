// One bit per chunk of a disk: changed or not, copied up or not. Bits are set by many threads without locks.
import Synchronization

/// A bitmap over the chunks of a disk.
///
/// Setting, clearing and reading bits are atomic each, and a set bit is seen with everything that was written to
/// memory before it was set.
public final class DirtyBitmap: @unchecked Sendable {
    // Sendable because the words are atomics.

    /// Bytes on the disk.
    public let size: UInt64
    /// Bytes that one bit stands for, a power of two from 512 to 2^31.
    public let granularity: UInt64
    /// Bits in the bitmap: the disk's size in chunks, rounded up.
    public let bitCount: Int
    private let shift: UInt64
    private let words: UnsafeMutablePointer<Atomic<UInt64>>
    private let wordCount: Int

    /// The most bits a bitmap may have: 2^36, which is 4 PiB of disk at 64 KiB, in 8 GiB of memory.
    public static let bitCountMax: UInt64 = 1 << 36

    /// A bitmap with all bits clear.
    ///
    /// - Throws: `.invalid` when the granularity is no power of two in its range, `.tooLarge` beyond `bitCountMax`.
    public init(size: UInt64, granularity: UInt64) throws(BlockError) {
        guard granularity >= 512, granularity <= 1 << 31, granularity.nonzeroBitCount == 1 else {
            throw BlockError(
                .invalid, "making a dirty bitmap: granularity \(granularity) is no power of two from 512 to 2^31")
        }
        let bits = size / granularity + (size % granularity == 0 ? 0 : 1)
        guard bits <= Self.bitCountMax else {
            throw BlockError(.tooLarge, "making a dirty bitmap of \(bits) bits: choose a larger granularity")
        }
        self.size = size
        self.granularity = granularity
        shift = UInt64(granularity.trailingZeroBitCount)
        bitCount = Int(bits)
        wordCount = Int((bits + 63) / 64)
        words = .allocate(capacity: max(wordCount, 1))
        for index in 0..<max(wordCount, 1) { (words + index).initialize(to: Atomic(0)) }
    }

    deinit {
        words.deinitialize(count: max(wordCount, 1))
        words.deallocate()
    }

    /// The chunk that an offset below `size` lies in.
    public func chunk(of offset: UInt64) -> Int { Int(offset >> shift) }

    /// Whether a chunk's bit is set. `chunk` is below `bitCount`.
    public func isSet(_ chunk: Int) -> Bool {
        precondition(chunk >= 0 && chunk < bitCount)
        return words[chunk >> 6].load(ordering: .acquiring) & (1 << UInt64(chunk & 63)) != 0
    }

    /// Sets one chunk's bit. `chunk` is below `bitCount`.
    public func set(_ chunk: Int) {
        precondition(chunk >= 0 && chunk < bitCount)
        _ = words[chunk >> 6].bitwiseOr(1 << UInt64(chunk & 63), ordering: .acquiringAndReleasing)
    }

    /// Sets the bits of all chunks that a range of bytes touches. The range lies inside the disk.
    public func set(_ range: Range<UInt64>) {
        change(range) { word, mask in _ = words[word].bitwiseOr(mask, ordering: .acquiringAndReleasing) }
    }

    /// Clears the bits of all chunks that a range of bytes touches. The range lies inside the disk.
    public func clear(_ range: Range<UInt64>) {
        change(range) { word, mask in _ = words[word].bitwiseAnd(~mask, ordering: .acquiringAndReleasing) }
    }

    private func change(_ range: Range<UInt64>, _ apply: (Int, UInt64) -> Void) {
        precondition(range.upperBound <= size)
        if range.isEmpty { return }
        var bit = chunk(of: range.lowerBound)
        let end = chunk(of: range.upperBound - 1) + 1
        while bit < end {
            let word = bit >> 6
            let low = UInt64(bit & 63)
            let count = UInt64(min(end - bit, 64 - Int(low)))
            let ones: UInt64 = count == 64 ? .max : (1 << count) - 1
            apply(word, ones << low)
            bit += Int(count)
        }
    }

    /// The run of equal bits that starts at `chunk`: their value, and its end, at most `limit`, at most `bitCount`.
    ///
    /// Value and end come from one look at each word, so that a bit that changes meanwhile never lends its new value to
    /// neighbours that do not have it. A run is at least one chunk long.
    @inline(__always)
    func run(from chunk: Int, limit: Int) -> (isSet: Bool, end: Int) {
        precondition(chunk >= 0 && chunk < limit && limit <= bitCount)
        var bit = chunk
        var word = words[bit >> 6].load(ordering: .acquiring)
        let isSet = word & (1 << UInt64(bit & 63)) != 0
        while true {
            // Bits that differ from the run's value become ones; the first of them ends it.
            let differing = (isSet ? ~word : word) >> UInt64(bit & 63)
            if differing != 0 { return (isSet, min(limit, bit + differing.trailingZeroBitCount)) }
            bit = (bit | 63) + 1
            if bit >= limit { return (isSet, limit) }
            word = words[bit >> 6].load(ordering: .acquiring)
        }
    }

    /// Calls a body for each run of equal bits, as ranges of bytes inside `range`, which is not empty, until the body
    /// takes less than a whole run, or the range is done.
    ///
    /// - Returns: the end of what the body took.
    @inline(__always)
    func forEachRun(
        _ range: Range<UInt64>, _ body: (Range<UInt64>, _ isSet: Bool) throws(BlockError) -> UInt64
    ) throws(BlockError) -> UInt64 {
        var position = range.lowerBound
        let limit = chunk(of: range.upperBound - 1) + 1
        while position < range.upperBound {
            let (isSet, runEnd) = run(from: chunk(of: position), limit: limit)
            let end = runEnd == limit ? range.upperBound : UInt64(runEnd) << shift
            let done = try body(position..<end, isSet)
            if done < end { return done }
            position = end
        }
        return position
    }

    /// Whether the bits of all chunks that a range touches are set. The range lies inside the disk and is not empty.
    public func isAllSet(_ range: Range<UInt64>) -> Bool {
        let limit = chunk(of: range.upperBound - 1) + 1
        let first = run(from: chunk(of: range.lowerBound), limit: limit)
        return first.isSet && first.end == limit
    }

    /// Bytes that the bits take in `store` and `load`: whole words of 64.
    public var byteCount: Int { wordCount * 8 }

    /// Copies the bits, the first in the lowest bit of the first byte. The memory has `byteCount` bytes.
    public func store(into bytes: UnsafeMutableRawBufferPointer) {
        precondition(bytes.count == byteCount)
        for index in 0..<wordCount {
            let word = words[index].load(ordering: .acquiring).littleEndian
            bytes.storeBytes(of: word, toByteOffset: index * 8, as: UInt64.self)
        }
    }

    /// Sets the bits that are set in bytes from `store`; those past the disk's end are left out.
    public func load(_ bytes: UnsafeRawBufferPointer) {
        precondition(bytes.count == byteCount)
        for index in 0..<wordCount {
            var word = bytes.littleEndian(index * 8, as: UInt64.self)
            let used = bitCount - index * 64
            if used < 64 { word &= (1 << UInt64(used)) - 1 }
            if word != 0 { _ = words[index].bitwiseOr(word, ordering: .acquiringAndReleasing) }
        }
    }

    /// The number of set bits.
    public var setCount: Int {
        var count = 0
        for index in 0..<wordCount { count += words[index].load(ordering: .relaxed).nonzeroBitCount }
        return count
    }

    /// Sets every bit that is set in another bitmap of the same size and granularity.
    ///
    /// - Throws: `.invalid` when size or granularity differ.
    public func merge(_ other: DirtyBitmap) throws(BlockError) {
        guard other.size == size, other.granularity == granularity else {
            throw BlockError(.invalid, "merging dirty bitmaps: their sizes or granularities differ")
        }
        for index in 0..<wordCount {
            let more = other.words[index].load(ordering: .acquiring)
            if more != 0 { _ = words[index].bitwiseOr(more, ordering: .acquiringAndReleasing) }
        }
    }

    /// Appends what the bitmap says of a range to a status list: 1 for set, 0 for clear.
    ///
    /// - Returns: the end of what was appended, less than the range's end when the list is full.
    public func status(of range: Range<UInt64>, into list: inout StatusList) -> UInt64 {
        precondition(range.upperBound <= size)
        if range.isEmpty { return range.upperBound }
        var position = range.lowerBound
        let limit = chunk(of: range.upperBound - 1) + 1
        while position < range.upperBound {
            let (isSet, runEnd) = run(from: chunk(of: position), limit: limit)
            let end = runEnd == limit ? range.upperBound : UInt64(runEnd) << shift
            if !list.append(end - position, isSet ? 1 : 0) { return position }
            position = end
        }
        return position
    }
}
