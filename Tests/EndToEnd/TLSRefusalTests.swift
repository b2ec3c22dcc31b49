// Clients that a server with TLS refuses: the log says why and what to do, and nothing of a disk is on the wire.
import Glibc
import Testing

/// A client that is to be refused, and words of the log's explanation.
struct Unwelcome: CustomTestStringConvertible, Sendable {
    let access: Access
    let words: [String]

    init(_ access: Access, _ words: String...) {
        self.access = access
        self.words = words
    }

    var testDescription: String { "\(access)" }
}

@Suite struct TLSRefusalTests {
    /// What no client that is refused may see.
    private static let name = "export-that-nobody-learns-of"
    private static let data = [UInt8](repeating: 0x5A, count: 64)

    /// Runs a body against a server behind a recorder; then the log must have the words, and the wire nothing.
    private func refusing(
        _ words: [String], _ arguments: [String], clientNamesExport: Bool = false,
        _ body: (_ folder: Folder, _ socket: String) throws -> Void
    ) throws {
        let folder = try Folder()
        let image = try folder.filled("disk", size: 1 << 20)
        try serving(arguments + ["--name", Self.name, "--writable", image], in: folder) { (gateway) throws in
            let recorder = try Recorder(in: folder, before: gateway.socket)
            try body(folder, recorder.socket)
            for side in Recorder.Side.allCases {
                #expect(try recorder.count(of: Self.data, from: side) == 0)
                let isNamed = side == .client && clientNamesExport
                #expect(try (recorder.count(of: Array(Self.name.utf8), from: side) > 0) == isNamed)
            }
            #expect(try recorder.count(of: Array("NBDMAGIC".utf8), from: .server) > 0)
            #expect(eventually { words.allSatisfy { gateway.log.contains($0) } }, "\(gateway.log)")
        }
    }

    @Test func `what these tests look for is found where nobody is refused`() throws {
        let folder = try Folder()
        let image = try folder.filled("disk", size: 1 << 20)
        try serving(["--name", Self.name, image], in: folder) { (gateway) throws in
            let recorder = try Recorder(in: folder, before: gateway.socket)
            let uri = try Access.plain.uri(socket: recorder.socket, export: Self.name)
            try run("nbdcopy", uri, folder.file("copy"))
            #expect(try run("nbdinfo", "--list", uri).text.contains(Self.name))
            #expect(try recorder.count(of: Self.data, from: .server) > 1000)
            #expect(try recorder.count(of: Array(Self.name.utf8), from: .client) > 0)
            #expect(try recorder.count(of: Array(Self.name.utf8), from: .server) > 0)
        }
    }

    @Test func `nor is it on the wire where a client is admitted over TLS`() throws {
        try refusing([], Gateway.tls()) { (folder, socket) throws in
            for access in [Access.certificate("client"), .key("backup")] {
                let uri = try access.uri(socket: socket, export: Self.name)
                try run("nbdcopy", uri, folder.file("copy"))
                try run("nbdcopy", folder.file("copy"), uri)
                #expect(try run("nbdinfo", "--list", uri).text.contains(Self.name))
            }
        }
    }

    private static let unwelcome = [
        Unwelcome(.certificate("expired"), "certificate has expired", "renew it"),
        Unwelcome(.certificate("not-yet-valid"), "not yet valid", "compare the clocks"),
        Unwelcome(.certificate("revoked"), "certificate revoked", "needs a new one"),
        Unwelcome(.certificate("wrong-purpose"), "unsuitable certificate purpose", "clientAuth"),
        // A directory without a client's certificate.
        Unwelcome(.certificate("server"), "showed no certificate", "--tls-ca"),
        Unwelcome(.key("backup", file: "wrong"), "another key for its identity than this server"),
        Unwelcome(.key("stranger", file: "unknown"), "no key for the identity \"stranger\"", "--tls-psk"),
    ]

    @Test(arguments: unwelcome) func `by libnbd`(_ client: Unwelcome) throws {
        try refusing(client.words, Gateway.tls()) { (folder, socket) throws in
            let uri = try client.access.uri(socket: socket, export: Self.name)
            #expect(try attempt("nbdcopy", uri, folder.file("copy")).status != 0)
            #expect(try attempt("nbdinfo", "--list", uri).status != 0)
            #expect(try attempt("nbdcopy", folder.file("disk"), uri).status != 0)
        }
    }

    @Test(arguments: unwelcome) func `by QEMU`(_ client: Unwelcome) throws {
        for priority in ["NORMAL", "NORMAL:-VERS-TLS1.3"] {
            try refusing(client.words, Gateway.tls()) { (folder, socket) throws in
                let outcome = try Tool("qemu-img").run(
                    ["convert"] + client.access.qemuObject(folder, priority: priority) + [
                        "--image-opts", "-O", "raw", client.access.qemuImage(socket: socket, export: Self.name),
                        folder.file("copy"),
                    ])
                #expect(outcome.status != 0)
            }
        }
    }

