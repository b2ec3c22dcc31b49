// Plain threads for the data plane: one per connection, and lanes for calls that may block.
public import Block
import CLinux
import Glibc
import Synchronization

/// Starts a detached thread, which takes no signals.
///
/// - Parameters:
///   - name: at most 15 bytes are shown by the system.
///   - stackSize: bytes, at least 64 KiB.
/// - Throws: `.noMemory` when the system gives no thread.
public func startThread(name: String, stackSize: Int = 512 * 1024, _ body: @escaping @Sendable () -> Void)
    throws(BlockError)
{
    final class Start: Sendable {
        let body: @Sendable () -> Void
        init(_ body: @escaping @Sendable () -> Void) { self.body = body }
    }
    var attributes = pthread_attr_t()
    pthread_attr_init(&attributes)
    defer { pthread_attr_destroy(&attributes) }
    pthread_attr_setdetachstate(&attributes, Int32(PTHREAD_CREATE_DETACHED))
    pthread_attr_setstacksize(&attributes, stackSize)
    let start = Unmanaged.passRetained(Start(body))
    // Signals are the first thread's business, whenever the others were started: one that ends the process must not
    // find a thread that has not heard of how it is to end.
    var all = sigset_t()
    var before = sigset_t()
    sigfillset(&all)
    pthread_sigmask(SIG_SETMASK, &all, &before)
    defer { pthread_sigmask(SIG_SETMASK, &before, nil) }
    var thread = pthread_t()
    let result = pthread_create(
        &thread, &attributes,
        { argument in
            guard let argument else { return nil }
            Unmanaged<Start>.fromOpaque(argument).takeRetainedValue().body()
            return nil
        }, start.toOpaque())
    if result != 0 {
        start.release()
        throw BlockError(.noMemory, "starting the thread \(name): \(systemErrorText(result))")
    }
    pthread_setname_np(thread, String(name.prefix(15)))
}

/// Worker threads for calls that may block: flushes, durable writes, sources. Started when needed, gone when idle.
///
/// Each connection has lanes of its own, so that a client whose storage hangs leaves those of others alone.
public final class Lanes: @unchecked Sendable {
    // Sendable because all state is touched only under `lock`.

    /// The most threads: as many as nbdkit gives a connection, enough to keep a storage queue busy.
    public static let threadsMax = 16
    /// The most lane threads of all connections together, besides the first of each.
    static let processThreadsMax = 512
    private static let allThreads = Atomic<Int>(0)
    /// Seconds that an idle thread stays.
    static let idleSeconds = 5

    private let lock = Lock()
    private let condition = Condition()
    private var jobs: [@Sendable () -> Void] = []
    private var nextJob = 0
    private var threads = 0
    private var idle = 0
    private var isRetired = false

    /// Lanes without any thread yet.
    public init() {}

    /// Has threads end as soon as there is nothing to do, instead of staying for a while.
    public func retire() {
        lock.withLock {
            isRetired = true
            condition.broadcast()
        }
    }

    /// Runs a job on some lane, in the order of submission when all are busy. Where no thread can be had at all, it
    /// runs here.
    public func submit(_ job: @escaping @Sendable () -> Void) {
        lock.lock()
        jobs.append(job)
        let waiting = jobs.count - nextJob
        // Everybody gets one lane; further ones as long as the process has not too many.
        let needsThread =
            waiting > idle && threads < Self.threadsMax
            && (threads == 0 || Self.allThreads.load(ordering: .relaxed) < Self.processThreadsMax)
        if needsThread {
            threads += 1
            Self.allThreads.add(1, ordering: .relaxed)
        }
        condition.signal()
        lock.unlock()
        guard needsThread else { return }
        do throws(BlockError) {
            try startThread(name: "lane") { self.work() }
        } catch {
            let alone = lock.withLock { () -> Bool in
                threads -= 1
                Self.allThreads.subtract(1, ordering: .relaxed)
                return threads == 0
            }
            if alone { while let job = take(waiting: false) { job() } }
        }
    }

    private func work() {
        while let job = take(waiting: true) { job() }
        Self.allThreads.subtract(1, ordering: .relaxed)
    }

    private func take(waiting: Bool) -> (@Sendable () -> Void)? {
        lock.lock()
        defer { lock.unlock() }
        while nextJob == jobs.count {
            guard waiting else { return nil }
            if isRetired {
                threads -= 1
                return nil
            }
            idle += 1
            let isInTime = condition.wait(
                holding: lock, until: monotonicNanoseconds() + UInt64(Self.idleSeconds) * 1_000_000_000)
            idle -= 1
            if !isInTime && nextJob == jobs.count {
                threads -= 1
                return nil
            }
        }
        let job = jobs[nextJob]
        nextJob += 1
        if nextJob == jobs.count {
            jobs.removeAll(keepingCapacity: true)
            nextJob = 0
        } else if nextJob >= 1024 {
            jobs.removeFirst(nextJob)
            nextJob = 0
        }
        return job
    }
}
