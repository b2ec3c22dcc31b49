// Locks and conditions that threads share: the pthread ones, because thread sanitizers understand them.
public import Glibc

/// A mutual exclusion lock.
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

    /// Takes the lock, for loops that give it back in the middle and work without it; others use `withLock`.
    @inlinable @inline(__always)
    public func lock() { pthread_mutex_lock(mutex) }

    /// Gives the lock back, which the caller holds.
    @inlinable @inline(__always)
    public func unlock() { pthread_mutex_unlock(mutex) }

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

/// Lets threads that hold a lock wait until another one says that something has changed.
public final class Condition: @unchecked Sendable {
    // Sendable because a pthread condition may be used from every thread, and its address never changes.
    private let condition: UnsafeMutablePointer<pthread_cond_t>

    /// A condition that nobody waits for.
    public init() {
        condition = .allocate(capacity: 1)
        condition.initialize(to: pthread_cond_t())
        var attributes = pthread_condattr_t()
        pthread_condattr_init(&attributes)
        // Waits with a limit are not to depend on what somebody sets the clock to.
        pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC)
        pthread_cond_init(condition, &attributes)
        pthread_condattr_destroy(&attributes)
    }

    deinit {
        pthread_cond_destroy(condition)
        condition.deallocate()
    }

    /// Gives the lock back, which the caller holds, until the condition is signalled, and takes it again. May return
    /// without a signal: callers look again at what they wait for.
    public func wait(holding lock: Lock) { pthread_cond_wait(condition, lock.mutex) }

    /// The same, for no longer than up to a moment.
    ///
    /// - Parameter deadline: nanoseconds of the monotonic clock.
    /// - Returns: false when the moment has come.
    public func wait(holding lock: Lock, until deadline: UInt64) -> Bool {
        var time = timespec(
            tv_sec: Int(clamping: deadline / 1_000_000_000), tv_nsec: Int(deadline % 1_000_000_000))
        return pthread_cond_timedwait(condition, lock.mutex, &time) != ETIMEDOUT
    }

    /// Wakes one of those who wait.
    public func signal() { pthread_cond_signal(condition) }

    /// Wakes all who wait.
    public func broadcast() { pthread_cond_broadcast(condition) }
}

/// A lock that many may hold together, or one alone. One who wants it alone comes before those who come later.
public final class SharedLock: @unchecked Sendable {
    // Sendable because a pthread lock may be used from every thread, and its address never changes.
    private let lock: UnsafeMutablePointer<pthread_rwlock_t>

    /// A lock that nobody holds.
    public init() {
        lock = .allocate(capacity: 1)
        lock.initialize(to: pthread_rwlock_t())
        var attributes = pthread_rwlockattr_t()
        pthread_rwlockattr_init(&attributes)
        // A steady stream of those who share must not starve one who wants to be alone.
        pthread_rwlockattr_setkind_np(&attributes, Int32(PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP))
        pthread_rwlock_init(lock, &attributes)
        pthread_rwlockattr_destroy(&attributes)
    }

    deinit {
        pthread_rwlock_destroy(lock)
        lock.deallocate()
    }

    /// Runs a body together with others, or alone. It must not take the lock again.
    public func withLock<R, E: Error>(alone: Bool, _ body: () throws(E) -> R) throws(E) -> R {
        if alone { pthread_rwlock_wrlock(lock) } else { pthread_rwlock_rdlock(lock) }
        defer { pthread_rwlock_unlock(lock) }
        return try body()
    }

    /// Runs a body together with others, unless somebody holds the lock alone or waits for that.
    ///
    /// - Returns: nil when it did not run.
    public func withLockIfShared<R>(_ body: () -> R) -> R? {
        if pthread_rwlock_tryrdlock(lock) != 0 { return nil }
        defer { pthread_rwlock_unlock(lock) }
        return body()
    }
}
