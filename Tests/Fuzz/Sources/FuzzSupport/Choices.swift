// Turns the fuzzer's bytes into decisions, so that its mutations reach what lies behind magic numbers and lengths.

/// The bytes of an input, taken one after the other. Past the end they are 0.
public struct Choices {
    private let bytes: UnsafeRawBufferPointer
    private var position = 0

    /// All of an input.
    public init(_ bytes: UnsafeRawBufferPointer) { self.bytes = bytes }

    /// Whether every byte is taken.
    public var isEmpty: Bool { position >= bytes.count }

    /// The next byte.
    public mutating func byte() -> UInt8 {
        guard position < bytes.count else { return 0 }
        defer { position += 1 }
        return bytes[position]
    }

    /// The next two bytes as a number.
    public mutating func number() -> Int { Int(byte()) << 8 | Int(byte()) }

    /// One of some values, by the next byte.
    public mutating func pick<T>(_ values: [T]) -> T { values[Int(byte()) % values.count] }

    /// Up to so many of the next bytes.
    public mutating func take(_ count: Int) -> UnsafeRawBufferPointer {
        let end = min(bytes.count, position + count)
        defer { position = end }
        return UnsafeRawBufferPointer(rebasing: bytes[position..<end])
    }

    /// What is left.
    public mutating func rest() -> UnsafeRawBufferPointer { take(bytes.count - position) }
}
