// The clock for deadlines, rates and latencies: it only goes forward.
import Glibc

/// Seconds of the monotonic clock.
public func monotonicSeconds() -> Double { Double(monotonicNanoseconds()) / 1e9 }

/// Nanoseconds of the monotonic clock.
public func monotonicNanoseconds() -> UInt64 {
    var time = timespec()
    clock_gettime(CLOCK_MONOTONIC, &time)
    return UInt64(truncatingIfNeeded: time.tv_sec) &* 1_000_000_000 &+ UInt64(truncatingIfNeeded: time.tv_nsec)
}
