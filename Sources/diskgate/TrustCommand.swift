// `diskgate trust`: which certificates a server shows, ready to be pinned.
import ArgumentParser
import Block
import LinuxIO
import NBD

struct TrustCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "trust",
        abstract: "Show a server's certificates and their fingerprints.",
        discussion: """
            Works with NBD servers and with servers that speak TLS from the first byte (vCenter, ESXi). What is shown \
            is not checked: compare a fingerprint with what the server's administrator says before you pin it.
            """)

    @Argument(help: ArgumentHelp("tcp://HOST:PORT, HOST:PORT or unix:PATH.", valueName: "address"))
    var address: String

    @Option(help: "The name to ask the server for, where it has several certificates.")
    var name: String?

    @Flag(help: "Print the certificates in PEM, too.")
    var pem = false

    @OptionGroup var report: ReportArguments

    private struct Report: Encodable {
        var startTLS: Bool
        var certificates: [CertificateReport]
    }

    private struct CertificateReport: Encodable {
        var subject: String
        var issuer: String
        var serial: String
        var notBefore: String
        var notAfter: String
        var names: [String]
        var sha256: String
        var sha1: String
        var pem: String
    }

    func run() throws {
        let (server, host) = try target()
        let shown = try ShownCertificates.ask(server, hostName: name ?? host)
        let reports = zip(shown.certificates, shown.pem).map { certificate, pem in
            CertificateReport(
                subject: certificate.subject, issuer: certificate.issuer, serial: certificate.serial,
                notBefore: certificate.notBefore, notAfter: certificate.notAfter,
                names: certificate.names.map { "\($0.kind.rawValue):\($0.text)" },
                sha256: certificate.fingerprints[0].description, sha1: certificate.fingerprints[1].description,
                pem: pem)
        }
        if report.json { return try printJSON(Report(startTLS: shown.isNBD, certificates: reports)) }
        for (index, certificate) in reports.enumerated() {
            print("certificate \(index + 1): \(printable(certificate.subject))")
            print("  issuer:  \(printable(certificate.issuer))")
            print("  valid:   \(certificate.notBefore) to \(certificate.notAfter)")
            if !certificate.names.isEmpty {
                print("  names:   \(printable(certificate.names.joined(separator: ", ")))")
            }
            print("  serial:  \(certificate.serial)")
            print("  sha256:  \(certificate.sha256.dropFirst("sha256:".count))")
            print("  sha1:    \(certificate.sha1.dropFirst("sha1:".count))")
            if pem { print(certificate.pem, terminator: "") }
        }
        guard let own = reports.first else { return }
        print("If the server's administrator confirms the first fingerprint, pin it:")
        print("  --fingerprint \(own.sha256)")
        if shown.isNBD {
            print("  \(uri(server))fingerprint=\(own.sha256)")
        }
    }

    /// The beginning of a URI of the server, to which a parameter is to be added.
    private func uri(_ server: ServerAddress) -> String {
        switch server {
        case .unix(let path): return "nbds+unix:///?socket=\(path)&"
        case .tcp(let host, let port): return "nbds://\(host.contains(":") ? "[\(host)]" : host):\(port)/?"
        case .vsock(let cid, let port): return "nbds+vsock://\(cid):\(port)/?"
        case .command: return ""
        case .ssh(let target): return "nbd+ssh://\(target.host)/?"
        }
    }

    private func target() throws -> (ServerAddress, String) {
        let text = address.hasPrefix("unix:") || address.hasPrefix("tcp:") ? address : "tcp://\(address)"
        switch try ListenAddress(text, defaultPort: NBD.defaultPort) {
        case .unix(let path): return (.unix(path: path), "localhost")
        case .tcp(let host, let port): return (.tcp(host: host, port: port), host)
        case .vsock: throw ValidationError("Give tcp://HOST:PORT, HOST:PORT or unix:PATH.")
        }
    }
}
