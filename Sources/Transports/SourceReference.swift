// The source grammar: what a user writes to name a disk, taken apart. Nothing is opened here.
public import Block
import LinuxIO
public import NBD

/// A disk as a user names it: a path or a URI.
public struct SourceReference: Sendable, Equatable, CustomStringConvertible {
    /// What the reference names.
    public enum Kind: Sendable, Equatable {
        /// A file or a block node by its path.
        case path(String)
        /// A repeatable pattern of a number of bytes.
        case pattern(size: UInt64)
        /// Zeros in memory, of a number of bytes.
        case memory(size: UInt64)
        /// An export of an NBD server.
        case nbd(NBDURI)
        /// A disk of a restore point.
        case point(PointReference)
        /// A SCSI disk that was, or is to be, hot-added to this machine.
        case hotAdd(HotAddReference)
        /// A LUN that this machine sees, or a file of a datastore on such LUNs.
        case san(SANReference)
        /// A logical unit of an iSCSI target, reached without the kernel.
        case iscsi(ISCSIReference)
    }

    /// What the reference names.
    public let kind: Kind
    /// The query of a URI, in order: ?format=raw&direct=true.
    public let parameters: [(key: String, value: String)]
    /// As the user wrote it.
    public let description: String

    public static func == (left: Self, right: Self) -> Bool { left.description == right.description }

    /// URI schemes that name sources this version cannot open, and what they would be.
    static let notYet = ["vddk": "a VDDK disk"]

    /// Takes a reference apart: PATH, file:PATH or file:///PATH, pattern:SIZE, memory:SIZE, point:POINT, hotadd:DISK,
    /// san:LUN, iscsi://HOST/TARGET/LUN, NBD URIs, with ?KEY=VALUE&...
    ///
    /// - Throws: `.invalid` for a malformed reference, `.unsupported` for a scheme that cannot be opened here.
    public init(_ text: String) throws(BlockError) {
        description = text
        if text.utf8.contains(0) { throw BlockError(.invalid, "a source with a zero byte in it names nothing") }
        guard let colon = text.firstIndex(of: ":"), Self.isScheme(text[..<colon]) else {
            if text.isEmpty { throw BlockError(.invalid, "a source is missing: give a path or a URI") }
            kind = .path(text)
            parameters = []
            return
        }
        let scheme = text[..<colon].lowercased()
        if NBDURI.schemes.contains(scheme) {
            let uri = try NBDURI(text)
            kind = .nbd(uri)
            parameters = uri.format.map { [("format", $0)] } ?? []
            return
        }
        let (body, query) = Self.split(text[text.index(after: colon)...])
        // Somebody may have written a password there, which is not to be repeated.
        parameters = try Self.parameters(query, of: scheme == "iscsi" ? "an iscsi: source" : text)
        switch scheme {
        case "file": kind = .path(try Self.filePath(body, of: text))
        case "pattern": kind = .pattern(size: try ByteCount(String(body)).bytes)
        case "point": kind = .point(try Self.point(body, parameters, of: text))
        case "hotadd": kind = .hotAdd(try Self.hotAdd(body, parameters, of: text))
        case "san": kind = .san(try Self.san(body, of: text))
        case "iscsi": kind = .iscsi(try ISCSIReference(body, parameters, decode: Self.decoded))
        case "memory": kind = .memory(size: try ByteCount(String(body)).bytes)
        default:
            if let what = Self.notYet[scheme] {
                throw BlockError(.unsupported, "opening \(text): \(what) cannot be opened by this version of diskgate")
            }
            throw BlockError(
                .invalid, "opening \(text): \(scheme): is no kind of source (for a file of this name write ./\(text))")
        }
    }

    /// The same source, whose server has to show a certificate with one of these fingerprints, and one of those that
    /// the source itself names, if it does.
    ///
    /// - Throws: `.invalid` when the source is reached without TLS, so that there would be no certificate.
    public func pinned(to fingerprints: [Fingerprint]) throws(BlockError) -> SourceReference {
        guard case .nbd(var uri) = kind, var tls = uri.tls else {
            throw BlockError(
                .invalid, "opening \(self): a fingerprint needs a server with a certificate (nbds://, nbds+unix://)")
        }
        if tls.fingerprints.isEmpty { tls.fingerprints = fingerprints } else { tls.narrowing = fingerprints }
        uri.tls = tls
        return SourceReference(kind: .nbd(uri), parameters: parameters, description: description)
    }

    private init(kind: Kind, parameters: [(key: String, value: String)], description: String) {
        self.kind = kind
        self.parameters = parameters
        self.description = description
    }

    private static func isScheme(_ text: Substring) -> Bool {
        guard let first = text.unicodeScalars.first, first.properties.isAlphabetic, first.isASCII else { return false }
        return text.unicodeScalars.allSatisfy {
            $0.isASCII && ($0.properties.isAlphabetic || "+-.0123456789".unicodeScalars.contains($0))
        }
    }

    private static func split(_ text: Substring) -> (Substring, Substring) {
        guard let mark = text.firstIndex(of: "?") else { return (text, "") }
        return (text[..<mark], text[text.index(after: mark)...])
    }

    private static func parameters(_ query: Substring, of text: String) throws(BlockError) -> [(String, String)] {
        var parameters: [(String, String)] = []
        for item in query.split(separator: "&") {
            let parts = item.split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
            // A last % begins no %XX: people write shares as 30%, without thinking of the URI around them.
            let isShare = parts.count == 2 && parts[1].last == "%"
            guard parts.count == 2, let key = decoded(parts[0]),
                let value = decoded(isShare ? parts[1].dropLast() : parts[1])
            else { throw BlockError(.invalid, "opening \(text): \(item) is no KEY=VALUE") }
            parameters.append((key, isShare ? value + "%" : value))
        }
        return parameters
    }