    // OpenSSL shows a certificate even to servers that do not know its issuer; GnuTLS keeps it to itself.
    @Test(arguments: [
        Unwelcome(.certificate("other-ca"), "its issuer is not among the authorities", "--tls-ca"),
        Unwelcome(.certificate("self-signed"), "signed by itself", "--tls-ca"),
        Unwelcome(.certificate("expired"), "certificate has expired", "renew it"),
        Unwelcome(.certificate("revoked"), "certificate revoked"),
        Unwelcome(.certificate("wrong-purpose"), "unsuitable certificate purpose", "clientAuth"),
        Unwelcome(.certificate(""), "showed no certificate", "--tls-ca"),
    ])
    func `by OpenSSL, which gets an alert`(_ client: Unwelcome) throws {
        guard case .certificate(let directory) = client.access else { return }
        let made = try Certificates.made()
        for version in ["TLSv1_2", "TLSv1_3"] {
            try refusing(client.words, Gateway.tls()) { (_, socket) throws in
                try wire(
                    """
                    version = ssl.TLSVersion[sys.argv[4]]
                    context = wire.client_context(sys.argv[2], sys.argv[3], version, version)
                    try:
                        # In TLS 1.3 the client has finished before its certificate is looked at.
                        print(Client(sys.argv[1]).start_tls(context).list())
                    except ssl.SSLError as error:
                        assert "alert" in error.reason.lower(), error.reason
                    else:
                        raise SystemExit("it was admitted")
                    """, socket, made["client"], directory.isEmpty ? "" : made[directory], version)
            }
        }
    }

    @Test func `a client in clear text where TLS is required`() throws {
        let words = ["it does not use TLS", "nbds://", "--tls allow"]
        try refusing(words, Gateway.tls(), clientNamesExport: true) { (folder, socket) throws in
            let uri = try Access.plain.uri(socket: socket, export: Self.name)
            let copied = try attempt("nbdcopy", uri, folder.file("copy"))
            #expect(copied.status != 0 && copied.errors.contains("TLS"))
            #expect(try attempt("nbdinfo", "--list", uri).status != 0)
            let outcome = try Tool("qemu-img").run(
                ["info", "--image-opts", Access.plain.qemuImage(socket: socket, export: Self.name)])
            #expect(outcome.status != 0 && outcome.errors.contains("use nbds://"))
        }
    }

    @Test(arguments: [Access.certificate("client"), .key("backup")])
    func `a client that insists on TLS where there is none`(_ access: Access) throws {
        try refusing(["it wants TLS, which is not served here", "--tls-cert"], []) { (folder, socket) throws in
            let copied = try attempt("nbdcopy", access.uri(socket: socket, export: Self.name), folder.file("copy"))
            #expect(copied.status != 0 && copied.errors.contains("TLS"))
            let outcome = try Tool("qemu-img").run(
                ["info"] + access.qemuObject(folder) + [
                    "--image-opts", access.qemuImage(socket: socket, export: Self.name),
                ])
            #expect(outcome.status != 0 && outcome.errors.contains("this server offers no TLS"))
        }
    }

    @Test func `a client that can do without TLS is served by a server without it, and nobody is told off`() throws {
        try serving(["pattern:1M?seed=1"], in: Folder()) { (gateway) throws in
            _ = try python(
                """
                h = nbd.NBD()
                h.set_tls(nbd.TLS_ALLOW)
                h.connect_unix(sys.argv[1])
                assert not h.get_tls_negotiated() and h.get_size() == 1 << 20
                h.shutdown()
                """, gateway.socket)
            #expect(!gateway.log.contains("warning"))
        }
    }

    @Test func `what is not TLS after STARTTLS`() throws {
        try refusing(["what the client sent is not TLS"], Gateway.tls()) { (_, socket) throws in
            try wire(
                """
                client = Client(sys.argv[1])
                assert client.ask(wire.STARTTLS) == [(wire.ACK, b"")]
                client.send(wire.OPTION_MAGIC + struct.pack(">II", wire.LIST, 0))
                assert wire.OPTION_MAGIC not in client.drain()
                """, socket)
        }
    }

    @Test(arguments: [("off", true, true), ("optional", true, false), ("required", false, false)])
    func `whether a client shows a certificate is for the server to say`(
        how: String, admitsNone: Bool, admitsForeign: Bool
    ) throws {
        let made = try Certificates.made()
        let arguments = try Gateway.tls(keys: false) + ["--tls-verify-peer", how, "pattern:1M"]
        try serving(arguments, in: Folder()) { (gateway) throws in
            let outcome = try wire(
                """
                def admits(certificate):
                    context = wire.client_context(sys.argv[2], certificate)
                    try:
                        return Client(sys.argv[1]).start_tls(context).go() == 1 << 20
                    except (ssl.SSLError, Closed):
                        return False
                assert admits(sys.argv[2])
                print(admits(""), admits(sys.argv[3]), sep="\\n")
                """, gateway.socket, made["client"], made["other-ca"])
            #expect(outcome.lines == [admitsNone ? "True" : "False", admitsForeign ? "True" : "False"])
        }
    }
}
