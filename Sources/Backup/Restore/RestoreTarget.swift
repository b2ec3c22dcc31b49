// The disk that a restore writes to, as the copier's target: what is right already stays, and the beginning comes last.
import Block
import LinuxIO
import Synchronization

/// A disk that is being restored.
///
/// A disk that is there already gets its beginning last: before anything else is written, its first mebibyte, which has
/// the boot sector, the partition table or the file system's first block, becomes zeros. So nobody takes a disk that
/// was restored in part for a whole one, neither for the old nor for the new.
final class RestoreTarget: CopyTarget {
    /// Bytes of a disk that are written last.
    static let headBytes: UInt64 = 1 << 20
    /// Of these, bytes that are written after the rest is durable: one block of any storage.
    private static let lastBytes: UInt64 = 4096
    private static let pieceBytes: UInt64 = 1 << 20

    let name: String
    let size: UInt64
    let granularity = ChunkHashes.chunkSize
    var pieceBytes: Int { disk.pieceBytes }
    var waitsForStorage: Bool { disk.waitsForStorage }
    let isSequential = false
    let readsAsZeros: Bool
    /// What the copier leaves alone and `writeHead` writes. Empty for a new file, which nobody takes for anything.
    let head: Range<UInt64>
    private let disk: DeviceTarget
    private let source: HashedDisk
    private let isDifferential: Bool
    private let headState = Locked(HeadState.untouched)

    private enum HeadState { case untouched, changing, gone }
    private let written = Atomic<UInt64>(0)
    private let zeroed = Atomic<UInt64>(0)
    private let unchanged = Atomic<UInt64>(0)

    /// - Parameters:
    ///   - source: the disk that is restored, with the hashes that its chunks have.
    ///   - isBlank: whether the disk is new and reads as zeros.
    ///   - isDifferential: whether it is read first, and what is right is left alone.
    init(_ disk: any BlockDevice, source: HashedDisk, isBlank: Bool, isDifferential: Bool) {
        self.disk = DeviceTarget(disk, readsAsZeros: isBlank)
        self.source = source
        self.isDifferential = isDifferential
        name = disk.info.name
        size = source.info.size
        readsAsZeros = isBlank
        head = 0..<(isBlank ? 0 : min(Self.headBytes, source.info.size))
    }

    /// Bytes written, made zero, and left alone as they were right.
    var bytesWritten: UInt64 { written.load(ordering: .relaxed) }
    var bytesZeroed: UInt64 { zeroed.load(ordering: .relaxed) }
    var bytesUnchanged: UInt64 { unchanged.load(ordering: .relaxed) }

    /// Whether something on the disk has been changed.
    var isTouched: Bool { headState.withLock { $0 != .untouched } }

    func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws(BlockError) {
        try forRuns(of: offset..<(offset + UInt64(bytes.count)), isRight: source.isRight) {
            (range) throws(BlockError) in
            try removeHead()
            let start = Int(range.lowerBound - offset)
            try disk.write(
                UnsafeRawBufferPointer(rebasing: bytes[start..<(start + Int(range.count64))]), at: range.lowerBound)
            written.wrappingAdd(range.count64, ordering: .relaxed)
        }
    }

    func zero(_ range: Range<UInt64>) throws(BlockError) {
        if !isDifferential { return try zeroAll(range) }
        let present = Buffer(count: Int(Self.pieceBytes))
        var position = range.lowerBound
        while position < range.upperBound {
            let piece = position..<min(position + Self.pieceBytes, range.upperBound)
            let bytes = UnsafeMutableRawBufferPointer(rebasing: present.bytes[..<Int(piece.count64)])
            try disk.device.read(into: bytes, at: piece.lowerBound)
            try forRuns(
                of: piece,
                isRight: { chunk in
                    let start = Int(chunk.lowerBound - piece.lowerBound)
                    return UnsafeRawBufferPointer(bytes).isZero(start..<(start + Int(chunk.count64)))
                }, zeroAll)
            position = piece.upperBound
        }
    }

    private func zeroAll(_ range: Range<UInt64>) throws(BlockError) {
        try removeHead()
        try disk.zero(range)
        zeroed.wrappingAdd(range.count64, ordering: .relaxed)
    }

    /// Does something with the runs of a range whose chunks are not right yet.
    private func forRuns(
        of range: Range<UInt64>, isRight: (Range<UInt64>) -> Bool, _ body: (Range<UInt64>) throws(BlockError) -> Void
    ) throws(BlockError) {
        var run = range.lowerBound..<range.lowerBound
        var position = range.lowerBound
        while position < range.upperBound {
            let chunk = position..<min((position / granularity + 1) * granularity, range.upperBound)
            if isDifferential && isRight(chunk) {
                if !run.isEmpty { try body(run) }
                run = chunk.upperBound..<chunk.upperBound
                unchanged.wrappingAdd(chunk.count64, ordering: .relaxed)
            } else {
                run = run.lowerBound..<chunk.upperBound
            }
            position = chunk.upperBound
        }
        if !run.isEmpty { try body(run) }
    }

    func flush() throws(BlockError) { try disk.flush() }

    func dropCache() { disk.dropCache() }

    func startFlushing() { disk.startFlushing() }

    // MARK: - The beginning of the disk

    /// Makes the beginning zeros, durably, before the first change.
    private func removeHead() throws(BlockError) {
        if head.isEmpty { return }
        try headState.withLock { (state) throws(BlockError) in
            if state == .gone { return }
            state = .changing
            try disk.zero(head)
            try disk.flush()
            Step.reached("restore.head-removed")
            state = .gone
        }
    }

    /// Writes the beginning, when everything else is written: durable when it returns, its first block last of all.
    ///
    /// - Throws: what source and disk say. Everything else is durable then.
    func writeHead() throws(BlockError) {
        if head.isEmpty { return }
        let bytes = Buffer(count: Int(head.count64))
        try source.read(into: bytes.bytes, at: 0)
        if isDifferential && !isTouched && source.isRight(head) {
            unchanged.wrappingAdd(head.count64, ordering: .relaxed)
            return
        }
        try removeHead()
        try disk.flush()
        Step.reached("restore.body-durable")
        let last = Int(min(max(Self.lastBytes, UInt64(disk.device.info.minimumBlock)), head.count64))
        if last < bytes.readable.count {
            try disk.write(UnsafeRawBufferPointer(rebasing: bytes.readable[last...]), at: UInt64(last))
            try disk.flush()
            Step.reached("restore.head-durable")
        }
        try disk.write(UnsafeRawBufferPointer(rebasing: bytes.readable[..<last]), at: 0)
        try disk.flush()
        written.wrappingAdd(head.count64, ordering: .relaxed)
    }
}
