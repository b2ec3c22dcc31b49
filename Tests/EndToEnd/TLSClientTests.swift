// diskgate as a TLS client of nbdkit, QEMU and itself: what it reads, whom it refuses and what it says then, and that a
// server which is not the right one learns nothing.
import Glibc
import Testing

/// A server that is no good, and words of what the client says about it.
struct BadServer: CustomTestStringConvertible, Sendable {
    let certificates: String
    let words: [String]

    init(_ certificates: String, _ words: String...) {
        self.certificates = certificates
        self.words = words
    }

    var testDescription: String { certificates }
}

@Suite struct TLSClientTests {
    static let kinds = ["nbdkit", "qemu-nbd", "diskgate"]
    private static let name = "export-that-nobody-learns-of"

    /// A server of some kind over an image, with certificates or pre-shared keys; runs a body with its socket.
    private func with(
        _ kind: String, certificates: String? = nil, checksClients: Bool = false, in folder: Folder, _ image: String,
        _ body: (_ socket: String) throws -> Void
    ) throws {
        let made = try Certificates.made()
        let directory = certificates.map { made[$0] }
        if kind == "diskgate" {
            let ways = directory.map { ["--tls-certificates", $0] } ?? ["--tls-psk", made.psk()]
            let verify = directory == nil ? [] : ["--tls-verify-peer", checksClients ? "required" : "off"]
            return try serving(ways + verify + ["--writable", "--name", Self.name, image], in: folder) {
                (gateway) throws in try body(gateway.socket)
            }
        }
        let peer: Peer
        if kind == "nbdkit" {
            let way = directory.map { "--tls-certificates=\($0)" } ?? "--tls-psk=\(made.psk())"
            let options = ["--tls=require", way] + (checksClients ? ["--tls-verify-peer"] : [])
            let socket = folder.file("peer")
            peer = try Peer("nbdkit", ["-f", "-U", socket] + options + ["file", image], socket: socket)
        } else {
            let way = directory.map {
                "tls-creds-x509,dir=\($0),verify-peer=\(checksClients ? "yes" : "no"),sanity-check=no"
            }
            let socket = folder.file("peer")
            let object = try way ?? "tls-creds-psk,dir=\(run("dirname", made.psk()).lines[0])"
            peer = try Peer(
                "qemu-nbd",
                [
                    "-t", "-f", "raw", "-x", Self.name, "-k", socket, "--object", "\(object),id=tls,endpoint=server",
                    "--tls-creds", "tls", image,
                ], socket: socket)
        }
        defer { peer.kill() }
        try body(peer.socket)
    }

    /// The parameters of a URI that a client with a directory of certificates uses.
    private func uri(_ socket: String, _ directory: String, _ more: String = "tls-hostname=localhost") throws -> String
    {
        try Access.certificate(directory).uri(socket: socket, export: Self.name) + "&" + more
    }

    @Test(arguments: kinds) func `it reads, maps and digests over TLS`(_ kind: String) throws {
        let folder = try Folder()
        let image = try folder.image("disk")
        let sum = try checksum(image)
        for (server, client) in [("server", "client"), ("rsa", "rsa"), ("chain", "chain")] {
            try with(kind, certificates: server, checksClients: true, in: folder, image) { (socket) throws in
                let address = try uri(socket, client)
                #expect(try run("diskgate", "checksum", address).text.hasPrefix(sum))
                #expect(try run("diskgate", "map", "--totals", address).status == 0)
                #expect(try run("diskgate", "info", address).text.contains("\(24 << 20)"))
            }
        }
        try with(kind, in: folder, image) { (socket) throws in
            let address = try Access.key("backup").uri(socket: socket, export: Self.name)
            #expect(try run("diskgate", "checksum", address).text.hasPrefix(sum))
        }
    }

    private static let bad = [
        BadServer("expired", "certificate has expired", "renew it"),
        BadServer("not-yet-valid", "not yet valid", "compare the clocks"),
        BadServer("revoked", "certificate revoked", "the server needs a new one"),
        BadServer("self-signed", "signed by itself", "pin it with fingerprint"),
        BadServer("other-ca", "its issuer is not among the authorities", "tls-certificates"),
        BadServer("wrong-host", "it is for another host", "tls-hostname"),
        BadServer("wrong-purpose", "it is not meant for servers"),
    ]

