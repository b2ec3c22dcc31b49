// The client's side of TLS: what it shows, whom it trusts, and the check that the right server has answered.
public import Block
import Glibc
import LinuxIO

/// A digest of a certificate that a server must show.
public struct Fingerprint: Sendable, Equatable, CustomStringConvertible {
    /// How it is computed.
    public enum Algorithm: String, Sendable { case sha1, sha256 }
    /// How it is computed.
    public let algorithm: Algorithm
    /// Its 20 or 32 bytes.
    public let bytes: [UInt8]

    /// A digest as it is.
    init(_ algorithm: Algorithm, _ bytes: [UInt8]) {
        self.algorithm = algorithm
        self.bytes = bytes
    }

    /// Parses sha256:HEX or sha1:HEX, colons between the bytes allowed.
    ///
    /// - Throws: `.invalid` that shows the forms.
    public init(_ text: String) throws(BlockError) {
        let bad = BlockError(
            .invalid, "\(text) is no fingerprint: give sha256: and 64 hexadecimal digits, or sha1: and 40")
        guard let colon = text.firstIndex(of: ":"),
            let algorithm = Algorithm(rawValue: text[..<colon].lowercased().filter { $0 != "-" })
        else { throw bad }
        let digits = text[text.index(after: colon)...].utf8.filter { $0 != UInt8(ascii: ":") }
        guard let bytes = PreSharedKey.bytes(hex: digits[...]), bytes.count == (algorithm == .sha1 ? 20 : 32) else {
            throw bad
        }
        self.init(algorithm, bytes)
    }

    public var description: String {
        let digits = bytes.map { ($0 < 16 ? "0" : "") + String($0, radix: 16, uppercase: true) }
        return "\(algorithm.rawValue):\(digits.joined(separator: ":"))"
    }

    func matches(_ certificate: Certificate) -> Bool {
        bytes == (algorithm == .sha1 ? certificate.sha1 : certificate.sha256)
    }
}

extension Certificate {
    /// The fingerprints to pin the certificate with, the stronger first.
    public var fingerprints: [Fingerprint] { [Fingerprint(.sha256, sha256), Fingerprint(.sha1, sha1)] }
}

/// What a client shows and whom it trusts.
public struct TLSClientOptions: Sendable, Equatable {
    /// A directory as libnbd and QEMU take it: ca-cert.pem, client-cert.pem with client-key.pem, and ca-crl.pem, each
    /// if it is there. Without ca-cert.pem the system's authorities are trusted.
    public var certificates: String?
    /// A file of pre-shared keys. With it, a server that does not use the key is refused.
    public var preSharedKeys: String?
    /// The identity whose key is used; may be left out where the file has only one.
    public var identity: String?
    /// The name that the server's certificate must have, where it is not that of its address.
    public var hostName: String?
    /// Whether the server's certificate is checked. Without that, somebody in between can read and change everything.
    public var verifiesPeer = true
    /// Fingerprints of which the server's certificate must have one. Without a ca-cert.pem nothing else is then asked
    /// of it: neither who signed it, nor its name, nor its dates.
    public var fingerprints: [Fingerprint] = []
    /// Fingerprints of which the certificate must have one, too: who pins a source that has pins can only narrow them.
    public var narrowing: [Fingerprint] = []

    /// The system's authorities, and nothing to show.
    public init() {}

    /// Whether a certificate is pinned.
    var hasPins: Bool { !fingerprints.isEmpty || !narrowing.isEmpty }

    /// Refuses combinations of which a part would have no effect: whoever gives it relies on it.
    func requireSense() throws(BlockError) {
        guard preSharedKeys != nil else {
            guard let identity else { return }
            throw BlockError(
                .invalid,
                "starting TLS: the user \(printable(identity, max: 64)) needs a key: give tls-psk-file=FILE")
        }
        let useless = [
            (certificates != nil, "tls-certificates"), (hasPins, "a fingerprint"), (hostName != nil, "tls-hostname"),
            (!verifiesPeer, "tls-verify-peer=false"),
        ].first { $0.0 }
        guard let useless else { return }
        throw BlockError(
            .invalid,
            "starting TLS: with tls-psk-file, which proves both sides, \(useless.1) has no effect: leave one out")
    }
}

/// Makes sessions of clients and checks whom they have reached. The files are read once.
public final class TLSClientContext: Sendable {
    private let context: TLSContext
    private let options: TLSClientOptions
    private let checksHost: Bool
    // What was shown before, where nothing else is checked.
    private let shown: Fingerprint?

