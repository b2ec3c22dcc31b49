// What a writable device held at one moment: its own bytes where they have not changed since, kept copies elsewhere.
import Synchronization

/// A read-only view of a `TrackedDevice` at the moment the view was made.
///
/// A chunk's bit is set after its old bytes are in the scratch and before the device below changes; the map's version
/// moves in between. Who read from below and finds the same version afterwards has read the old bytes.
public final class SnapshotDevice: BlockDevice {
    public let info: DeviceInfo
    private let base: any BlockDevice
    private let scratch: any BlockDevice
    private let copied: DirtyBitmap
    /// The map's version; its highest bit says that the snapshot has ended, so that both change in one step: who finds
    /// the bit changes the device below without copying.
    private let version = Atomic<UInt64>(0)
    private let copiedChunks = Atomic<UInt64>(0)
    private let locks: [Lock]
    private let mayGrow: @Sendable () throws(BlockError) -> Void
    private let onFailure: @Sendable (BlockError) -> Void
    private let ending = Locked<BlockError?>(nil)
    private let bitmaps = Locked<[DirtyBitmap]>([])

    /// Chunks between two questions whether there is room for more.
    private static let growStep: UInt64 = 16
    private static let endedBit: UInt64 = 1 << 63

    init(
        _ base: any BlockDevice, scratch: any BlockDevice, locks: [Lock], bitmaps: [String],
        mayGrow: @escaping @Sendable () throws(BlockError) -> Void,
        onFailure: @escaping @Sendable (BlockError) -> Void
    ) throws(BlockError) {
        var info = base.info
        if scratch.info.size < info.size {
            throw BlockError(.invalid, "making a snapshot of \(info.name): its scratch space is too small")
        }
        info.isReadOnly = true
        info.writesArePrompt = false
        info.canZeroFast = false
        info.canDiscard = false
        info.dirtyBitmaps = bitmaps
        info.name = "snapshot of \(info.name)"
        self.info = info
        self.base = base
        self.scratch = scratch
        self.locks = locks
        self.mayGrow = mayGrow
        self.onFailure = onFailure
        copied = try DirtyBitmap(size: info.size, granularity: TrackedDevice.chunkSize)
    }

    /// Brings the dirty bitmaps, in the order of their names; they change no more.
    public func freeze(_ bitmaps: [DirtyBitmap]) {
        precondition(bitmaps.count == info.dirtyBitmaps.count && bitmaps.allSatisfy { $0.size == info.size })
        self.bitmaps.withLock { $0 = bitmaps }
    }

    /// Why the snapshot can be read no more; nil while it can.
    public var failure: BlockError? { hasEnded ? ending.withLock { $0 } : nil }

    private var hasEnded: Bool { version.load(ordering: .sequentiallyConsistent) & Self.endedBit != 0 }

    /// Bytes that were copied for the snapshot; zeros take no room.
    public var copiedBytes: UInt64 { copiedChunks.load(ordering: .relaxed) &* TrackedDevice.chunkSize }

    /// Gives the scratch space back. Only after the snapshot has ended.
    ///
    /// - Throws: `BlockError` when the storage below refuses.
    public func giveScratchBack() throws(BlockError) {
        precondition(hasEnded)
        try scratch.discard(0..<scratch.info.size, durable: false)
    }

    // MARK: - For the tracked device

    /// Whether a chunk is still to be copied before it changes.
    func needs(_ chunk: Int) -> Bool { !copied.isSet(chunk) && !hasEnded }

    /// Whether any chunk that a range touches is.
    func needs(_ range: Range<UInt64>) -> Bool { !copied.isAllSet(range) && !hasEnded }

    /// Keeps what a chunk held. The caller holds the chunk's lock.
    func keep(_ chunk: Int, _ bytes: UnsafeRawBufferPointer) {
        do throws(BlockError) {
            let isZero = bytes.allSatisfy { $0 == 0 }
            if !isZero {
                let count = copiedChunks.wrappingAdd(1, ordering: .relaxed).oldValue
                if count % Self.growStep == 0 { try mayGrow() }
                try scratch.write(bytes, at: UInt64(chunk) * TrackedDevice.chunkSize, durable: false)
            }
            copied.set(chunk)
            version.wrappingAdd(1, ordering: .sequentiallyConsistent)
        } catch { fail(error) }
    }

