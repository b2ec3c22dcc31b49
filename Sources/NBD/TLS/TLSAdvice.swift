// Why a TLS handshake failed, in words that say what to do about it.

/// Explains failures to one of the two sides.
struct TLSAdvice {
    /// Whether it is the server that explains.
    let isServer: Bool
    /// Whether this side has pre-shared keys.
    let hasKeys: Bool

    private var peer: String { isServer ? "the client" : "the server" }

    /// What went wrong, from what OpenSSL says.
    ///
    /// - Parameters:
    ///   - refusal: why this side refused the peer's certificate: OpenSSL's number (X509_V_ERR_...) and text.
    ///   - reasons: reasons of OpenSSL's error queue, alerts of the peer among them.
    ///   - unknownIdentity: the identity of a pre-shared key that the client named and nobody has.
    func explain(refusal: (code: Int32, text: String)?, reasons: String, unknownIdentity: String?) -> String {
        // 1 is what stands there before a certificate was looked at.
        if let refusal, refusal.code != 1 {
            return "\(peer)'s certificate is refused: \(refusal.text)" + (why(refusal.code).map { "; \($0)" } ?? "")
        }
        if let unknownIdentity {
            return "no key for the identity \"\(printable(unknownIdentity))\": it is not in the file of --tls-psk"
        }
        for (word, text) in isServer ? seenByServer : seenByClient where reasons.contains(word) {
            return "\(text) (\(reasons))"
        }
        return reasons == "no reason given" ? "\(peer) broke off the handshake" : reasons
    }

    /// What to do about a refused certificate, by X509_V_ERR number (openssl/x509_vfy.h).
    private func why(_ code: Int32) -> String? {
        let authorities = isServer ? "--tls-ca" : "ca-cert.pem in tls-certificates, or pin it with fingerprint"
        switch code {
        case 2, 19, 20, 21, 27: return "its issuer is not among the authorities that are trusted here (\(authorities))"
        case 18: return "it is signed by itself; add it to what is trusted (\(authorities))"
        case 9: return "it is not valid yet; compare the clocks of both machines"
        case 10: return "renew it, or compare the clocks of both machines"
        case 23: return "its issuer has revoked it; \(peer) needs a new one"
        case 3: return "the revocation list of its issuer is missing in the file of revocation lists"
        case 11, 12: return "the revocation list has run out; get a new one from its issuer"
        case 26: return "it is not meant for \(isServer ? "clients (extended key usage clientAuth)" : "servers")"
        case 62, 64: return "it is for another host; use its name, or say which name it has with tls-hostname"
        default: return nil
        }
    }

    /// Words of OpenSSL's reasons, the more telling first, and what they mean to a server.
    private var seenByServer: [(String, String)] {
        [
            (
                "peer did not return a certificate",
                "the client showed no certificate: it needs one of an authority in --tls-ca"
            ),
            ("alert unknown ca", "the client does not trust the certificate of this server: give it the authority's"),
            ("alert certificate expired", "the client finds the certificate of this server expired: renew it"),
            ("alert bad certificate", "the client refuses the certificate of this server"),
            ("alert certificate revoked", "the client finds the certificate of this server revoked"),
            ("alert certificate unknown", "the client refuses the certificate of this server"),
            ("binder does not verify", "the client has another key for its identity than this server"),
            ("digest check failed", "the client has another key for its identity than this server"),
            (
                "decryption failed or bad record mac",
                hasKeys
                    ? "the client has another key for its identity than this server, or bytes were changed on their way"
                    : "bytes were changed on their way"
            ),
            ("no suitable signature algorithm", "the client can use neither a key nor a certificate that is here"),
            ("no shared cipher", "the client has no way of authentication or encryption in common with this server"),
            ("unsupported protocol", "the client speaks only versions before TLS 1.2"),
            ("wrong version number", "what the client sent is not TLS"),
            ("http request", "what the client sent is not TLS"),
        ]
    }

    private var seenByClient: [(String, String)] {
        [
            (
                "alert certificate required",
                "the server wants a certificate from this client: give client-cert.pem and client-key.pem in "
                    + "tls-certificates"
            ),
            ("alert unknown ca", "the server does not trust the authority of this client's certificate"),
            ("alert certificate expired", "the server finds this client's certificate expired: renew it"),
            ("alert certificate revoked", "the server finds this client's certificate revoked: get a new one"),
            ("alert bad certificate", "the server refuses this client's certificate"),
            ("alert unknown psk identity", "the server has no key for this identity: compare tls-psk-file and user"),
            ("alert decrypt error", "the server has another key for this identity: compare both files"),
            (
                "alert bad record mac",
                hasKeys
                    ? "the server has another key for this identity, or bytes were changed on their way"
                    : "bytes were changed on their way"
            ),
            ("alert illegal parameter", "the server refuses the key or the identity: compare both files"),
            (
                "alert handshake failure",
                "the server has no way of authentication or encryption in common with this one, or no key for this "
                    + "identity"
            ),
            ("alert insufficient security", "the server wants stronger encryption"),
            ("wrong version number", "what the server sent is not TLS"),
        ]
    }
}
