// Who may use an export: rules on the address, the process or the TLS credentials of a client.
public import Block
public import LinuxIO

/// Who a client is: where it connects from, and what it has shown over TLS.
public struct Credentials: Sendable, Equatable {
    /// The other end of its connection.
    public var peer: Peer
    /// What it has shown over TLS; nil on a connection in clear text.
    public var tls: TLSIdentity?

    /// Credentials.
    public init(peer: Peer, tls: TLSIdentity? = nil) {
        self.peer = peer
        self.tls = tls
    }
}

/// A rule that admits clients. Where there are rules, a client that none admits does not learn that an export exists.
public struct AllowRule: Sendable, Equatable {
    /// What a client has to fulfil.
    public enum Condition: Sendable, Equatable {
        /// Its address starts with these bits; v4 rules admit v4 addresses only.
        case network(address: [UInt8], prefixLength: Int)
        /// It is a process of a user at a Unix socket.
        case uid(UInt32)
        /// It is a process of a group at a Unix socket.
        case gid(UInt32)
        /// It is a virtual machine with this context id.
        case cid(UInt32)
        /// It uses TLS, whatever it shows.
        case tls
        /// It has the pre-shared key of an identity.
        case preSharedKey(String)
        /// Its certificate has exactly this subject, in the form of RFC 2253.
        case subject(String)
        /// Its certificate's only common name is this.
        case commonName(String)
        /// Its certificate is valid for this name. A DNS name may begin with *. for any one label.
        case name(Certificate.Name)
        /// It asks for the export of this name.
        case export(String)
    }

    /// All of these must hold.
    public let conditions: [Condition]
    /// Whether clients that come in by this rule alone may not write.
    public let isReadOnly: Bool

    /// What the conditions look like, for messages and help.
    public static let forms =
        "address=ADDRESS[/BITS], uid=N, gid=N, cid=N, tls, psk=IDENTITY, subject=DN, cn=NAME, dns=NAME, ip=ADDRESS, "
        + "email=ADDRESS, uri=URI or export=NAME, several joined by \" and \", with \" and read-only\" if they may "
        + "not write"

    /// Parses conditions joined by " and ".
    ///
    /// - Throws: `.invalid` that shows the forms.
    public init(_ text: String) throws(BlockError) {
        var conditions: [Condition] = []
        var isReadOnly = false
        for part in Self.parts(text) {
            if part == "read-only" {
                isReadOnly = true
            } else if let condition = Self.condition(part) {
                conditions.append(condition)
            } else {
                throw BlockError(.invalid, "\(text) is no rule for clients: \(part) is none of \(Self.forms)")
            }
        }
        let isEmpty = conditions.allSatisfy { if case .export = $0 { true } else { false } }
        if isEmpty && !isReadOnly {
            throw BlockError(.invalid, "\(text) is no rule for clients: it says nothing about them; give \(Self.forms)")
        }
        self.conditions = conditions
        self.isReadOnly = isReadOnly
    }

    private static let keys = [
        "address=", "uid=", "gid=", "cid=", "psk=", "subject=", "cn=", "dns=", "ip=", "email=", "uri=", "export=",
    ]

    /// Splits at " and ", but only where a condition follows: the names in rules may hold the word, too.
    private static func parts(_ text: String) -> [String] {
        var parts: [String] = []
        for piece in text.split(separator: " and ", omittingEmptySubsequences: false) {
            let isCondition = piece == "tls" || piece == "read-only" || keys.contains { piece.hasPrefix($0) }
            if isCondition || parts.isEmpty {
                parts.append(String(piece))
            } else {
                parts[parts.count - 1] += " and \(piece)"
            }
        }
        return parts
    }

    private static func condition(_ text: String) -> Condition? {
        if text == "tls" { return .tls }
        guard let key = keys.first(where: { text.hasPrefix($0) }), let value = text.after(key),
            !value.isEmpty || key == "export="
        else { return nil }
        let word = String(value)
        switch key {
        case "address=": return network(value)
        case "uid=": return number(value).map { .uid($0) }
        case "gid=": return number(value).map { .gid($0) }
        case "cid=": return number(value).map { .cid($0) }
        case "psk=": return .preSharedKey(word)
        case "subject=": return .subject(word)
        case "cn=": return .commonName(word)
        case "dns=": return .name(Certificate.Name(kind: .dns, text: word))
        case "ip=": return IPAddress(word).map { .name(Certificate.Name(kind: .ip, text: $0.description)) }
        case "email=": return .name(Certificate.Name(kind: .email, text: word))
        case "uri=": return .name(Certificate.Name(kind: .uri, text: word))
        default: return .export(word)
        }
    }

