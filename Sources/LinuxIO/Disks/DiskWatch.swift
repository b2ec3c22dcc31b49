// Waiting for a disk to come or to go: by the kernel's events, and by looking now and then, should one be missed.
public import Block
import Glibc

/// Waits for disks.
public struct DiskWatch {
    private let inventory: DiskInventory
    private let events: KernelEvents?
    private let pause: Double

    /// A watch that misses nothing that happens from now on.
    ///
    /// - Parameters:
    ///   - pause: how long to go without looking, in seconds, when no event comes.
    ///   - bufferBytes: room for events that were not heard yet; nil for what the system gives. Where it is too small,
    ///     some are lost, and the disks are looked at all the same.
    public init(
        _ inventory: DiskInventory = DiskInventory(), lookingEvery pause: Double = 0.2, bufferBytes: Int32? = nil
    ) {
        self.inventory = inventory
        self.pause = pause
        events = try? KernelEvents(bufferBytes: bufferBytes)
    }

    /// Waits until a condition of the disks holds.
    ///
    /// - Parameters:
    ///   - seconds: how long at most.
    ///   - found: what is looked for among the disks; nil while it is not there.
    /// - Returns: what was found; nil when time is up.
    /// - Throws: `BlockError` when the disks cannot be listed, or what `found` throws.
    public func wait<R>(seconds: Double, _ found: ([AttachedDisk]) throws(BlockError) -> R?) throws(BlockError) -> R? {
        let end = monotonicSeconds() + seconds
        while true {
            if let result = try found(try inventory.disks()) { return result }
            let left = end - monotonicSeconds()
            if left <= 0 { return nil }
            pauseForEvent(seconds: min(left, pause))
        }
    }

    /// Waits for the next event of a block device, or until the time is up.
    private func pauseForEvent(seconds: Double) {
        guard let events else {
            usleep(UInt32(min(seconds, 0.05) * 1e6))
            return
        }
        let end = monotonicSeconds() + seconds
        while true {
            guard let answer = try? events.next(seconds: max(0, end - monotonicSeconds())) else {
                usleep(50_000)
                return
            }
            guard case .event(let event) = answer, event.values["SUBSYSTEM"] != "block" else { return }
        }
    }
}
