// Rules on keys and certificates: who may use and list which export over TLS, and that others learn of none.
import Glibc
import Testing

@Suite struct TLSRuleTests {
    /// Python that asks as libnbd does. A way is psk=IDENTITY, x509=DIRECTORY of the certificates, or nothing for none.
    private static let prelude = """
        directory, socket = sys.argv[1:3]
        def connect(way, export=None):
            h = nbd.NBD()
            if way:
                h.set_tls(nbd.TLS_REQUIRE)
                kind, _, value = way.partition("=")
                if kind == "psk":
                    h.set_tls_username(value)
                    h.set_tls_psk_file(f"{directory}/psk/keys.psk")
                else:
                    h.set_tls_certificates(f"{directory}/{value}")
            h.set_opt_mode(True)
            h.connect_unix(socket)
            if export is not None: h.set_export_name(export)
            return h
        def size(way, export):
            h = connect(way, export)
            h.opt_go()
            return h.get_size()
        def names(way):
            h = connect(way)
            found = []
            try:
                h.opt_list(lambda name, description: found.append(name) or 0)
            except nbd.Error:
                return "refused"
            finally:
                h.opt_abort()
            return sorted(found)
        def refusal(way, export):
            h = connect(way, export)
            try:
                h.opt_go()
                return "admitted"
            except nbd.Error as error:
                return str(error).replace(export, "NAME")

        """

    private func asking(_ arguments: [String], _ script: String) throws {
        try serving(arguments, in: Folder()) { (gateway) throws in
            _ = try python(Self.prelude + script, try Certificates.made().path, gateway.socket)
        }
    }

    @Test(arguments: [
        ("psk=backup", "psk=backup", "psk=mirror"), ("cn=backup", "x509=client", "x509=client2"),
        ("cn=mirror", "x509=client2", "x509=client"),
        ("subject=CN=mirror,O=other department", "x509=client2", "x509=client"),
        ("dns=backup.example", "x509=client", "x509=client2"), ("dns=*.example", "x509=client2", "psk=backup"),
        ("ip=192.0.2.7", "x509=client2", "x509=client"), ("email=mirror@example.com", "x509=client2", "x509=client"),
        ("uri=spiffe://example.com/backup/mirror", "x509=client2", "x509=client"),
        ("tls and cn=backup", "x509=client", "psk=backup"), ("psk=backup and export=disk", "psk=backup", "psk=mirror"),
    ])
    func `a rule admits whom it names, and for others the export is not there`(
        rule: String, friend: String, stranger: String
    ) throws {
        try asking(
            Gateway.tls() + ["--tls", "allow", "--allow", rule, "--name", "disk", "pattern:1M"],
            """
            friend, stranger = "\(friend)", "\(stranger)"
            assert size(friend, "disk") == 1 << 20
            assert names(friend) == ["disk"]
            assert names(stranger) == []
            # To the letter what is said of an export that does not exist, with TLS and without.
            assert refusal(stranger, "disk") == refusal(stranger, "none") != "admitted"
            assert refusal("", "disk") == refusal("", "none") != "admitted"
            assert names("") == []
            """)
    }

    @Test func `each client sees its own exports of a server that has several`() throws {
        let folder = try Folder()
        let rules = ["psk=backup and export=one", "cn=mirror and export=two", "tls and export=shared"]
        let arguments = try Gateway.tls() + rules.flatMap { ["--allow", $0] }
        let sources = ["one", "two", "shared", "nobody's"].flatMap { ["--name", $0] } + ["pattern:1M", "pattern:2M"]
        try serving(arguments + sources + ["pattern:3M", "pattern:4M"], in: folder) { (gateway) throws in
            _ = try python(
                Self.prelude + """
                    assert names("psk=backup") == ["one", "shared"], names("psk=backup")
                    assert names("x509=client2") == ["shared", "two"], names("x509=client2")
                    assert names("psk=mirror") == ["shared"], names("psk=mirror")
                    assert size("psk=backup", "one") == 1 << 20 and size("x509=client2", "two") == 2 << 20
                    assert size("psk=backup", "shared") == 3 << 20
                    for way in ["psk=backup", "psk=mirror", "x509=client", "x509=client2"]:
                        assert refusal(way, "nobody's") == refusal(way, "none") != "admitted"
                    assert refusal("psk=backup", "two") == refusal("psk=backup", "none") != "admitted"
                    """, try Certificates.made().path, gateway.socket)
        }
    }

    @Test func `a rule for reading only`() throws {
        try asking(
            Gateway.tls() + [
                "--writable", "--allow", "psk=backup and read-only", "--allow", "cn=backup", "--name", "disk",
                "memory:1M",
            ],
            """
            writer, reader = connect("x509=client", "disk"), connect("psk=backup", "disk")
            writer.opt_go()
            reader.opt_go()
            assert not writer.is_read_only() and reader.is_read_only()
            writer.pwrite(b"written", 0)
            assert reader.pread(7, 0) == b"written"
            reader.set_strict_mode(0)
            for change in [lambda: reader.pwrite(b"no", 0), lambda: reader.zero(512, 0), lambda: reader.trim(512, 0)]:
                try:
                    change()
                    raise SystemExit("it was changed")
                except nbd.Error as error:
                    assert error.errnum == errno.EPERM, error
            assert writer.pread(7, 0) == b"written"
            """)
    }

    @Test(arguments: [
        (["none"], []), (["psk=backup"], ["psk=backup"]),
        (["psk=backup", "cn=mirror"], ["psk=backup", "x509=client2"]),
    ])
    func `who may list exports`(rules: [String], listers: [String]) throws {
        try asking(
            Gateway.tls() + rules.flatMap { ["--allow-list", $0] } + ["--name", "disk", "pattern:1M"],
            """
            for way in ["psk=backup", "psk=mirror", "x509=client", "x509=client2"]:
                expected = ["disk"] if way in \(listers) else "refused"
                assert names(way) == expected, (way, names(way))
                assert size(way, "disk") == 1 << 20
            """)
    }
}
