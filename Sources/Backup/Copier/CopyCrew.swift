// What the workers of a copy share: the queue that the plan fills, the way to the target, and what is done.
import Block
import Glibc
import LinuxIO
import NBD

/// A part of the plan that one worker carries out.
struct CopySegment {
    /// Who it is, among the segments that are not finished.
    let id: UInt64
    let range: Range<UInt64>
    let kind: CopyItem.Kind
}

/// The shared state of a copy's workers.
final class CopyCrew: @unchecked Sendable {
    // Sendable because everything that changes is touched under `lock`.

    /// The most bytes of data, and of zeros, in one segment: small enough for all workers to have some, and for a stop
    /// not to take long.
    static let dataMax: UInt64 = 4 << 20
    static let zeroMax: UInt64 = 256 << 20

    /// What a worker gets when it asks for work.
    enum Answer {
        case work(CopySegment)
        /// Others are planning; ask again after doing something else.
        case later
        /// Nothing is left.
        case nothing
    }

    let source: CopySource
    let target: any CopyTarget
    let options: CopyOptions
    /// Told when the copy is to end, whether it failed or was cancelled.
    let stop = Cancellation()
    private let skipsZeros: Bool
    private let zeroUnit: Int
    private let lock = Lock()
    private let changed = Condition()
    // Whoever plans touches it, of whom there is one at a time.
    private var plan: CopyPlan
    // Under the lock.
    private var isPlanning = false
    private var isPlanned = false
    private var queue: [CopyItem] = []
    private var nextItem = 0
    private var open: [(id: UInt64, start: UInt64, left: UInt64)] = []
    private var nextID: UInt64 = 0
    private var settled: UInt64 = 0
    private var workers = 0
    private var writers = 0
    private var helpers = 0
    private var isAbandoned = false
    private var failure: BlockError?
    private var progress = CopyProgress()
    private var paidSeconds = 0.0

    init(_ source: CopySource, _ changed: StatusContext?, _ target: any CopyTarget, _ options: CopyOptions) {
        self.source = source
        self.target = target
        self.options = options
        skipsZeros = target.readsAsZeros && changed == nil && !target.isSequential
        let block = max(target.granularity, UInt64(source.remote?.agreement.blockSizes.minimum ?? 1))
        zeroUnit = Int(max(block, 32768))
        plan = CopyPlan(source.device, changed: changed, granularity: block)
        progress.size = source.device.info.size
    }

    // MARK: - Work

    /// The next part of the plan.
    ///
    /// - Parameter mayWait: whether to wait while others plan.
    func take(mayWait: Bool) -> Answer {
        lock.lock()
        defer { lock.unlock() }
        while true {
            if stop.isCancelled || failure != nil { return .nothing }
            if nextItem < queue.count { return .work(cut()) }
            if isPlanned { return .nothing }
            if isPlanning {
                if !mayWait { return .later }
                changed.wait(holding: lock)
                continue
            }
            planOn()
        }
    }

    /// The first part of the queue's next item, as a segment; the lock is held.
    private func cut() -> CopySegment {
        let item = queue[nextItem]
        let step = item.kind == .data ? Self.dataMax : Self.zeroMax
        // Cut at multiples, so that neighbours meet where file systems like it.
        let end = min(item.range.upperBound, (item.range.lowerBound / step + 1) * step)
        if end == item.range.upperBound { nextItem += 1 } else { queue[nextItem].range = end..<item.range.upperBound }
        let segment = CopySegment(id: nextID, range: item.range.lowerBound..<end, kind: item.kind)
        nextID += 1
        open.append((segment.id, segment.range.lowerBound, segment.range.count64))
        return segment
    }

    /// Refills the queue, without the lock while the source is asked; the lock is held.
    private func planOn() {
        isPlanning = true
        var items: [CopyItem] = []
        swap(&items, &queue)
        items.removeAll(keepingCapacity: true)
        nextItem = 0
        lock.unlock()
        let result = Result { () throws(BlockError) in try plan.next(into: &items) }
        lock.lock()
        isPlanning = false
        isPlanned = plan.isDone
        settled = plan.settledEnd
        if !options.finished.isEmpty {
            let (left, skipped) = options.finished.removed(from: items)
            items = left
            progress.doneBytes += skipped
            progress.resumedBytes += skipped
        }
        queue = items
        progress.planDataBytes = plan.dataBytes
        progress.planZeroBytes = plan.zeroBytes
        progress.isPlanned = isPlanned
        if case .failure(let error) = result { setFailure(error) }
        changed.broadcast()
    }

