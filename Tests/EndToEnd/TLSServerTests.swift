// `diskgate serve` over TLS with the clients that people use: they copy, map and write as in clear text.
import Glibc
import Testing

@Suite struct TLSServerTests {
    static let ways = [Access.certificate("client"), .certificate("rsa"), .certificate("chain"), .key("backup")]

    @Test(arguments: ways) func `libnbd's programs list, ask, map and copy`(_ way: Access) throws {
        let folder = try Folder()
        let image = try folder.image("disk")
        let arguments = try ["--name", "disk"] + Gateway.tls() + ["--listen", "unix:\(folder.file("socket"))"]
        try serving(arguments + ["--listen", "tcp://127.0.0.1:0", image], in: folder) { (gateway) throws in
            let local = try way.uri(socket: gateway.socket, export: "disk")
            let remote = try way.uri(port: try #require(gateway.port), export: "disk")
            for uri in [local, remote] {
                #expect(try run("nbdinfo", "--size", uri).lines == ["\(24 << 20)"])
                #expect(try run("nbdinfo", "--can", "connect", uri).status == 0)
                #expect(try run("nbdinfo", "--is", "tls", uri).status == 0)
                #expect(try run("nbdinfo", "--list", uri).text.contains("export=\"disk\""))
                #expect(try run("nbdinfo", "--map", "--totals", uri).text.contains("hole,zero"))
            }
            for connections in ["1", "4"] {
                let copy = try folder.filled("copy")
                try run("nbdcopy", "-C", connections, connections == "1" ? local : remote, copy)
                #expect(try isSame(image, copy))
            }
        }
    }

    @Test(arguments: [Access.certificate("client"), .key("mirror")]) func `nbdcopy writes`(_ way: Access) throws {
        let folder = try Folder()
        let image = try folder.image("disk")
        for connections in ["1", "4"] {
            let target = try folder.filled("target")
            try serving(Gateway.tls() + ["--writable", target], in: folder) { (gateway) throws in
                let uri = try way.uri(socket: gateway.socket)
                try run("nbdcopy", "--flush", "-C", connections, image, uri)
            }
            #expect(try isSame(image, target))
        }
    }

    @Test(arguments: [Access.certificate("client"), .certificate("chain"), .key("backup")])
    func `QEMU's programs convert, compare, map, write and read`(_ way: Access) throws {
        let folder = try Folder()
        let image = try folder.image("disk")
        for priority in [nil, "NORMAL:-VERS-TLS1.3"] {
            try serving(Gateway.tls() + ["--overlay", image], in: folder) { (gateway) throws in
                let object = try way.qemuObject(folder, priority: priority)
                let target = way.qemuImage(socket: gateway.socket)
                let img = try Tool("qemu-img")
                let copy = folder.file("copy")
                let converted = try img.run(["convert"] + object + ["--image-opts", "-O", "raw", target, copy])
                #expect(converted.status == 0, "\(converted.errors)")
                #expect(try isSame(image, copy))
                let map = try img.run(["map", "--output=json"] + object + ["--image-opts", target])
                #expect(map.status == 0 && map.text.contains("\"zero\": true"))
                let written = try Tool("qemu-io").run(
                    object + [
                        "--image-opts", target, "-c", "write -P 7 1M 3M", "-c", "read -P 7 1M 3M", "-c",
                        "write -z 5M 1M",
                        "-c", "read -P 0 5M 1M", "-c", "flush",
                    ])
                #expect(written.status == 0 && !written.text.contains("failed"), "\(written.text)\(written.errors)")
            }
        }
    }

    @Test(arguments: [Access.certificate("client"), .key("backup")])
    func `libnbd with TLS 1.2 only`(_ way: Access) throws {
        let folder = try Folder()
        let image = try folder.image("disk")
        try run("sh", "-c", "printf '[overrides]\\ndisabled-version = tls1.3\\n' >\"$1\"", "sh", folder.file("gnutls"))
        try serving(Gateway.tls() + ["-v", image], in: folder) { (gateway) throws in
            let copy = try folder.filled("copy")
            let copied = try Tool("nbdcopy").run(
                [try way.uri(socket: gateway.socket), copy],
                environment: ["GNUTLS_SYSTEM_PRIORITY_FILE=\(folder.file("gnutls"))"])
            #expect(copied.status == 0, "\(copied.errors)")
            #expect(try isSame(image, copy))
            #expect(gateway.log.contains("TLSv1.2") && !gateway.log.contains("TLSv1.3"))
        }
    }

    @Test(arguments: ["server", "rsa", "chain"])
    func `the server's certificate is of an elliptic curve, of RSA, or of an intermediate authority`(
        _ directory: String
    ) throws {
        try serving(Gateway.tls(certificates: directory) + ["pattern:1M?seed=1"], in: Folder()) { (gateway) throws in
            try wire(
                """
                context = wire.client_context(sys.argv[2])
                for version in [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]:
                    context.minimum_version = context.maximum_version = version
                    client = Client(sys.argv[1]).start_tls(context)
                    assert client.server_certificate == wire.certificate_digest(sys.argv[3])
                    assert client.go() == 1 << 20
                    assert len(client.read(0, 1 << 20)) == 1 << 20
                    client.leave()
                    assert client.saw_close_notify
                """, gateway.socket, try Certificates.made()["client"],
                try Certificates.made()[directory] + "/server-cert.pem")
        }
    }

    @Test func `a client gets the certificate of the name that it asks for`() throws {
        let made = try Certificates.made()
        var arguments: [String] = []
        for directory in ["server", "wrong-host"] {
            arguments += ["--tls-cert", "\(made[directory])/server-cert.pem"]
            arguments += ["--tls-key", "\(made[directory])/server-key.pem"]
        }
        try serving(arguments + ["pattern:1M"], in: Folder()) { (gateway) throws in
            try wire(
                """
                context = wire.client_context(sys.argv[2])
                first, second = [wire.certificate_digest(f"{path}/server-cert.pem") for path in sys.argv[3:]]
                for host, expected in [("localhost", first), ("other.example", second), ("127.0.0.1", first)]:
                    client = Client(sys.argv[1]).start_tls(context, host)
                    assert client.server_certificate == expected, host
                    assert client.list() == [""]
                # A name that nobody has is answered with the first certificate, which such a client refuses.
                try:
                    Client(sys.argv[1]).start_tls(context, "third.example")
                    raise SystemExit("a certificate for another name was taken")
                except ssl.SSLCertVerificationError:
                    pass
                """, gateway.socket, made["client"], made["server"], made["wrong-host"])
        }
    }

    @Test func `where TLS is allowed, clients with and without it are served at once`() throws {
        let folder = try Folder()
        let image = try folder.image("disk")
        try serving(Gateway.tls() + ["--tls", "allow", "-v", image], in: folder) { (gateway) throws in
            try run(
                "sh", "-c", "nbdcopy \"$1\" \"$2\" & nbdcopy \"$3\" \"$4\"; status=$?; wait $! && exit $status", "sh",
                try Access.plain.uri(socket: gateway.socket), try folder.filled("copy1"),
                try Access.key("backup").uri(socket: gateway.socket), try folder.filled("copy2"))
            #expect(gateway.log.contains("key of backup"))
        }
        #expect(try isSame(image, folder.file("copy1")))
        #expect(try isSame(image, folder.file("copy2")))
    }

    @Test func `on standard input and output`() throws {
        let arguments = try Gateway.tls()
        let outcome = try python(
            """
            h = nbd.NBD()
            h.set_tls(nbd.TLS_REQUIRE)
            h.set_tls_username("backup")
            h.set_tls_psk_file(sys.argv[1])
            h.connect_command([sys.argv[2], "serve", "--stdio"] + sys.argv[3:] + ["pattern:1M?seed=1"])
            assert h.get_tls_negotiated()
            print(h.get_size(), len(h.pread(1 << 20, 0)))
            h.shutdown()
            """, try Certificates.made().psk(), Tool.diskgate.path, arguments[0], arguments[1], arguments[2],
            arguments[3])
        #expect(outcome.lines == ["1048576 1048576"])
    }

    @Test(arguments: [Access.certificate("client"), .key("backup")])
    func `eight clients at once read 32 MiB at a time and write what the others leave alone`(_ way: Access) throws {
        let folder = try Folder()
        try serving(Gateway.tls() + ["--writable", "memory:64M"], in: folder) { (gateway) throws in
            _ = try python(
                """
                import threading
                failures = []
                def work(number):
                    try:
                        for turn in range(2):
                            h = nbd.NBD()
                            h.set_uri_allow_local_file(True)
                            h.connect_uri(sys.argv[1])
                            mine = bytes([number + 1 + 16 * turn]) * (4 << 20)
                            h.pwrite(mine, number * (4 << 20))
                            data = h.pread(32 << 20, 0)
                            assert data[number * (4 << 20) : (number + 1) * (4 << 20)] == mine
                            h.shutdown()
                    except Exception as error:
                        failures.append(repr(error))
                threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
                for thread in threads: thread.start()
                for thread in threads: thread.join()
                assert not failures, failures
                """, try way.uri(socket: gateway.socket))
        }
    }

    @Test func `requests and writes arrive in pieces of any size`() throws {
        try serving(Gateway.tls(keys: false) + ["--writable", "memory:4M"], in: Folder()) { (gateway) throws in
            try wire(
                """
                context = wire.client_context(sys.argv[2])
                client = Client(sys.argv[1]).start_tls(context)
                assert client.go() == 4 << 20
                expected = bytearray(4 << 20)
                # Pieces on the wire, which are nobody's records.
                for piece, length in [(1, 300), (7, 5000), (16401, 300000), (99991, 2 << 20)]:
                    data = os.urandom(length)
                    client.write(piece, data, piece)
                    expected[piece : piece + length] = data
                # One record for each byte of a request and its payload.
                data = os.urandom(100)
                client.cookie += 1
                for byte in struct.pack(">IHHQQI", wire.REQUEST_MAGIC, 0, wire.WRITE, client.cookie, 3, 100) + data:
                    client.send(bytes([byte]))
                assert client.reply()[0] == 0
                expected[3:103] = data
                assert client.read(0, 4 << 20) == bytes(expected)
                client.leave()
                """, gateway.socket, try Certificates.made()["client"])
        }
    }

    @Test func `many connections one after the other leave nothing behind`() throws {
        try serving(Gateway.tls() + ["pattern:1M"], in: Folder()) { (gateway) throws in
            try wire(
                """
                context = wire.client_context(sys.argv[2])
                for turn in range(100):
                    client = Client(sys.argv[1]).start_tls(context)
                    assert client.go() == 1 << 20
                    assert len(client.read(turn, 4096)) == 4096
                    client.leave() if turn % 2 else client.close()
                """, gateway.socket, try Certificates.made()["client"])
        }
    }
}
