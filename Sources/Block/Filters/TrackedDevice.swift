// A writable device that keeps what snapshots need before it is overwritten, and tells a recorder what changes.

/// Keeps note of what changes on a disk.
public protocol ChangeRecorder: AnyObject, Sendable {
    /// Notes, so that a crash does not lose it, that a range is about to change. May block; what cannot be stored is
    /// the recorder's trouble, not the writer's.
    func record(_ range: Range<UInt64>)

    /// Whether `record` of a range would return at once.
    func isRecorded(_ range: Range<UInt64>) -> Bool
}

/// A writable device with snapshots. Before the first change of a chunk after a snapshot was made, what the chunk held
/// goes to the snapshot's scratch space; before the first change after a checkpoint, a recorder notes the chunk.
///
/// Changes run side by side, under a shared lock; making a snapshot holds that lock alone, so that every change lies
/// before the snapshot or after it, as a whole. (Long changes with snapshots around are several.)
public final class TrackedDevice: BlockDevice, @unchecked Sendable {
    // Sendable because what varies is read under the shared lock and changed by who holds it alone.

    /// Bytes that are kept together.
    public static let chunkSize: UInt64 = 65536
    /// Bytes of zeroing or discarding that hold the lock at a time while there are snapshots to copy for.
    private static let pieceSize: UInt64 = 4 << 20

    public let info: DeviceInfo
    private let base: any BlockDevice
    private let changes = SharedLock()
    /// Chunks are copied under the lock of their number modulo the count of locks.
    private let locks: [Lock] = (0..<64).map { _ in Lock() }
    private var recorder: (any ChangeRecorder)?
    private var snapshots: [SnapshotDevice] = []
    private var isClosed = false

    /// A device over a writable one, which nobody else changes from now on.
    public init(_ base: any BlockDevice) {
        var info = base.info
        info.dirtyBitmaps = []
        self.info = info
        self.base = base
    }

    // MARK: - Snapshots and checkpoints

    /// Makes a snapshot: everything that was answered before is in it, and nothing that comes later.
    ///
    /// - Parameters:
    ///   - scratch: all zeros, as large as the disk; only the snapshot uses it.
    ///   - bitmaps: names of the dirty bitmaps that the snapshot will have; `SnapshotDevice.freeze` brings them.
    ///   - mayGrow: asked now and then before more is copied; what it throws ends the snapshot, not the writer.
    ///   - onFailure: told once, from a writer's thread, why the snapshot can be read no more. It must not block.
    ///   - recorder: takes over the changes from this moment.
    /// - Throws: `BlockError` when the device cannot be flushed or is closed; nothing has changed then.
    public func makeSnapshot(
        scratch: any BlockDevice, bitmaps: [String], recorder: any ChangeRecorder,
        mayGrow: @escaping @Sendable () throws(BlockError) -> Void,
        onFailure: @escaping @Sendable (BlockError) -> Void
    ) throws(BlockError) -> SnapshotDevice {
        let snapshot = try SnapshotDevice(
            base, scratch: scratch, locks: locks, bitmaps: bitmaps, mayGrow: mayGrow, onFailure: onFailure)
        // Most of what is not on stable storage yet goes there while writers go on.
        try base.flush()
        try changes.withLock(alone: true) { () throws(BlockError) in
            try requireOpen()
            try base.flush()
            snapshots.append(snapshot)
            self.recorder = recorder
        }
        return snapshot
    }

    /// Copies nothing more for a snapshot; it can be read no more.
    public func release(_ snapshot: SnapshotDevice) {
        // First of all: once it has left the list, what its readers see below changes.
        _ = snapshot.end(BlockError(.shutdown, "reading \(snapshot.info.name): the snapshot was released"))
        changes.withLock(alone: true) { snapshots.removeAll { $0 === snapshot } }
    }

    /// Changes who notes changes while there are none under way; the closure may look at what was noted before.
    public func switchRecorder(_ change: () -> (any ChangeRecorder)?) {
        changes.withLock(alone: true) { recorder = change() }
    }

    /// Lets nobody change the disk any more, flushes it, and forgets the recorder.
    public func close() throws(BlockError) {
        try changes.withLock(alone: true) { () throws(BlockError) in
            isClosed = true
            recorder = nil
            try base.flush()
        }
    }

    private func requireOpen() throws(BlockError) {
        if isClosed { throw BlockError(.shutdown, "changing \(info.name): it is being closed") }
    }

    // MARK: - Changing

    /// Runs a change of a range after everything that has to be kept or noted first.
    private func change(_ range: Range<UInt64>, _ body: () throws(BlockError) -> Void) throws(BlockError) {
        try changes.withLock(alone: false) { () throws(BlockError) in
            try requireOpen()
            recorder?.record(range)
            if !snapshots.isEmpty { keep(range) }
            try body()
        }
    }

