// Who a peer is according to TLS: its certificate or its pre-shared key, and how the connection is encrypted.

/// What a certificate says, as far as it matters for who may do what and for people.
public struct Certificate: Sendable, Equatable {
    /// A name that the certificate is valid for (RFC 5280, 4.2.1.6).
    public struct Name: Sendable, Hashable {
        /// The kinds of names that are known here.
        public enum Kind: String, Sendable { case dns = "DNS", ip = "IP", email, uri = "URI" }
        /// The kind.
        public let kind: Kind
        /// The name; of an IP address its text.
        public let text: String

        /// A name.
        public init(kind: Kind, text: String) {
            self.kind = kind
            self.text = text
        }
    }

    /// The subject's distinguished name in the form of RFC 2253: CN=backup,O=Example.
    public var subject = ""
    /// The issuer's distinguished name in the form of RFC 2253.
    public var issuer = ""
    /// The serial number in hexadecimal.
    public var serial = ""
    /// The subject's only common name; nil where it has none or several.
    public var commonName: String?
    /// From when the certificate holds, as YYYY-MM-DD HH:MM:SSZ.
    public var notBefore = ""
    /// Until when the certificate holds, as YYYY-MM-DD HH:MM:SSZ.
    public var notAfter = ""
    /// The 20 bytes of its SHA-1.
    public var sha1: [UInt8] = []
    /// The 32 bytes of its SHA-256.
    public var sha256: [UInt8] = []
    /// The alternative names; only of a peer's own certificate.
    public var names: [Name] = []

    /// A certificate that says nothing.
    public init() {}
}

/// Who is at the other end of a TLS connection.
public struct TLSIdentity: Sendable, Equatable {
    /// The peer's own certificate; nil where it showed none.
    public var certificate: Certificate?
    /// The identity that belongs to the pre-shared key; nil where a certificate was used.
    public var pskIdentity: String?
    /// The protocol, for example TLSv1.3.
    public var version: String
    /// The cipher suite, for example TLS_AES_128_GCM_SHA256.
    public var cipher: String

    /// An identity.
    public init(certificate: Certificate? = nil, pskIdentity: String? = nil, version: String, cipher: String) {
        self.certificate = certificate
        self.pskIdentity = pskIdentity
        self.version = version
        self.cipher = cipher
    }
}

extension TLSIdentity: CustomStringConvertible {
    public var description: String {
        var text = "\(version) \(cipher)"
        if let pskIdentity { text += ", key of \(printable(pskIdentity))" }
        if let certificate { text += ", certificate of \(printable(certificate.subject))" }
        return text
    }
}

/// Text from elsewhere without characters that would steer a terminal or break a log line.
public func printable(_ text: String) -> String {
    String(String.UnicodeScalarView(text.unicodeScalars.map { $0.properties.isPrintable ? $0 : "?" }))
}

extension Unicode.Scalar.Properties {
    fileprivate var isPrintable: Bool {
        switch generalCategory {
        case .control, .format, .lineSeparator, .paragraphSeparator, .surrogate, .unassigned, .privateUse: false
        default: true
        }
    }
}
