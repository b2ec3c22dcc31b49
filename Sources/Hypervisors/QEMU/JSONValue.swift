// JSON whose shape is not known beforehand: what QEMU's monitor and the guest agent say.
import FoundationEssentials

/// A JSON value.
enum JSONValue: Sendable, Equatable {
    case null
    case bool(Bool)
    case integer(Int64)
    case number(Double)
    case text(String)
    case list([JSONValue])
    case object([String: JSONValue])

    /// A member of an object; nil where there is none.
    subscript(_ key: String) -> JSONValue? {
        guard case .object(let members) = self else { return nil }
        return members[key]
    }

    /// The text; nil for all else.
    var string: String? { if case .text(let text) = self { text } else { nil } }
    /// The truth; nil for all else.
    var truth: Bool? { if case .bool(let truth) = self { truth } else { nil } }
    /// The whole number; nil for all else.
    var whole: Int64? { if case .integer(let whole) = self { whole } else { nil } }
    /// The elements; none for all else.
    var elements: [JSONValue] { if case .list(let elements) = self { elements } else { [] } }
}

extension JSONValue: Encodable {
    func encode(to encoder: any Encoder) throws {
        var single = encoder.singleValueContainer()
        switch self {
        case .null: try single.encodeNil()
        case .bool(let value): try single.encode(value)
        case .integer(let value): try single.encode(value)
        case .number(let value): try single.encode(value)
        case .text(let value): try single.encode(value)
        case .list(let value): try single.encode(value)
        case .object(let value): try single.encode(value)
        }
    }

    /// A value from JSON text; nil where it is none.
    init?(parsing bytes: some Sequence<UInt8>) {
        var parser = JSONParser(Array(bytes))
        guard let value = parser.document() else { return nil }
        self = value
    }

    /// JSON text without line breaks.
    var encoded: [UInt8] {
        let encoder = JSONEncoder()
        encoder.outputFormatting = [.sortedKeys, .withoutEscapingSlashes]
        return (try? encoder.encode(self)).map { Array($0) } ?? []
    }

    /// JSON text for people.
    var pretty: [UInt8] {
        let encoder = JSONEncoder()
        encoder.outputFormatting = [.sortedKeys, .withoutEscapingSlashes, .prettyPrinted]
        return (try? encoder.encode(self)).map { Array($0) + [UInt8(ascii: "\n")] } ?? []
    }
}

extension JSONValue: ExpressibleByStringLiteral, ExpressibleByBooleanLiteral, ExpressibleByIntegerLiteral,
    ExpressibleByArrayLiteral, ExpressibleByDictionaryLiteral
{
    init(stringLiteral value: String) { self = .text(value) }
    init(booleanLiteral value: Bool) { self = .bool(value) }
    init(integerLiteral value: Int64) { self = .integer(value) }
    init(arrayLiteral elements: JSONValue...) { self = .list(elements) }
    init(dictionaryLiteral elements: (String, JSONValue)...) {
        self = .object(Dictionary(elements) { $1 })
    }
}
