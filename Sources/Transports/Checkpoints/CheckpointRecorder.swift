// Notes what changes since a checkpoint: exactly in memory, coarsely and durably in the checkpoint's file.
import Block
import Glibc
import LinuxIO
import Synchronization

/// Records the changes since the newest checkpoint.
///
/// Before the first change in a region of 64 chunks (4 MiB), all 64 bits are set in the file and synced: one sync pays
/// for all of them, and for those that others wait for meanwhile. A crash leaves bits that are set too often, never too
/// rarely; the exact bits are stored when the checkpoint is closed.
final class CheckpointRecorder: ChangeRecorder, @unchecked Sendable {
    // Sendable because everything that varies is reached under the lock.

    /// The exact bits.
    let bits: DirtyBitmap
    /// The regions that the file says have changed.
    private let stored: DirtyBitmap
    private let path: String
    private let begin: @Sendable () throws(BlockError) -> Void
    /// Whether the file says that somebody records, or is gone, so that nobody trusts it.
    private let hasBegun = Atomic<Bool>(false)
    private let onFailure: @Sendable (BlockError) -> Void

    private let lock = Lock()
    private let isDone = Condition()
    private var waiting: [Range<UInt64>] = []
    /// The number of the batch that `waiting` will be, and of the last that is stored.
    private var nextBatch: UInt64 = 1
    private var lastBatch: UInt64 = 0
    private var isStoring = false
    /// Only touched by who stores.
    private var file: Descriptor?
    private var hasFailed = false

    private static let regionSize = CheckpointFile.granularity * 64

    /// Records into a checkpoint's file.
    ///
    /// - Parameters:
    ///   - begin: writes the file with the same bits, not closed; called before the first change, so that a disk that
    ///     nobody changes keeps a file that is closed.
    ///   - onFailure: told once when the file cannot be written: recording goes on in memory, and the file's header,
    ///     which says that it is not closed, has everything count as changed after a crash.
    init(
        path: String, bits: DirtyBitmap, begin: @escaping @Sendable () throws(BlockError) -> Void,
        onFailure: @escaping @Sendable (BlockError) -> Void
    ) throws(BlockError) {
        self.bits = bits
        self.path = path
        self.begin = begin
        self.onFailure = onFailure
        stored = try DirtyBitmap(size: bits.size, granularity: Self.regionSize)
    }

    func isRecorded(_ range: Range<UInt64>) -> Bool {
        hasBegun.load(ordering: .acquiring) && (bits.isAllSet(range) || stored.isAllSet(range))
    }

    func record(_ range: Range<UInt64>) {
        let hasBegun = hasBegun.load(ordering: .acquiring)
        if hasBegun && bits.isAllSet(range) { return }
        if !hasBegun || !stored.isAllSet(range) { store(range) }
        bits.set(range)
    }

    /// Notes what another recorder has noted, durably.
    func adopt(_ other: DirtyBitmap) {
        var list = StatusList(capacity: 4096)
        var position: UInt64 = 0
        while position < other.size {
            list.removeAll()
            _ = other.status(of: position..<other.size, into: &list)
            for extent in list.extents {
                if extent.value != 0 { record(position..<(position + extent.length)) }
                position += extent.length
            }
        }
    }

    /// Waits until the file says that a range has changed. One thread stores for all who wait.
    private func store(_ range: Range<UInt64>) {
        let ticket = lock.withLock {
            waiting.append(range)
            return nextBatch
        }
        while true {
            let batch: [Range<UInt64>]? = lock.withLock {
                while lastBatch < ticket {
                    if !isStoring {
                        isStoring = true
                        nextBatch += 1
                        defer { waiting = [] }
                        return waiting
                    }
                    isDone.wait(holding: lock)
                }
                return nil
            }
            guard let batch else { return }
            let failure = write(batch)
            let isNews = lock.withLock { () -> Bool in
                for range in batch { stored.set(range) }
                lastBatch = nextBatch - 1
                isStoring = false
                isDone.broadcast()
                defer { if failure != nil { hasFailed = true } }
                return failure != nil && !hasFailed
            }
            if isNews, let failure { onFailure(failure) }
        }
    }

    private static let ones = [UInt8](repeating: 0xFF, count: 65536)

    private func write(_ batch: [Range<UInt64>]) -> BlockError? {
        do throws(BlockError) {
            let file = try openFile()
            try write(batch, to: file.number)
            return nil
        } catch { return error }
    }

    private func openFile() throws(BlockError) -> Descriptor {
        if let file { return file }
        do throws(BlockError) { try begin() } catch {
            // A file that says that it is closed must not outlive what changes now; a missing one says that all has
            // changed. Where it cannot be removed either, each change tries again.
            if unlink(path) == 0 || errno == ENOENT {
                try? syncDirectory(directoryName(path))
                hasBegun.store(true, ordering: .releasing)
            }
            throw error
        }
        hasBegun.store(true, ordering: .releasing)
        let opened = try Descriptor.open(path, O_WRONLY)
        file = opened
        return opened
    }

    private func write(_ batch: [Range<UInt64>], to file: Int32) throws(BlockError) {
        for range in batch where !stored.isAllSet(range) {
            var word = Int(range.lowerBound / Self.regionSize)
            let end = Int((range.upperBound - 1) / Self.regionSize) + 1
            while word < end {
                let count = min((end - word) * 8, Self.ones.count)
                let written = Self.ones.withUnsafeBytes {
                    pwrite(file, $0.baseAddress, count, off_t(CheckpointFile.headerSize + word * 8))
                }
                if written < 0 && errno == EINTR { continue }
                if written <= 0 { throw BlockError(errno: written < 0 ? errno : ENOSPC, "writing \(path)") }
                // Whole words count; a part of one is written again.
                word += max(written / 8, written == count ? 1 : 0)
            }
        }
        if fdatasync(file) < 0 { throw BlockError(errno: errno, "syncing \(path)") }
    }
}
