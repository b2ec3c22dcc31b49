// How a user names a virtual machine: the URI, taken apart. Nothing is asked of a hypervisor here.
import Block
import LinuxIO

/// The parts of a virtual machine's URI: SCHEME:BODY?KEY=VALUE&...
struct MachineURI: Sendable {
    /// In lower case.
    let scheme: String
    /// What stands between the scheme and the parameters.
    let body: String
    /// In order.
    let parameters: [(key: String, value: String)]
    /// As the user wrote it.
    let text: String

    /// Takes a URI apart.
    ///
    /// - Throws: `.invalid` that says what is wrong.
    init(_ text: String) throws(BlockError) {
        self.text = text
        guard let colon = text.firstIndex(of: ":"), colon > text.startIndex, !text.utf8.contains(0) else {
            throw BlockError(
                .invalid,
                "opening the machine \(text): it is no URI of a machine: give \(Hypervisors.forms)")
        }
        scheme = text[..<colon].lowercased()
        let rest = text[text.index(after: colon)...]
        let mark = rest.firstIndex(of: "?") ?? rest.endIndex
        guard let body = Self.decoded(rest[..<mark]) else {
            throw BlockError(.invalid, "opening the machine \(text): it has a %XX that stands for no text")
        }
        self.body = body
        var parameters: [(String, String)] = []
        for item in rest[mark...].dropFirst().split(separator: "&") {
            let sides = item.split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
            guard sides.count == 2, let key = Self.decoded(sides[0]), let value = Self.decoded(sides[1]) else {
                throw BlockError(.invalid, "opening the machine \(text): \(item) is no KEY=VALUE")
            }
            parameters.append((key, value))
        }
        self.parameters = parameters
    }

    /// The value of a parameter; nil where it is missing.
    func parameter(_ key: String) -> String? { parameters.last { $0.key == key }?.value }

    /// Refuses parameters that mean nothing.
    func allow(_ keys: [String]) throws(BlockError) {
        if let other = parameters.first(where: { !keys.contains($0.key) }) {
            throw bad("the parameter \(other.key) means nothing here (known: \(keys.joined(separator: ", ")))")
        }
        if let empty = parameters.first(where: { $0.value.isEmpty }) { throw bad("\(empty.key) is empty") }
    }

    /// Refuses a path that means another file in another working directory: a crashed run is cleaned up from there.
    func requireAbsolute(_ path: String, _ what: String) throws(BlockError) {
        if !path.hasPrefix("/") { throw bad("\(what) \(path) is relative: give an absolute path") }
    }

    /// An error about this URI.
    func bad(_ what: String) -> BlockError { BlockError(.invalid, "opening the machine \(text): \(what)") }

    /// Text with %XX replaced by the byte it stands for; nil when that makes no text.
    private static func decoded(_ text: Substring) -> String? {
        var bytes: [UInt8] = []
        var rest = text.utf8[...]
        while let byte = rest.popFirst() {
            guard byte == UInt8(ascii: "%") else {
                bytes.append(byte)
                continue
            }
            let digits = rest.prefix(2)
            guard digits.count == 2, digits.allSatisfy({ Character(UnicodeScalar($0)).isHexDigit }),
                let value = UInt8(String(decoding: digits, as: UTF8.self), radix: 16), value != 0
            else { return nil }
            bytes.append(value)
            rest = rest.dropFirst(2)
        }
        return String(validating: bytes, as: UTF8.self)
    }
}

/// HOST:PORT or [V6]:PORT, taken apart; nil where it is neither.
func hostAndPort(_ text: String) -> (host: String, port: UInt16)? {
    guard let colon = text.lastIndex(of: ":"), let port = UInt16(text[text.index(after: colon)...]), port > 0 else {
        return nil
    }
    var host = text[..<colon]
    if host.first == "[" && host.last == "]" {
        host = host.dropFirst().dropLast()
    } else if host.contains(":") {
        return nil
    }
    return host.isEmpty ? nil : (String(host), port)
}
