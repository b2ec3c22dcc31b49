// Reads JSON text (RFC 8259) whose shape is not known: QEMU's description of its interface has 20,000 values, and the
// library's decoder, which has to guess the type of each, takes a second for them.

/// A position in a JSON text.
struct JSONParser {
    /// The most lists and objects that may lie within each other.
    private static let depthMax = 512

    private let bytes: [UInt8]
    private var position = 0

    /// A text from its beginning.
    init(_ bytes: [UInt8]) { self.bytes = bytes }

    /// The one value of the text; nil where it is malformed.
    mutating func document() -> JSONValue? {
        guard let value = value(depth: 0) else { return nil }
        skipSpace()
        return position == bytes.count ? value : nil
    }

    private var next: UInt8? { position < bytes.count ? bytes[position] : nil }

    private mutating func skipSpace() {
        while let byte = next, byte == 32 || byte == 9 || byte == 10 || byte == 13 { position += 1 }
    }

    private mutating func take(_ character: Character) -> Bool {
        guard next == character.asciiValue else { return false }
        position += 1
        return true
    }

    private mutating func take(_ word: String, _ value: JSONValue) -> JSONValue? {
        guard bytes[position...].starts(with: word.utf8) else { return nil }
        position += word.utf8.count
        return value
    }

    private mutating func value(depth: Int) -> JSONValue? {
        skipSpace()
        switch next.map({ Character(UnicodeScalar($0)) }) {
        case "{": return depth < Self.depthMax ? object(depth: depth + 1) : nil
        case "[": return depth < Self.depthMax ? list(depth: depth + 1) : nil
        case "\"": return string().map { .text($0) }
        case "t": return take("true", .bool(true))
        case "f": return take("false", .bool(false))
        case "n": return take("null", .null)
        case nil: return nil
        default: return number()
        }
    }

    private mutating func object(depth: Int) -> JSONValue? {
        position += 1
        var members: [String: JSONValue] = [:]
        skipSpace()
        if take("}") { return .object(members) }
        while true {
            skipSpace()
            guard let key = string() else { return nil }
            skipSpace()
            guard take(":"), let value = value(depth: depth) else { return nil }
            members[key] = value
            skipSpace()
            if take("}") { return .object(members) }
            if !take(",") { return nil }
        }
    }

    private mutating func list(depth: Int) -> JSONValue? {
        position += 1
        var elements: [JSONValue] = []
        skipSpace()
        if take("]") { return .list(elements) }
        while let value = value(depth: depth) {
            elements.append(value)
            skipSpace()
            if take("]") { return .list(elements) }
            if !take(",") { return nil }
        }
        return nil
    }

    private mutating func number() -> JSONValue? {
        let start = position
        while let byte = next, byte == 43 || byte == 45 || byte == 46 || byte | 32 == 101 || (48...57).contains(byte) {
            position += 1
        }
        let text = String(decoding: bytes[start..<position], as: UTF8.self)
        guard let first = text.utf8.first, first != 43, first != 46 else { return nil }
        if let whole = Int64(text) { return .integer(whole) }
        return Double(text).flatMap { $0.isFinite ? .number($0) : nil }
    }

    private mutating func string() -> String? {
        guard take("\"") else { return nil }
        var text: [UInt8] = []
        while let byte = next {
            position += 1
            switch byte {
            case UInt8(ascii: "\""): return String(validating: text, as: UTF8.self)
            case UInt8(ascii: "\\"):
                guard let scalar = escaped() else { return nil }
                text += Array(String(Character(scalar)).utf8)
            case 0..<32: return nil
            default: text.append(byte)
            }
        }
        return nil
    }

    /// What follows a backslash.
    private mutating func escaped() -> Unicode.Scalar? {
        guard let byte = next else { return nil }
        position += 1
        switch Character(UnicodeScalar(byte)) {
        case "n": return "\n"
        case "t": return "\t"
        case "r": return "\r"
        case "b": return "\u{8}"
        case "f": return "\u{C}"
        case "\"": return "\""
        case "\\": return "\\"
        case "/": return "/"
        case "u": break
        default: return nil
        }
        guard let first = unit() else { return nil }
        guard UTF16.isLeadSurrogate(first) else { return Unicode.Scalar(first) }
        guard take("\\"), take("u"), let second = unit(), UTF16.isTrailSurrogate(second) else { return nil }
        return UTF16.decode(UTF16.EncodedScalar([first, second]))
    }

    private mutating func unit() -> UInt16? {
        guard bytes.count - position >= 4 else { return nil }
        let digits = String(decoding: bytes[position..<position + 4], as: UTF8.self)
        guard digits.allSatisfy(\.isHexDigit) else { return nil }
        position += 4
        return UInt16(digits, radix: 16)
    }
}
