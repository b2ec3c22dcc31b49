// Memory for blocks: aligned for O_DIRECT, owned by exactly one holder.
public import Glibc

/// A block of memory aligned to 4096 bytes, freed when its owner goes.
public struct Buffer: ~Copyable, @unchecked Sendable {
    // Sendable because it is owned by one holder at a time: it cannot be copied.

    /// The alignment of every buffer in bytes; enough for O_DIRECT on every device with sectors up to this size.
    public static let alignment = 4096

    /// The memory.
    public let bytes: UnsafeMutableRawBufferPointer

    /// Memory for `count` bytes, at least 1, not initialised.
    public init(count: Int) {
        precondition(count > 0)
        bytes = .allocate(byteCount: count, alignment: Self.alignment)
    }

    deinit { bytes.deallocate() }

    /// Read-only view of the memory.
    public var readable: UnsafeRawBufferPointer { UnsafeRawBufferPointer(bytes) }
}

/// 64 KiB of zeros that never change, for sending and writing.
public enum ZeroPage {
    /// Bytes in the page.
    public static let count = 65536
    /// The zeros. Shared freely because nobody writes them after they are made.
    public nonisolated(unsafe) static let bytes: UnsafeRawBufferPointer = {
        let memory = UnsafeMutableRawBufferPointer.allocate(byteCount: count, alignment: Buffer.alignment)
        memory.initializeMemory(as: UInt8.self, repeating: 0)
        return UnsafeRawBufferPointer(memory)
    }()
}

/// A mutual exclusion lock. The pthread one, because thread sanitizers understand it.
public final class Lock: @unchecked Sendable {
    // Sendable because a pthread mutex may be used from every thread, and its address never changes.
    @usableFromInline let mutex: UnsafeMutablePointer<pthread_mutex_t>

    /// An unlocked lock.
    public init() {
        mutex = .allocate(capacity: 1)
        mutex.initialize(to: pthread_mutex_t())
        pthread_mutex_init(mutex, nil)
    }

    deinit {
        pthread_mutex_destroy(mutex)
        mutex.deallocate()
    }

    /// Runs the body while holding the lock.
    @inlinable @inline(__always)
    public func withLock<R: ~Copyable, E: Error>(_ body: () throws(E) -> R) throws(E) -> R {
        pthread_mutex_lock(mutex)
        defer { pthread_mutex_unlock(mutex) }
        return try body()
    }
}

extension Lock {
    /// Runs the body while holding the lock, unless somebody else holds it.
    ///
    /// - Returns: whether it ran.
    public func withLockIfFree(_ body: () -> Void) -> Bool {
        if pthread_mutex_trylock(mutex) != 0 { return false }
        defer { pthread_mutex_unlock(mutex) }
        body()
        return true
    }
}

/// A value that is only touched under its lock.
public final class Locked<Value>: @unchecked Sendable {
    // Sendable because the value is reachable only inside withLock.
    @usableFromInline let lock = Lock()
    @usableFromInline var value: Value

    /// A locked value.
    public init(_ value: Value) { self.value = value }

    /// Runs the body with the value while holding the lock.
    @inlinable @inline(__always)
    public func withLock<R, E: Error>(_ body: (inout Value) throws(E) -> R) throws(E) -> R {
        try lock.withLock { () throws(E) in try body(&value) }
    }
}