    /// Copies what snapshots lack of the chunks that a range touches.
    private func keep(_ range: Range<UInt64>) {
        let first = Int(range.lowerBound / Self.chunkSize)
        let last = Int((range.upperBound - 1) / Self.chunkSize)
        for chunk in first...last where snapshots.contains(where: { $0.needs(chunk) }) {
            locks[chunk % locks.count].withLock {
                let lacking = snapshots.filter { $0.needs(chunk) }
                if lacking.isEmpty { return }
                let start = UInt64(chunk) * Self.chunkSize
                let copy = Buffer(count: Int(min(Self.chunkSize, info.size - start)))
                do throws(BlockError) {
                    try base.read(into: copy.bytes, at: start)
                    for snapshot in lacking { snapshot.keep(chunk, copy.readable) }
                } catch {
                    for snapshot in lacking { snapshot.fail(error) }
                }
            }
        }
    }

    /// Whether a change would have to copy first.
    private func mustKeep(_ range: Range<UInt64>) -> Bool {
        changes.withLock(alone: false) { snapshots.contains { $0.needs(range) } }
    }

    /// Runs a change piece by piece where it has to copy first, so that who waits to be alone does not wait for long.
    private func changeInPieces(
        _ range: Range<UInt64>, _ body: (Range<UInt64>, _ isWhole: Bool) throws(BlockError) -> Void
    ) throws(BlockError) {
        guard range.count64 > Self.pieceSize, mustKeep(range) else {
            return try change(range) { () throws(BlockError) in try body(range, true) }
        }
        // All of it at once: each piece would wait for stable storage. The pieces note it again for the recorder of a
        // snapshot that comes between them.
        try changes.withLock(alone: false) { () throws(BlockError) in
            try requireOpen()
            recorder?.record(range)
        }
        var position = range.lowerBound
        while position < range.upperBound {
            let end = min(range.upperBound, (position & ~(Self.pieceSize - 1)) + Self.pieceSize)
            try change(position..<end) { () throws(BlockError) in try body(position..<end, false) }
            position = end
        }
    }

    public func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64, durable: Bool) throws(BlockError) {
        try change(offset..<(offset + UInt64(bytes.count))) { () throws(BlockError) in
            try base.write(bytes, at: offset, durable: durable)
        }
    }

    public func zero(_ range: Range<UInt64>, _ options: ZeroOptions) throws(BlockError) {
        if options.contains(.fastOnly) && mustKeep(range) {
            throw BlockError(
                .unsupported, "zeroing a range of \(info.name) fast: a snapshot has to keep what it holds first")
        }
        var isInPieces = false
        try changeInPieces(range) { (part, isWhole) throws(BlockError) in
            isInPieces = !isWhole
            try base.zero(part, isWhole ? options : options.subtracting(.durable))
        }
        if isInPieces && options.contains(.durable) { try base.flush() }
    }

    public func discard(_ range: Range<UInt64>, durable: Bool) throws(BlockError) {
        var isInPieces = false
        try changeInPieces(range) { (part, isWhole) throws(BlockError) in
            isInPieces = !isWhole
            try base.discard(part, durable: durable && isWhole)
        }
        if isInPieces && durable { try base.flush() }
    }

    public func isPrompt(toWrite range: Range<UInt64>) -> Bool {
        let isReady = changes.withLockIfShared {
            (recorder?.isRecorded(range) ?? true) && !snapshots.contains { $0.needs(range) }
        }
        return isReady == true && base.isPrompt(toWrite: range)
    }

    // MARK: - Everything else is the base's

    public var mapVersion: UInt64 { base.mapVersion }
    public func map(_ range: Range<UInt64>, _ patience: Patience, into extents: inout ExtentList) throws(BlockError)
        -> UInt64
    { try base.map(range, patience, into: &extents) }
    public func holdingMap(of range: Range<UInt64>, _ body: () throws(BlockError) -> Void) throws(BlockError) {
        try base.holdingMap(of: range, body)
    }
    public func status(_ context: StatusContext, of range: Range<UInt64>, into list: inout StatusList)
        throws(BlockError) -> UInt64
    {
        if case .dirtyBitmap = context {
            throw BlockError(.invalid, "asking \(info.name) for a dirty bitmap: only its snapshots have some")
        }
        return try base.status(context, of: range, into: &list)
    }
    public func flush() throws(BlockError) { try base.flush() }
    public func confirm() throws(BlockError) { try base.confirm() }
    public func prefetch(_ range: Range<UInt64>) { base.prefetch(range) }
}
