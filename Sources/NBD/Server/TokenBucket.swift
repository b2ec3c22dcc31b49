// The rate limit of an export: tokens that refill with time, one for each byte.
import Block
import Glibc

/// A token bucket that holds at most a quarter of a second's bytes.
final class TokenBucket: Sendable {
    private struct State {
        var tokens: Double
        var last: Double
    }

    private let rate: Double
    private let burst: Double
    private let state: Locked<State>

    init(bytesPerSecond: UInt64) {
        rate = Double(max(bytesPerSecond, 1))
        burst = rate / 4
        state = Locked(State(tokens: rate / 4, last: monotonicSeconds()))
    }

    /// Puts back tokens that were taken for something that will not happen.
    func giveBack(_ bytes: UInt64) {
        state.withLock { $0.tokens = min(burst, $0.tokens + Double(bytes)) }
    }

    /// Takes tokens and says how many seconds the caller has to wait first. Tokens may go below zero: the debt is what
    /// the next callers wait for, so requests larger than the burst keep the rate, too.
    func take(_ bytes: UInt64) -> Double {
        state.withLock { state in
            let now = monotonicSeconds()
            state.tokens = min(burst, state.tokens + (now - state.last) * rate)
            state.last = now
            state.tokens -= Double(bytes)
            return state.tokens < 0 ? -state.tokens / rate : 0
        }
    }
}

/// Seconds of the monotonic clock.
func monotonicSeconds() -> Double {
    var time = timespec()
    clock_gettime(CLOCK_MONOTONIC, &time)
    return Double(time.tv_sec) + Double(time.tv_nsec) / 1e9
}
