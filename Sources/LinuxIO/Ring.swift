// One thread's io_uring: reads that missed the page cache, and waiting for a socket at the same time.
import Block
import CLinux
import Glibc

/// A ring that only its maker's thread uses.
public struct Ring: ~Copyable {
    /// A finished operation.
    public struct Completion {
        /// What the operation was queued with.
        public let tag: UInt64
        /// Bytes, or a negative errno.
        public let result: Int32
    }

    private let ring: OpaquePointer

    /// A ring with room for `entries` queued operations, or nil where the kernel or a sandbox forbids io_uring.
    public init?(entries: UInt32) {
        var error: Int32 = 0
        guard let made = dg_ring_create(entries, &error) else { return nil }
        ring = made
    }

    deinit { dg_ring_destroy(ring) }

    /// Queues a read; the buffer stays valid until its completion is taken. False when the queue is full.
    public func read(_ file: Int32, into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64, tag: UInt64) -> Bool
    {
        dg_ring_read(ring, file, buffer.baseAddress, UInt32(truncatingIfNeeded: buffer.count), offset, tag)
    }

    /// Queues a one-shot wait for a descriptor to become readable. False when the queue is full.
    public func pollReadable(_ descriptor: Int32, tag: UInt64) -> Bool { dg_ring_poll_in(ring, descriptor, tag) }

    /// Submits what is queued and waits for at least `count` completions.
    public func submit(waitingFor count: UInt32) { _ = dg_ring_submit_and_wait(ring, count) }

    /// Takes finished operations, up to 64 at a time.
    @inline(__always)
    public func reap(_ body: (Completion) -> Void) -> Int {
        withUnsafeTemporaryAllocation(of: dg_completion.self, capacity: 64) { completions in
            let count = Int(dg_ring_reap(ring, completions.baseAddress, 64))
            for index in 0..<count {
                body(Completion(tag: completions[index].user_data, result: completions[index].result))
            }
            return count
        }
    }
}