    /// A number of digits only: integers of Swift take a sign.
    private static func number(_ text: Substring) -> UInt32? {
        text.utf8.allSatisfy { (UInt8(ascii: "0")...UInt8(ascii: "9")).contains($0) } ? UInt32(text) : nil
    }

    private static func network(_ text: Substring) -> Condition? {
        let parts = text.split(separator: "/", maxSplits: 1, omittingEmptySubsequences: false)
        guard let first = parts.first, let address = IPAddress(String(first)) else { return nil }
        let bits = address.bytes.count * 8
        guard parts.count == 2 else { return .network(address: address.bytes, prefixLength: bits) }
        guard let length = number(parts[1]).flatMap({ Int(exactly: $0) }), length <= bits else { return nil }
        return .network(address: address.bytes, prefixLength: length)
    }

    /// Whether the rule admits a client to the export of a name.
    public func admits(_ client: Credentials, to export: String) -> Bool {
        conditions.allSatisfy { $0.holds(for: client, export: export) }
    }
}

extension AllowRule.Condition {
    func holds(for client: Credentials, export: String) -> Bool {
        let certificate = client.tls?.certificate
        switch (self, client.peer) {
        case (.uid(let wanted), .unix(_, let uid, _)): return wanted == uid
        case (.gid(let wanted), .unix(_, _, let gid)): return wanted == gid
        case (.cid(let wanted), .vsock(let cid, _)): return wanted == cid
        case (.network(let network, let length), .ip(let address)):
            return network.count == address.bytes.count
                && (0..<length).allSatisfy { bit in
                    (network[bit / 8] ^ address.bytes[bit / 8]) & (0x80 >> UInt8(bit % 8)) == 0
                }
        case (.uid, _), (.gid, _), (.cid, _), (.network, _): return false
        case (.tls, _): return client.tls != nil
        case (.preSharedKey(let identity), _): return isSame(client.tls?.pskIdentity, identity)
        case (.subject(let subject), _): return isSame(certificate?.subject, subject)
        case (.commonName(let name), _): return isSame(certificate?.commonName, name)
        case (.name(let name), _): return certificate?.names.contains { name.covers($0) } ?? false
        case (.export(let name), _): return isSame(export, name)
        }
    }
}

/// Whether two texts are the same bytes. Strings of Swift are equal when they look equal, which names must not be.
private func isSame(_ one: String?, _ other: String) -> Bool { one.map { $0.utf8.elementsEqual(other.utf8) } ?? false }

/// Text with A to Z in lower case, and nothing else changed; nil if it is not all ASCII, as names of hosts are.
private func lowerCase(_ text: String) -> String? {
    let bytes = text.utf8.map { $0 >= UInt8(ascii: "A") && $0 <= UInt8(ascii: "Z") ? $0 | 0x20 : $0 }
    return bytes.allSatisfy { $0 < 0x80 } ? String(decoding: bytes, as: UTF8.self) : nil
}

extension Certificate.Name {
    /// Whether this name in a rule means a name of a certificate. A certificate's own wildcards stand for themselves.
    func covers(_ name: Certificate.Name) -> Bool {
        guard kind == name.kind else { return false }
        guard kind == .dns else { return isSame(name.text, text) }
        guard let other = lowerCase(name.text), let text = lowerCase(text) else { return false }
        guard let tail = text.after("*."), let dot = other.firstIndex(of: ".") else { return text == other }
        return !tail.isEmpty && dot != other.startIndex && other[other.index(after: dot)...] == tail
    }
}

/// What a client may do with an export.
public enum Admission: Sendable {
    /// Nothing; it does not learn that the export exists.
    case refused
    /// It may read.
    case readOnly
    /// It may do whatever the export allows.
    case full
}

extension Export {
    /// What the rules let a client do; without rules everybody may do everything.
    public func admission(of client: Credentials) -> Admission {
        if options.allow.isEmpty { return .full }
        let rules = options.allow.filter { $0.admits(client, to: name) }
        if rules.isEmpty { return .refused }
        return rules.allSatisfy(\.isReadOnly) ? .readOnly : .full
    }
}