    private static func point(_ body: Substring, _ parameters: [(key: String, value: String)], of text: String)
        throws(BlockError) -> PointReference
    {
        func value(_ key: String) -> String? { parameters.last { $0.key == key }?.value }
        guard let point = decoded(body), !point.isEmpty, let repository = value("repository"), !repository.isEmpty
        else {
            throw BlockError(
                .invalid,
                "opening \(text): write point:POINT?repository=DIRECTORY, with &vm=VM and &disk=DISK where "
                    + "there are several")
        }
        return PointReference(
            point: point, repository: repository, machine: value("vm"), disk: value("disk"))
    }

    private static func san(_ body: Substring, of text: String) throws(BlockError) -> SANReference {
        guard let whole = decoded(body) else {
            throw BlockError(.invalid, "opening \(text): its name has a %XX that stands for no text")
        }
        let parts = body.split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
        return try san(parts[0], parts.count == 2 ? decoded(parts[1]) : nil, body: whole, of: text)
    }

    private static func hotAdd(
        _ body: Substring, _ parameters: [(key: String, value: String)], of text: String
    ) throws(BlockError) -> HotAddReference {
        let parts = body.split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
        return try hotAdd(parts[0], parts.count == 2 ? decoded(parts[1]) : nil, parameters, of: text)
    }

    private static func filePath(_ body: Substring, of text: String) throws(BlockError) -> String {
        var path = body
        if let rest = body.after("//") {
            guard rest.first == "/" || rest.hasPrefix("localhost/") else {
                throw BlockError(.invalid, "opening \(text): a file URI names no other host: write file:///PATH")
            }
            path = rest.first == "/" ? rest : rest.dropFirst("localhost".count)
        }
        guard let decoded = decoded(path), !decoded.isEmpty else {
            throw BlockError(.invalid, "opening \(text): the path is empty or malformed")
        }
        return decoded
    }

    /// Text with %XX replaced by the byte it stands for; nil when that is a zero byte or makes no UTF-8.
    private static func decoded(_ text: Substring) -> String? {
        var bytes: [UInt8] = []
        var rest = text.utf8[...]
        while let byte = rest.popFirst() {
            guard byte == UInt8(ascii: "%") else {
                bytes.append(byte)
                continue
            }
            let digits = rest.prefix(2)
            let isHex = digits.allSatisfy { Character(UnicodeScalar($0)).isHexDigit }
            guard isHex, digits.count == 2, let value = UInt8(String(decoding: digits, as: UTF8.self), radix: 16) else {
                // A percent sign that stands for itself: allocated=30%.
                bytes.append(byte)
                continue
            }
            if value == 0 { return nil }
            bytes.append(value)
            rest = rest.dropFirst(2)
        }
        return String(validating: bytes, as: UTF8.self)
    }

    /// The value of a parameter.
    public func parameter(_ key: String) -> String? { parameters.last { $0.key == key }?.value }

    /// A parameter that is true or false; false where it is missing.
    func flag(_ key: String) throws(BlockError) -> Bool { try Self.flag(key, parameter(key), of: description) }

    /// Whether a parameter's value is true or false; false where it is missing.
    static func flag(_ key: String, _ value: String?, of text: String) throws(BlockError) -> Bool {
        switch value {
        case nil, "false", "no", "0": return false
        case "true", "yes", "1": return true
        case .some(let value):
            throw BlockError(.invalid, "opening \(text): \(key)=\(value) is neither true nor false")
        }
    }

    /// Refuses parameters that mean nothing for this kind of source.
    func allow(_ keys: Set<String>) throws(BlockError) {
        if let other = parameters.first(where: { !keys.contains($0.key) }) {
            throw BlockError(
                .invalid,
                "opening \(self): the parameter \(other.key) means nothing here (known: "
                    + "\(keys.sorted().joined(separator: ", ")))")
        }
    }
}

/// A number of bytes as people write it: 512, 64K, 10M, 1G, 2T, 1P, powers of 1024.
public struct ByteCount: Sendable, Equatable {
    /// The bytes.
    public let bytes: UInt64

    /// Parses digits and one optional suffix, in either case, with an optional "iB" behind it.
    ///
    /// - Throws: `.invalid` when malformed or above 2^63-1.
    public init(_ text: String) throws(BlockError) {
        let digits = text.prefix { $0.isASCII && $0.isNumber }
        var suffix = text[digits.endIndex...].lowercased()
        // "iB" belongs behind a letter. (Only ASCII: the Kelvin sign, for one, becomes a k in lower case.)
        if suffix.hasSuffix("ib"), let letter = suffix.first, "kmgtpe".contains(letter) { suffix.removeLast(2) }
        let shifts: [String: UInt64] = ["": 0, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60]
        guard let number = UInt64(digits), text.utf8.allSatisfy({ $0 < 128 }), let shift = shifts[suffix] else {
            throw BlockError(.invalid, "\(text) is no number of bytes: give digits and one of K, M, G, T, P")
        }
        let (product, overflow) = number.multipliedReportingOverflow(by: 1 << shift)
        guard !overflow, product <= UInt64(Int64.max) else {
            throw BlockError(.tooLarge, "\(text) is more bytes than any disk has")
        }
        bytes = product
    }
}