    /// Notes that a part of a segment is done.
    private func finish(_ segment: CopySegment, _ count: UInt64) {
        guard let index = open.firstIndex(where: { $0.id == segment.id }) else { return }
        open[index].left -= min(count, open[index].left)
        if open[index].left == 0 { open.swapAt(index, open.count - 1) }
        if open.last?.left == 0 { open.removeLast() }
        progress.doneBytes += count
    }

    /// Everything before this offset is on the target, or needed no work.
    var settledEnd: UInt64 {
        lock.withLock {
            var end = settled
            if nextItem < queue.count { end = min(end, queue[nextItem].range.lowerBound) }
            // While somebody plans, what was settled before counts.
            for segment in open { end = min(end, segment.start) }
            return end
        }
    }

    // MARK: - The way to the target

    /// Whether a call of the target may begin; if so, `endCall` follows.
    private func beginCall() throws(BlockError) {
        try lock.withLock { () throws(BlockError) in
            if isAbandoned || stop.isCancelled { throw failure ?? BlockError(.shutdown, "the copy was told to stop") }
            writers += 1
        }
    }

    private func endCall() {
        lock.withLock {
            writers -= 1
            if writers == 0 && stop.isCancelled { changed.broadcast() }
        }
    }

    /// Brings bytes that were read to the target, zeros among them as zeros.
    ///
    /// - Throws: what the target says, or that the copy has ended.
    func deliver(_ bytes: UnsafeRawBufferPointer, at offset: UInt64, of segment: CopySegment) throws(BlockError) {
        try beginCall()
        defer { endCall() }
        let range = offset..<(offset + UInt64(bytes.count))
        var zeroBytes: UInt64 = 0
        if options.detectsZeros && !target.isSequential {
            zeroBytes = try deliverSparsely(bytes, at: offset)
        } else {
            try target.write(bytes, at: offset)
        }
        lock.withLock {
            progress.readBytes += range.count64
            progress.writtenBytes += range.count64 - zeroBytes
            if skipsZeros { progress.skippedBytes += zeroBytes } else { progress.zeroedBytes += zeroBytes }
            finish(segment, range.count64)
        }
        options.observer?.finished(range, .data)
    }

