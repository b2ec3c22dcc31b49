// Bytes as tests write them: big-endian numbers and strings in a row, the way the protocol's document shows messages.
import Block
import Glibc

/// The bytes of values in order: integers big-endian, strings as UTF-8, byte arrays as they are.
func bytes(_ parts: any WireValue...) -> [UInt8] { parts.flatMap { $0.wire } }

/// A value with a form on the wire.
protocol WireValue {
    var wire: [UInt8] { get }
}

extension FixedWidthInteger {
    var wire: [UInt8] { withUnsafeBytes(of: bigEndian) { Array($0) } }
}

extension UInt8: WireValue {}
extension UInt16: WireValue {}
extension UInt32: WireValue {}
extension UInt64: WireValue {}
extension String: WireValue {
    var wire: [UInt8] { Array(utf8) }
}
extension [UInt8]: WireValue {
    var wire: [UInt8] { self }
}

/// A string with its 32-bit length in front.
func counted(_ text: String) -> [UInt8] { bytes(UInt32(text.utf8.count), text) }

extension [UInt8] {
    /// The big-endian integer at an index; 0 where the array is too short, which no expectation takes for right.
    func number<T: FixedWidthInteger>(_ index: Int, as type: T.Type = T.self) -> T {
        guard count - index >= MemoryLayout<T>.size else { return 0 }
        return withUnsafeBytes { $0.bigEndian(index) }
    }
}

/// Option payloads of the handshake.
enum Payload {
    /// Of NBD_OPT_INFO and NBD_OPT_GO.
    static func go(_ name: String, _ wanted: [UInt16] = []) -> [UInt8] {
        bytes(counted(name), UInt16(wanted.count)) + wanted.flatMap { $0.wire }
    }

    /// Of NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT.
    static func contexts(_ name: String, _ queries: [String]) -> [UInt8] {
        bytes(counted(name), UInt32(queries.count)) + queries.flatMap { counted($0) }
    }
}

/// A deterministic sequence of numbers (splitmix64); its seed is printed where a property fails.
struct Dice: RandomNumberGenerator {
    private var state: UInt64
    init(seed: UInt64) { state = seed }

    mutating func next() -> UInt64 {
        state &+= 0x9E37_79B9_7F4A_7C15
        var z = state
        z = (z ^ (z >> 30)) &* 0xBF58_476D_1CE4_E5B9
        z = (z ^ (z >> 27)) &* 0x94D0_49BB_1331_11EB
        return z ^ (z >> 31)
    }
}

/// Whether bytes are those of another row; without optimisation this is much faster than comparing slices.
func isSame(_ left: [UInt8], _ right: ArraySlice<UInt8>) -> Bool {
    guard left.count == right.count else { return false }
    return left.withUnsafeBytes { left in
        right.withUnsafeBytes { right in
            guard let one = left.baseAddress, let other = right.baseAddress else { return left.isEmpty }
            return memcmp(one, other, left.count) == 0
        }
    }
}

/// Whether all bytes have one value.
func isAll(_ bytes: [UInt8], _ value: UInt8) -> Bool {
    isSame(bytes, [UInt8](repeating: value, count: bytes.count)[...])
}
