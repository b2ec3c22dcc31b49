// Repeatable chance: every random test tells its seed when it fails, and SEED=NUMBER runs it again.
import Glibc

/// Pseudo-random numbers that follow from a seed (splitmix64).
public struct SeededGenerator: RandomNumberGenerator, Sendable {
    private var state: UInt64

    /// The sequence of a seed.
    public init(seed: UInt64) { state = seed }

    /// The next number.
    public mutating func next() -> UInt64 {
        state &+= 0x9E37_79B9_7F4A_7C15
        var z = state
        z = (z ^ (z >> 30)) &* 0xBF58_476D_1CE4_E5B9
        z = (z ^ (z >> 27)) &* 0x94D0_49BB_1331_11EB
        return z ^ (z >> 31)
    }

    /// True with a chance of 1 in `n`.
    public mutating func oneIn(_ n: Int) -> Bool { Int.random(in: 0..<n, using: &self) == 0 }
}

/// The seed of this run: SEED from the environment, or a new one.
public let runSeed: UInt64 = getenv("SEED").flatMap { UInt64(String(cString: $0)) } ?? .random(in: 0...UInt64.max)

/// Runs a body with this run's random numbers; what it throws gets the seed in front.
public func withSeed<R>(_ body: (inout SeededGenerator) throws -> R) throws -> R {
    var generator = SeededGenerator(seed: runSeed)
    do {
        return try body(&generator)
    } catch { throw CheckFailure("SEED=\(runSeed): \(error)") }
}