    @Test(arguments: kinds, bad) func `a server that is not the right one is refused before it learns of anything`(
        kind: String, server: BadServer
    ) throws {
        // GnuTLS does not serve with such a certificate.
        if kind == "qemu-nbd" && server.certificates == "wrong-purpose" { return }
        let folder = try Folder()
        let image = try folder.filled("disk", size: 1 << 20)
        try with(kind, certificates: server.certificates, in: folder, image) { (socket) throws in
            let recorder = try Recorder(in: folder, before: socket)
            for command in ["checksum", "map", "cat"] {
                let outcome = try attempt("diskgate", command, uri(recorder.socket, "client"))
                #expect(outcome.status == 1 && outcome.output.isEmpty)
                for word in server.words { #expect(outcome.errors.contains(word), "\(outcome.errors)") }
            }
            for side in Recorder.Side.allCases {
                #expect(try recorder.count(of: Array(Self.name.utf8), from: side) == 0)
                #expect(try recorder.count(of: [UInt8](repeating: 0x5A, count: 64), from: side) == 0)
            }
            #expect(try recorder.count(of: Array("IHAVEOPT".utf8), from: .client) > 0)
        }
    }

    @Test(arguments: kinds, ["expired", "revoked", "other-ca", "server"])
    func `a client whom the server refuses is told what may be wrong`(kind: String, certificates: String) throws {
        let folder = try Folder()
        let made = try Certificates.made()
        let image = try folder.filled("disk", size: 1 << 20)
        // The good authority, and the certificate that is to be refused.
        let own = folder.file("own")
        try run("mkdir", own)
        try run("cp", "\(made["client"])/ca-cert.pem", own)
        if certificates != "server" {
            try run("sh", "-c", "cp \"$1\"/client-*.pem \"$2\"", "sh", made[certificates], own)
        }
        try with(kind, certificates: "server", checksClients: true, in: folder, image) { (socket) throws in
            let address = "nbds+unix:///\(Self.name)?socket=\(socket)&tls-certificates=\(own)&tls-hostname=localhost"
            let outcome = try attempt("diskgate", "checksum", address)
            #expect(outcome.status == 1)
            let says = [
                "expired": "renew it", "revoked": "get a new one", "other-ca": "does not trust the authority",
                "server": "give client-cert.pem",
            ]
            // Servers with GnuTLS leave without a word.
            let words = kind == "diskgate" ? says[certificates] : "client-cert.pem in tls-certificates"
            #expect(outcome.errors.contains(try #require(words)), "\(outcome.errors)")
        }
    }

    @Test(arguments: kinds, [("wrong", "backup"), ("unknown", "stranger")])
    func `a key that the server does not have`(kind: String, key: (file: String, identity: String)) throws {
        let folder = try Folder()
        let image = try folder.filled("disk", size: 1 << 20)
        try with(kind, in: folder, image) { (socket) throws in
            let address = try Access.key(key.identity, file: key.file).uri(socket: socket, export: Self.name)
            let outcome = try attempt("diskgate", "checksum", address)
            #expect(outcome.status == 1 && outcome.errors.contains("key"), "\(outcome.errors)")
        }
    }

    @Test func `it insists on TLS where its URI does, and says what to do where the server does`() throws {
        let folder = try Folder()
        let image = try folder.filled("disk", size: 1 << 20)
        try serving(["--name", Self.name, image], in: folder) { (gateway) throws in
            let recorder = try Recorder(in: folder, before: gateway.socket)
            let outcome = try attempt("diskgate", "cat", uri(recorder.socket, "client"))
            #expect(outcome.status == 1 && outcome.output.isEmpty && outcome.errors.contains("offers no TLS"))
            #expect(try recorder.count(of: Array(Self.name.utf8), from: .client) == 0)
        }
        try serving(Gateway.tls() + ["--name", Self.name, image], in: folder) { (gateway) throws in
            let outcome = try attempt("diskgate", "cat", Access.plain.uri(socket: gateway.socket, export: Self.name))
            #expect(outcome.status == 1 && outcome.errors.contains("nbds"))
        }
    }

    @Test func `another server than the one that was pinned is refused, whatever its authority`() throws {
        let folder = try Folder()
        let image = try folder.filled("disk", size: 1 << 20)
        try with("diskgate", certificates: "server-next", in: folder, image) { (socket) throws in
            let shown = try run("diskgate", "trust", "unix:\(socket)", "--json").text
            let print = try #require(shown.split(separator: "\"").first { $0.hasPrefix("sha256:") })
            #expect(try run("diskgate", "checksum", uri(socket, "client", "fingerprint=\(print)")).status == 0)
            let other = "sha256:" + String(repeating: "00", count: 32)
            let outcome = try attempt("diskgate", "cat", uri(socket, "client", "fingerprint=\(other)"))
            #expect(
                outcome.status == 1 && outcome.output.isEmpty && outcome.errors.contains("not the one that was pinned"))
        }
    }
}