    /// Lets nobody read any more, because something could not be kept: bytes below are about to be newer.
    func fail(_ reason: BlockError) {
        let text = "the snapshot is broken: keeping what \(base.info.name) held: \(reason.message)"
        if end(BlockError(.inputOutput, text)) { onFailure(reason) }
    }

    /// Lets nobody read any more.
    ///
    /// - Returns: whether it had not ended before.
    func end(_ reason: BlockError) -> Bool {
        ending.withLock { ending in
            if ending != nil { return false }
            ending = reason
            version.bitwiseOr(Self.endedBit, ordering: .sequentiallyConsistent)
            return true
        }
    }

    private func requireAlive() throws(BlockError) {
        if let failure { throw failure }
    }

    // MARK: - Reading

    public var mapVersion: UInt64 {
        // What was read before is not to be read after this, on processors that reorder loads.
        atomicMemoryFence(ordering: .acquiring)
        return version.load(ordering: .sequentiallyConsistent) &+ base.mapVersion
    }

    public func map(_ range: Range<UInt64>, _ patience: Patience, into extents: inout ExtentList) throws(BlockError)
        -> UInt64
    {
        try requireAlive()
        return try copied.forEachRun(range) { (part, isCopied) throws(BlockError) -> UInt64 in
            try (isCopied ? scratch : base).map(part, patience, into: &extents)
        }
    }

    /// Holds the locks of the chunks: nobody copies them meanwhile, so nobody changes those that are not copied yet.
    public func holdingMap(of range: Range<UInt64>, _ body: () throws(BlockError) -> Void) throws(BlockError) {
        let first = Int(range.lowerBound / TrackedDevice.chunkSize)
        let last = Int((range.upperBound - 1) / TrackedDevice.chunkSize)
        let wanted = Set((first...min(last, first + locks.count - 1)).map { $0 % locks.count })
        try holdingLocks(wanted.sorted()[...]) { () throws(BlockError) in try base.holdingMap(of: range, body) }
        // Once the snapshot has ended, nobody asks for the locks before changing what is below.
        _ = mapVersion
        try requireAlive()
    }

    private func holdingLocks(_ wanted: ArraySlice<Int>, _ body: () throws(BlockError) -> Void) throws(BlockError) {
        guard let next = wanted.first else { return try body() }
        try locks[next].withLock { () throws(BlockError) in try holdingLocks(wanted.dropFirst(), body) }
    }

    public func status(_ context: StatusContext, of range: Range<UInt64>, into list: inout StatusList)
        throws(BlockError) -> UInt64
    {
        try requireAlive()
        if case .dirtyBitmap(let index) = context {
            let bitmap = bitmaps.withLock { index >= 0 && index < $0.count ? $0[index] : nil }
            guard let bitmap else {
                throw BlockError(.invalid, "asking \(info.name) for its dirty bitmap \(index): it has no such bitmap")
            }
            return bitmap.status(of: range, into: &list)
        }
        // A hole below may be one that was made after the question where it was asked of: as with bytes, what was said
        // holds only if nothing moved meanwhile.
        var answer = StatusList(capacity: list.capacity)
        var position = range.lowerBound
        while position < range.upperBound {
            let version = mapVersion
            var end = try ask(context, position..<min(range.upperBound, position + (1 << 30)), &answer)
            if mapVersion != version {
                let held = position..<min(range.upperBound, position + TrackedDevice.chunkSize)
                try holdingMap(of: held) { () throws(BlockError) in end = try ask(context, held, &answer) }
            }
            if end == position { break }
            for extent in answer.extents {
                if !list.append(extent.length, extent.value) { return position }
                position += extent.length
            }
        }
        return position
    }

    private func ask(_ context: StatusContext, _ range: Range<UInt64>, _ answer: inout StatusList) throws(BlockError)
        -> UInt64
    {
        try requireAlive()
        answer.removeAll()
        return try copied.forEachRun(range) { (part, isCopied) throws(BlockError) -> UInt64 in
            if isCopied && context == .depth {
                return answer.append(part.count64, 1) ? part.upperBound : part.lowerBound
            }
            return try (isCopied ? scratch : base).status(context, of: part, into: &answer)
        }
    }

    public func prefetch(_ range: Range<UInt64>) { base.prefetch(range) }
}
