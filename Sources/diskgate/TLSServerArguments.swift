// Options of `serve` about TLS: which files, and what clients have to show.
import ArgumentParser
import Block
import Logging
import NBD

struct TLSServerArguments: ParsableArguments {
    @Option(
        help: ArgumentHelp(
            "off: no TLS, said aloud, which listening beyond this machine needs; allow: clients may use TLS; require: "
                + "clients learn nothing without (the default when keys or certificates are given).",
            valueName: "mode"))
    var tls: String?

    @Option(help: ArgumentHelp("Certificate in PEM, its issuers behind it. May be repeated (SNI).", valueName: "file"))
    var tlsCert: [String] = []

    @Option(help: ArgumentHelp("Key of the certificate in PEM; once per certificate.", valueName: "file"))
    var tlsKey: [String] = []

    @Option(
        help: ArgumentHelp(
            "Authorities in PEM. Clients then have to show a certificate of one of them.", valueName: "file"))
    var tlsCa: String?

    @Option(help: ArgumentHelp("Revocation lists in PEM for clients' certificates.", valueName: "file"))
    var tlsCrl: String?

    @Option(
        help: ArgumentHelp(
            "Directory with server-cert.pem, server-key.pem and, if they are there, ca-cert.pem and ca-crl.pem, as "
                + "QEMU and nbdkit take it.", valueName: "directory"))
    var tlsCertificates: String?

    @Option(help: ArgumentHelp("Pre-shared keys, lines of IDENTITY:HEXKEY, as psktool makes them.", valueName: "file"))
    var tlsPsk: String?

    @Option(
        help: ArgumentHelp(
            "Whether clients show a certificate: off, optional or required (the default where there are authorities).",
            valueName: "how"))
    var tlsVerifyPeer: String?

    @Option(help: ArgumentHelp("auto: the kernel encrypts what is sent where it can (kTLS); off.", valueName: "how"))
    var ktls = "auto"

    private var hasFiles: Bool { !tlsCert.isEmpty || tlsCertificates != nil || tlsPsk != nil }

    func validate() throws {
        if let tls, TLSPolicy(rawValue: tls) == nil { throw ValidationError("--tls is off, allow or require.") }
        let others = !tlsKey.isEmpty || tlsCa != nil || tlsCrl != nil || tlsVerifyPeer != nil
        if tls == "off" && (hasFiles || others) { throw ValidationError("--tls off takes no files.") }
        if (tls == "allow" || tls == "require" || others) && !hasFiles {
            throw ValidationError("TLS needs --tls-cert and --tls-key, --tls-certificates or --tls-psk.")
        }
        if tlsCert.count != tlsKey.count { throw ValidationError("Give one --tls-key for each --tls-cert.") }
        if let tlsVerifyPeer, TLSContext.Verification(rawValue: tlsVerifyPeer) == nil {
            throw ValidationError("--tls-verify-peer is off, optional or required.")
        }
        if ktls != "auto" && ktls != "off" { throw ValidationError("--ktls is auto or off.") }
    }

    /// Whether something was said about TLS, be it that there is none.
    var isSaidAloud: Bool { tls != nil || hasFiles }

    /// The server's TLS; nil without.
    func server(log: Logger) throws -> TLSServer? {
        let policy = tls.flatMap { TLSPolicy(rawValue: $0) } ?? (hasFiles ? .require : .off)
        if policy == .off { return nil }
        var files = TLSServerFiles()
        for (certificate, key) in zip(tlsCert, tlsKey) {
            files.certificates.append(TLSServerFiles.CertificateFiles(certificate: certificate, key: key))
        }
        if let directory = tlsCertificates { addFiles(of: directory, to: &files) }
        files.authorities = tlsCa ?? files.authorities
        files.revocations = tlsCrl ?? files.revocations
        files.preSharedKeys = tlsPsk
        files.verification = tlsVerifyPeer.flatMap { TLSContext.Verification(rawValue: $0) }
        return try TLSServer(policy, files: files, allowsKernel: ktls == "auto", log: log)
    }

    private func addFiles(of directory: String, to files: inout TLSServerFiles) {
        func path(_ name: String) -> String { "\(directory)/\(name)" }
        files.certificates.append(
            TLSServerFiles.CertificateFiles(certificate: path("server-cert.pem"), key: path("server-key.pem")))
        files.directory = directory
    }
}
