// A rate limit, of an export or a client: tokens that refill with time, one for each byte.
import Block
import LinuxIO

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

    /// Whether nobody has taken anything for so long that it is as full as a new one.
    var isFull: Bool {
        state.withLock { $0.tokens + (monotonicSeconds() - $0.last) * rate >= burst }
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
