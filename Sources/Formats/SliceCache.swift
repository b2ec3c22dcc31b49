// A bounded cache of mapping tables in slices of up to 4 KiB: what makes a map over known metadata cost nanoseconds.
import Block
import Glibc

/// Slices of tables of 64-bit words, in host byte order, found by number.
///
/// Set-associative; the least recently used slice of a set makes room. Sets share 16 locks that are held for
/// nanoseconds only, never while anything is read. Plain memory behind pointers, so that a hit counts no references.
final class SliceCache: @unchecked Sendable {
    // Sendable because all memory that changes is only touched under the lock of its set.

    /// Slices that compete for the same places.
    private static let ways = 8
    private static let lockCount = 16
    /// Bytes from lock to lock, so that no two share a cache line.
    private static let lockStride = 64

    /// Words in a slice.
    let sliceWords: Int
    private let setMask: UInt64
    private let words: UnsafeMutablePointer<UInt64>
    /// Slice number + 1 of each place; 0 where it is empty.
    private let tags: UnsafeMutablePointer<UInt64>
    /// When each place was used last, by its set's clock.
    private let lastUse: UnsafeMutablePointer<UInt64>
    private let clocks: UnsafeMutablePointer<UInt64>
    private let locks: UnsafeMutableRawPointer

    /// An empty cache for slices of `sliceWords` words in about `bytes` bytes of memory, and no more than `sliceCount`
    /// slices would need.
    init(sliceWords: Int, sliceCount: UInt64, bytes: Int) {
        self.sliceWords = sliceWords
        let wanted = min(UInt64(max(bytes / (sliceWords * 8), 1)), max(sliceCount, 1))
        var sets: UInt64 = 1
        while sets * UInt64(Self.ways) < wanted { sets *= 2 }
        setMask = sets - 1
        let places = Int(sets) * Self.ways
        // Memory that is never touched is never there, so a large cache over a small image costs nothing.
        words = .allocate(capacity: places * sliceWords)
        tags = .allocate(capacity: places)
        tags.initialize(repeating: 0, count: places)
        lastUse = .allocate(capacity: places)
        lastUse.initialize(repeating: 0, count: places)
        clocks = .allocate(capacity: Int(sets))
        clocks.initialize(repeating: 0, count: Int(sets))
        locks = .allocate(byteCount: Self.lockCount * Self.lockStride, alignment: Self.lockStride)
        for index in 0..<Self.lockCount {
            let lock = (locks + index * Self.lockStride).bindMemory(to: pthread_mutex_t.self, capacity: 1)
            lock.initialize(to: pthread_mutex_t())
            pthread_mutex_init(lock, nil)
        }
    }

    deinit {
        for index in 0..<Self.lockCount { pthread_mutex_destroy(lock(index)) }
        locks.deallocate()
        words.deallocate()
        tags.deallocate()
        lastUse.deallocate()
        clocks.deallocate()
    }

    @inline(__always)
    private func lock(_ set: Int) -> UnsafeMutablePointer<pthread_mutex_t> {
        (locks + (set & (Self.lockCount - 1)) * Self.lockStride).assumingMemoryBound(to: pthread_mutex_t.self)
    }

    /// Runs the body on the words of a slice, if it is here. The body must not keep the pointer, nor wait.
    @inline(__always)
    func withSlice<R>(_ number: UInt64, _ body: (UnsafePointer<UInt64>) -> R) -> R? {
        let set = Int(truncatingIfNeeded: number & setMask)
        let lock = lock(set)
        pthread_mutex_lock(lock)
        defer { pthread_mutex_unlock(lock) }
        let first = set &* Self.ways
        let tags = tags + first
        for way in 0..<Self.ways where tags[way] == number &+ 1 {
            touch(set, first &+ way)
            return body(UnsafePointer(words + (first &+ way) &* sliceWords))
        }
        return nil
    }

    @inline(__always)
    private func touch(_ set: Int, _ place: Int) {
        clocks[set] &+= 1
        lastUse[place] = clocks[set]
    }

    /// Keeps a copy of a slice of `sliceWords` words; replaces the one that was not used for longest.
    func insert(_ number: UInt64, _ slice: UnsafePointer<UInt64>) {
        let set = Int(truncatingIfNeeded: number & setMask)
        let lock = lock(set)
        pthread_mutex_lock(lock)
        defer { pthread_mutex_unlock(lock) }
        let first = set * Self.ways
        var victim = first
        for place in first..<(first + Self.ways) {
            if tags[place] == number + 1 {
                victim = place
                break
            }
            if lastUse[place] < lastUse[victim] { victim = place }
        }
        (words + victim * sliceWords).update(from: slice, count: sliceWords)
        tags[victim] = number + 1
        touch(set, victim)
    }
}