    /// Writes what is not zero.
    ///
    /// - Returns: bytes that are zero.
    private func deliverSparsely(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws(BlockError) -> UInt64 {
        var zeroBytes: UInt64 = 0
        var start = 0
        var isZero = false
        var position = 0
        while position <= bytes.count {
            // Pieces begin at multiples of the unit on the disk, where the target wants that.
            let left = zeroUnit - Int((offset + UInt64(position)) & UInt64(zeroUnit - 1))
            let end = min(position + left, bytes.count)
            let isNextZero = position < bytes.count && bytes.isZero(position..<end)
            if position == bytes.count || (isNextZero != isZero && position > start) {
                if isZero {
                    let range = (offset + UInt64(start))..<(offset + UInt64(position))
                    if !skipsZeros { try target.zero(range) }
                    zeroBytes += range.count64
                } else if position > start {
                    try target.write(
                        UnsafeRawBufferPointer(rebasing: bytes[start..<position]), at: offset + UInt64(start))
                }
                start = position
            }
            if position == bytes.count { break }
            isZero = isNextZero
            position = end
        }
        return zeroBytes
    }

    /// Makes a part of a segment zero on the target.
    ///
    /// - Throws: what the target says, or that the copy has ended.
    func deliverZeros(_ range: Range<UInt64>, of segment: CopySegment) throws(BlockError) {
        try beginCall()
        defer { endCall() }
        if !skipsZeros { try target.zero(range) }
        lock.withLock {
            if skipsZeros {
                progress.skippedBytes += range.count64
            } else {
                progress.zeroedBytes += range.count64
            }
            finish(segment, range.count64)
        }
        options.observer?.finished(range, .zero)
    }

    /// Lets the target share the blocks of a file, where it can.
    ///
    /// - Returns: whether it does.
    func deliverClone(of file: FileRef, from offset: UInt64, to range: Range<UInt64>, of segment: CopySegment)
        throws(BlockError) -> Bool
    {
        try beginCall()
        defer { endCall() }
        guard target.clone(file, from: offset, to: range) else { return false }
        lock.withLock {
            progress.clonedBytes += range.count64
            finish(segment, range.count64)
        }
        options.observer?.finished(range, .data)
        return true
    }

    // MARK: - Rate, failures, ends

    /// Waits until so many bytes more may be read.
    func pay(_ bytes: UInt64) {
        guard let rate = options.bytesPerSecondMax, rate > 0 else { return }
        let due = lock.withLock { () -> Double in
            paidSeconds = max(paidSeconds, monotonicSeconds() - 0.1) + Double(bytes) / Double(rate)
            return paidSeconds
        }
        while !stop.isCancelled {
            let wait = due - monotonicSeconds()
            if wait <= 0 { return }
            usleep(UInt32(min(wait, 0.05) * 1e6))
        }
    }

    /// Counts one more try to read something.
    func countRetry() { lock.withLock { progress.retries += 1 } }

    /// Counts a connection that was made in place of a lost one.
    func countReconnect() { lock.withLock { progress.reconnects += 1 } }

    /// Ends the copy with an error; the first one counts.
    func fail(_ error: BlockError) {
        lock.withLock { setFailure(error) }
        stop.cancel()
        lock.withLock { changed.broadcast() }
    }

    private func setFailure(_ error: BlockError) {
        if failure == nil && !stop.isCancelled { failure = error }
    }

    /// Why the copy has failed.
    var error: BlockError? { lock.withLock { failure } }

    /// Whether there is nothing left to do for one more worker; the lock is held.
    private var isOver: Bool { stop.isCancelled || failure != nil || (isPlanned && nextItem == queue.count) }

    /// Somebody makes a connection for one more worker.
    ///
    /// - Returns: false when there is nothing left to do.
    func beginHelping() -> Bool {
        lock.withLock {
            if isOver { return false }
            helpers += 1
            return true
        }
    }

    /// The connection is made, or will not be.
    func endHelping() {
        lock.withLock {
            helpers -= 1
            changed.broadcast()
        }
    }

    /// Waits until nobody is making a connection any more, which takes some seconds at most.
    func waitForHelpers() {
        lock.withLock {
            while helpers > 0 { changed.wait(holding: lock) }
        }
    }

    /// A worker begins.
    ///
    /// - Returns: false when there is nothing left to do.
    func join() -> Bool {
        lock.withLock {
            if isOver { return false }
            workers += 1
            progress.workers = max(progress.workers, workers)
            return true
        }
    }

    /// A worker ends.
    func leave() {
        lock.withLock {
            workers -= 1
            changed.broadcast()
        }
    }

    /// Waits until all workers have left, or for a time.
    ///
    /// - Returns: whether all have left.
    func wait(seconds: Double) -> Bool {
        lock.withLock {
            let end = monotonicNanoseconds() + UInt64(seconds * 1e9)
            while workers > 0 && monotonicNanoseconds() < end {
                _ = changed.wait(holding: lock, until: end)
            }
            return workers == 0
        }
    }

    /// Keeps workers that wait for their source from the target, and waits for calls of the target that are under way.
    func abandonWorkers() {
        lock.withLock {
            isAbandoned = true
            // A reader that has stopped reading would hold up a stream forever, and nothing is lost with it.
            while writers > 0 && !target.isSequential { changed.wait(holding: lock) }
        }
    }

    /// How far the copy is.
    var current: CopyProgress { lock.withLock { progress } }
}

extension UnsafeRawBufferPointer {
    /// Whether a part of the bytes is zero.
    func isZero(_ part: Range<Int>) -> Bool {
        guard let start = baseAddress.map({ $0 + part.lowerBound }), !part.isEmpty else { return true }
        // Data shows in its first bytes, nearly always.
        let head = Swift.min(16, part.count)
        for index in 0..<head where start.load(fromByteOffset: index, as: UInt8.self) != 0 { return false }
        if part.count == head { return true }
        return memcmp(start, start + 1, part.count - 1) == 0
    }
}
