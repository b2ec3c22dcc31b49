// What TLS sessions have in common: keys, certificates, trust, ciphers. Made from bytes, not from files.
public import Block
import COpenSSL

/// A context for sessions of one side.
public final class TLSContext: @unchecked Sendable {
    // Sendable because a context does not change once its maker has shared it, and OpenSSL counts references safely.
    let handle: OpaquePointer
    /// Whether sessions are a server's.
    public let isServer: Bool
    /// Whether pre-shared keys were added.
    private(set) var hasKeys = false

    /// Which certificates a peer has to show.
    public enum Verification: String, Sendable {
        /// None is asked for.
        case off
        /// One that is shown must be good.
        case optional
        /// A good one must be shown.
        case required
    }

    /// A context without keys, which trusts nobody.
    ///
    /// - Throws: `.unsupported` when OpenSSL 3 cannot be loaded.
    public init(server isServer: Bool) throws(BlockError) {
        if let problem = dg_tls_load() {
            throw BlockError(.unsupported, "starting TLS: OpenSSL 3 cannot be loaded: \(String(cString: problem))")
        }
        guard let handle = dg_tls_context_create(isServer) else { throw BlockError(.noMemory, "starting TLS") }
        self.handle = handle
        self.isServer = isServer
    }

    deinit { dg_tls_context_release(handle) }

    /// Chooses the ciphers, strongest wish first: AES-GCM where the processor has instructions for it.
    ///
    /// AES-128-GCM is before AES-256-GCM because a pre-shared key can go with it (its hash is SHA-256), and because it
    /// costs a fifth less; nothing is known that makes it weaker in practice.
    func setCiphers(psk: Bool) throws(BlockError) {
        let aes = dg_cpu_has_aes()
        let tls13 =
            aes
            ? "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256"
            : "TLS_CHACHA20_POLY1305_SHA256:TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384"
        // TLS 1.2: forward secrecy and authenticated encryption only.
        let names = aes ? ["AES128-GCM-SHA256", "AES256-GCM-SHA384", "CHACHA20-POLY1305"] : ["CHACHA20-POLY1305"]
        var tls12 = names.flatMap { ["ECDHE-ECDSA-\($0)", "ECDHE-RSA-\($0)"] }
        if !aes { tls12 += ["ECDHE-ECDSA-AES128-GCM-SHA256", "ECDHE-RSA-AES128-GCM-SHA256"] }
        if psk { tls12 = ["DHE-PSK-AES128-GCM-SHA256", "ECDHE-PSK-CHACHA20-POLY1305"] + tls12 }
        // At level 2, no key, certificate or group below 112 bits of strength is taken, whatever the system says.
        guard dg_tls_context_set_ciphers(handle, (tls12 + ["@SECLEVEL=2"]).joined(separator: ":"), tls13) else {
            throw BlockError(.unsupported, "choosing ciphers: \(Self.reasons())")
        }
    }

    /// Uses a certificate, its issuers behind it, and its key, in PEM. `name` is what the files are to people.
    func setCertificate(_ chain: [UInt8], key: [UInt8], name: String) throws(BlockError) {
        guard dg_tls_context_set_certificate(handle, chain, chain.count, key, key.count) else {
            throw BlockError(.invalid, "using \(name): \(Self.reasons()) (unencrypted PEM is wanted)")
        }
    }

    /// Trusts certificates in PEM.
    func addAuthorities(_ pem: [UInt8], name: String) throws(BlockError) {
        let count = dg_tls_context_add_authorities(handle, pem, pem.count)
        if count < 0 { throw BlockError(.invalid, "reading authorities from \(name): \(Self.reasons())") }
        if count == 0 { throw BlockError(.invalid, "reading authorities from \(name): it has no certificate in PEM") }
    }

    /// Refuses what revocation lists in PEM name, and demands a list that still holds from then on.
    func addRevocations(_ pem: [UInt8], name: String) throws(BlockError) {
        let count = dg_tls_context_add_revocations(handle, pem, pem.count)
        if count < 0 { throw BlockError(.invalid, "reading revocation lists from \(name): \(Self.reasons())") }
        if count == 0 { throw BlockError(.invalid, "reading revocation lists from \(name): it has no list in PEM") }
    }

    func addSystemAuthorities() throws(BlockError) {
        guard dg_tls_context_add_system_authorities(handle) else {
            throw BlockError(.notFound, "reading the system's certificate authorities: \(Self.reasons())")
        }
    }

    func setVerification(_ verification: Verification) {
        switch verification {
        case .off: dg_tls_context_set_verify(handle, DG_TLS_VERIFY_NONE)
        case .optional: dg_tls_context_set_verify(handle, DG_TLS_VERIFY_OPTIONAL)
        case .required: dg_tls_context_set_verify(handle, DG_TLS_VERIFY_REQUIRED)
        }
    }

    func addKey(_ key: PreSharedKey) throws(BlockError) {
        guard dg_tls_context_add_psk(handle, key.identity, key.identity.count, key.key, key.key.count) else {
            throw BlockError(.noMemory, "adding a pre-shared key")
        }
        hasKeys = true
    }

    /// Uses another context for clients that ask for a name its certificate has.
    func addAlternative(_ other: TLSContext) throws(BlockError) {
        guard dg_tls_context_add_alternative(handle, other.handle) else {
            throw BlockError(.noMemory, "adding a certificate")
        }
    }

    /// What OpenSSL says went wrong on this thread.
    static func reasons() -> String {
        var reasons: [String] = []
        var text = [CChar](repeating: 0, count: 256)
        while reasons.count < 8, dg_tls_take_error(&text, text.count) {
            let reason = String(decoding: text.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
            if reasons.last != reason { reasons.append(reason) }
        }
        return reasons.isEmpty ? "no reason given" : reasons.joined(separator: ", ")
    }
}