    /// A context from options.
    ///
    /// - Throws: `BlockError` that names the file and what is wrong with it.
    public init(_ options: TLSClientOptions) throws(BlockError) {
        try options.requireSense()
        self.options = options
        shown = nil
        context = try TLSContext(server: false)
        try context.setCiphers(psk: options.preSharedKeys != nil)
        if let path = options.preSharedKeys {
            try context.addKey(try Self.key(path, identity: options.identity))
            // Whom a key proves shows no certificate, and no certificate can take the key's place.
            context.setVerification(.required)
            checksHost = false
            return
        }
        var hasAuthorities = false
        if let directory = options.certificates { hasAuthorities = try Self.addFiles(of: directory, to: context) }
        let pinsOnly = options.hasPins && !hasAuthorities
        checksHost = options.verifiesPeer && !pinsOnly
        if checksHost && !hasAuthorities { try context.addSystemAuthorities() }
        context.setVerification(checksHost ? .required : .off)
    }

    private init(_ other: TLSClientContext, shown: Fingerprint) {
        context = other.context
        options = other.options
        checksHost = other.checksHost
        self.shown = shown
    }

    /// The same, for servers that show this very certificate, if nothing else is asked of them.
    func pinned(to certificate: Certificate) -> TLSClientContext {
        let isChecked = checksHost || options.preSharedKeys != nil || options.hasPins
        return isChecked ? self : TLSClientContext(self, shown: Fingerprint(.sha256, certificate.sha256))
    }

    /// Whether a handshake failed because of the server's certificate.
    func refuses(_ session: TLSSession) -> Bool { checksHost && session.refusesPeer }

    /// Takes what a directory has.
    ///
    /// - Returns: whether authorities are among it.
    private static func addFiles(of directory: String, to context: TLSContext) throws(BlockError) -> Bool {
        let (certificate, key) = ("\(directory)/client-cert.pem", "\(directory)/client-key.pem")
        let (authorities, revocations) = ("\(directory)/ca-cert.pem", "\(directory)/ca-crl.pem")
        let (hasCertificate, hasAuthorities) = (try isThere(certificate), try isThere(authorities))
        if !hasCertificate && !hasAuthorities {
            throw BlockError(
                .notFound, "reading certificates: \(directory) has neither ca-cert.pem nor client-cert.pem")
        }
        if hasCertificate {
            try context.setCertificate(
                try readSecretFile(certificate), key: try readSecretFile(key),
                name: "\(certificate) with the key \(key)")
        }
        if hasAuthorities { try context.addAuthorities(try readSecretFile(authorities), name: authorities) }
        if try isThere(revocations) { try context.addRevocations(try readSecretFile(revocations), name: revocations) }
        return hasAuthorities
    }

    private static func key(_ path: String, identity: String?) throws(BlockError) -> PreSharedKey {
        let keys = try PreSharedKey.parse(try readSecretFile(path), name: path)
        guard let identity else {
            if keys.count == 1 { return keys[0] }
            throw BlockError(
                .invalid, "reading pre-shared keys from \(path): it has \(keys.count); say whose with nbds://USER@HOST")
        }
        guard let key = keys.first(where: { $0.identity == Array(identity.utf8) }) else {
            throw BlockError(.notFound, "reading pre-shared keys from \(path): it has none of \(printable(identity))")
        }
        return key
    }

    /// A session with a server.
    ///
    /// - Parameter host: the name or address that the server was reached by; localhost for a Unix socket.
    public func session(host: String) throws(BlockError) -> TLSSession {
        let name = options.hostName ?? host
        return try TLSSession(context, host: name, checksHost: checksHost, doing: "starting TLS with \(name)")
    }

    /// Checks, when the handshake is done and before anything is said, that the session is with the right server.
    ///
    /// - Throws: `.denied`: the pre-shared key was not used, or the certificate is not one that was pinned.
    public func check(_ session: TLSSession) throws(BlockError) {
        if options.preSharedKeys != nil {
            if session.usedPreSharedKey { return }
            throw BlockError(
                .denied, "starting TLS: the server did not use the pre-shared key, so it may be any server")
        }
        if let shown, session.certificates.first.map(shown.matches) != true {
            throw BlockError(
                .denied,
                "starting TLS: the server shows another certificate than on the first connection. Open it anew")
        }
        for pins in [options.fingerprints, options.narrowing] where !pins.isEmpty {
            try Self.check(session.certificates.first, pins)
        }
    }

    private static func check(_ certificate: Certificate?, _ pins: [Fingerprint]) throws(BlockError) {
        guard let certificate else {
            throw BlockError(
                .denied, "starting TLS: the server shows no certificate whose fingerprint could be checked")
        }
        if pins.contains(where: { $0.matches(certificate) }) { return }
        let expected = pins.map(\.description).joined(separator: " or ")
        let algorithms = Set(pins.map(\.algorithm))
        let shown = certificate.fingerprints.filter { algorithms.contains($0.algorithm) }.map(\.description)
        throw BlockError(
            .denied,
            "starting TLS: the server's certificate is not the one that was pinned: expected \(expected), it has "
                + "\(shown.joined(separator: ", ")). If the server "
                + "was given a new certificate, compare it with `diskgate trust`; if not, "
                + "somebody is in between")
    }
}
