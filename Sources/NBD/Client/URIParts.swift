// A URI taken apart strictly (RFC 3986): nothing that was not written there can get into a name, a host or a path.
import Block
import LinuxIO

/// The parts of a URI, percent-decoded.
struct URIParts {
    let scheme: String
    /// What stands before the @.
    let user: String?
    /// A host name, an IPv4 address, or an IPv6 address without its brackets.
    let host: String
    /// The digits behind the host's colon, as they are.
    let port: String?
    /// The path without its first slash.
    let path: String
    /// The parameters in order.
    let query: [(key: String, value: String)]
    private let text: String

    /// Takes SCHEME://[USER@][HOST][:PORT]/PATH?KEY=VALUE&... apart.
    ///
    /// - Throws: `.invalid` that says what is wrong.
    init(_ text: String) throws(BlockError) {
        let shown = printable(text, max: 512)
        func bad(_ what: String) -> BlockError { BlockError(.invalid, "opening \(shown): \(what)") }
        self.text = shown
        let ends = text.split(separator: ":", maxSplits: 1, omittingEmptySubsequences: false)
        guard ends.count == 2, let rest = ends[1].after("//") else { throw bad("it is no URI: write SCHEME://...") }
        scheme = ends[0].lowercased()
        if rest.contains("#") { throw bad("a # inside of a URI is written as %23") }
        let halves = rest.split(separator: "?", maxSplits: 1, omittingEmptySubsequences: false)
        let slash = halves[0].firstIndex(of: "/") ?? halves[0].endIndex
        let authority = halves[0][..<slash]
        guard let path = percentDecoded(halves[0][slash...].dropFirst()) else {
            throw bad(
                "the export's name has a % that is not followed by two hexadecimal digits, a zero byte, or no UTF-8")
        }
        self.path = path
        var items: [(String, String)] = []
        for item in (halves.count == 2 ? halves[1] : "").split(separator: "&") {
            let sides = item.split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
            guard sides.count == 2, let key = percentDecoded(sides[0]), let value = percentDecoded(sides[1]) else {
                throw bad("\(printable(String(item), max: 128)) is no KEY=VALUE (a % is written as %25)")
            }
            items.append((key, value))
        }
        query = items
        var place = authority
        if let at = authority.lastIndex(of: "@") {
            guard let name = percentDecoded(authority[..<at]), !name.isEmpty, !authority[..<at].contains("@"),
                !authority[..<at].contains(":")
            else { throw bad("before the @ stands a name, with no password and no second @") }
            user = name
            place = authority[authority.index(after: at)...]
        } else {
            user = nil
        }
        guard let (host, port) = Self.hostAndPort(place) else {
            throw bad("\(printable(String(place), max: 128)) is no HOST or HOST:PORT (IPv6 addresses in brackets)")
        }
        self.host = host
        self.port = port
    }

    /// An error about this URI.
    func bad(_ what: String) -> BlockError { BlockError(.invalid, "opening \(text): \(what)") }

    private static func hostAndPort(_ text: Substring) -> (host: String, port: String?)? {
        var host = text
        var port: Substring?
        if text.first == "[" {
            guard let close = text.firstIndex(of: "]") else { return nil }
            host = text[text.index(after: text.startIndex)..<close]
            let rest = text[text.index(after: close)...]
            if !rest.isEmpty {
                guard let digits = rest.after(":") else { return nil }
                port = digits
            }
            guard let literal = address6(host) else { return nil }
            return port?.isEmpty == true ? nil : (literal, port.map(String.init))
        }
        if let colon = text.firstIndex(of: ":") {
            host = text[..<colon]
            port = text[text.index(after: colon)...]
            if port?.isEmpty == true { return nil }
        }
        guard let decoded = percentDecoded(host), isHostName(decoded) else { return nil }
        return (decoded, port.map(String.init))
    }

    /// An IPv6 address, with a zone behind %25 if it has one (RFC 6874).
    private static func address6(_ text: Substring) -> String? {
        guard let decoded = percentDecoded(text) else { return nil }
        let parts = decoded.split(separator: "%", maxSplits: 1, omittingEmptySubsequences: false)
        guard let address = parts.first, address.contains(":"), IPAddress(String(address)) != nil else { return nil }
        if parts.count == 2, !isHostName(String(parts[1])) || parts[1].isEmpty { return nil }
        return decoded
    }

    /// Letters, digits, dots, hyphens and underscores, none of the hyphens in front: a name that can never be taken
    /// for an option, a path or a terminal's command. Empty where a scheme needs no host.
    private static func isHostName(_ text: String) -> Bool {
        text.utf8.count <= 255 && text.utf8.first != UInt8(ascii: "-")
            && text.unicodeScalars.allSatisfy {
                $0.isASCII && ($0.properties.isAlphabetic || "0123456789.-_".unicodeScalars.contains($0))
            }
    }
}

/// The value of a hexadecimal digit; nil for anything else.
func hexDigit(_ byte: UInt8) -> UInt8? {
    switch byte {
    case UInt8(ascii: "0")...UInt8(ascii: "9"): byte - UInt8(ascii: "0")
    case UInt8(ascii: "a")...UInt8(ascii: "f"): byte - UInt8(ascii: "a") + 10
    case UInt8(ascii: "A")...UInt8(ascii: "F"): byte - UInt8(ascii: "A") + 10
    default: nil
    }
}

/// Text with %XX replaced by the byte it stands for; nil for a % without two digits, a zero byte, or no UTF-8.
func percentDecoded(_ text: Substring) -> String? {
    var bytes: [UInt8] = []
    var rest = text.utf8[...]
    while let byte = rest.popFirst() {
        if byte == UInt8(ascii: "%") {
            guard let high = rest.popFirst().flatMap(hexDigit), let low = rest.popFirst().flatMap(hexDigit) else {
                return nil
            }
            bytes.append(high << 4 | low)
        } else {
            bytes.append(byte)
        }
        if bytes.last == 0 { return nil }
    }
    return String(validating: bytes, as: UTF8.self)
}

/// Text from outside as it may be shown, cut to a number of characters.
func printable(_ text: String, max limit: Int) -> String {
    let scalars = text.unicodeScalars
    return printable(String(scalars.prefix(limit))) + (scalars.dropFirst(limit).isEmpty ? "" : "...")
}
