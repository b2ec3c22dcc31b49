// Rules for clients: what they are written like, whom they admit, and whom they must not.
import Block
import LinuxIO
import NBD
import Testing

private func ip(_ text: String) throws -> Credentials {
    Credentials(peer: .ip(try #require(IPAddress(text))))
}

private func psk(_ identity: String) -> Credentials {
    Credentials(peer: .inherited, tls: TLSIdentity(pskIdentity: identity, version: "", cipher: ""))
}

private func certificate(
    _ subject: String, cn: String? = nil, names: [(Certificate.Name.Kind, String)] = []
) throws -> Credentials {
    var certificate = Certificate()
    certificate.subject = subject
    certificate.commonName = cn
    certificate.names = names.map { Certificate.Name(kind: $0.0, text: $0.1) }
    return Credentials(peer: .inherited, tls: TLSIdentity(certificate: certificate, version: "", cipher: ""))
}

private func admits(_ rule: String, _ client: Credentials, to export: String = "disk") throws -> Bool {
    try AllowRule(rule).admits(client, to: export)
}

@Suite struct AllowRuleTests {
    @Test(arguments: [
        "", "uid", "uid=", "uid=-1", "uid=+1", "uid=4294967296", "uid=1x", "address=", "address=10.0.0.0/33",
        "address=10.0.0.0/-1", "address=10.0.0.0/", "address=10.0.0.256", "address=host", "host=a", "psk=", "cn=",
        "psk", "ip=host", "tls=yes", "export=disk", "read-only=1", "address=10.0.0.1 uid=0", "and",
        " and psk=a",
    ])
    func `what is no rule is refused with the forms`(_ text: String) throws {
        let error = try #require(throws: BlockError.self) { try AllowRule(text) }
        #expect(error.kind == .invalid)
        #expect(error.message.contains("psk=IDENTITY"))
    }

    @Test(arguments: [
        ("address=10.1.2.3", "10.1.2.3", true), ("address=10.1.2.3", "10.1.2.4", false),
        ("address=10.1.2.0/24", "10.1.2.255", true), ("address=10.1.2.0/24", "10.1.3.0", false),
        ("address=0.0.0.0/0", "1.2.3.4", true), ("address=0.0.0.0/0", "fe80::1", false),
        ("address=::/0", "1.2.3.4", false), ("address=fd00::/8", "fdff::1", true),
        ("address=fd00::/8", "fe00::1", false),
        ("address=::ffff:10.0.0.1", "10.0.0.1", true), ("address=128.0.0.0/1", "127.255.255.255", false),
    ])
    func `addresses`(_ rule: String, _ address: String, _ isIn: Bool) throws {
        #expect(try admits(rule, ip(address)) == isIn)
    }

    @Test func `what a client did not show admits nobody`() throws {
        let plain = Credentials(peer: .unix(pid: 1, uid: 7, gid: 8))
        for rule in ["tls", "psk=a", "subject=", "subject=CN=a", "cn=a", "dns=a.example", "uri=a", "uid=8", "gid=7"] {
            if rule == "subject=" { continue }
            #expect(try !admits(rule, plain), "\(rule)")
        }
        #expect(try admits("uid=7", plain))
        #expect(try admits("gid=8 and uid=7", plain))
        #expect(try !admits("gid=8 and uid=8", plain))
        #expect(try !admits("cn=a", psk("a")))
        #expect(try !admits("psk=a", certificate("CN=a", cn: "a")))
        #expect(try !admits("cn=a", certificate("CN=a")))
    }

    @Test func `identities of keys are compared exactly`() throws {
        #expect(try admits("psk=backup", psk("backup")))
        for other in ["Backup", "backup ", "backu", "backup2", ""] { #expect(try !admits("psk=backup", psk(other))) }
        #expect(try admits("psk=smith and sons", psk("smith and sons")))
        #expect(try !admits("psk=smith and tls", psk("smith and tls")))
        #expect(try admits("psk=smith and tls", psk("smith")))
    }

    @Test func `subjects are compared exactly, and a part of one is none`() throws {
        #expect(try admits("subject=CN=a,O=Smith and Sons", certificate("CN=a,O=Smith and Sons")))
        #expect(try !admits("subject=CN=a", certificate("CN=a,O=x")))
        // A comma inside a name is escaped, so that nobody can pass for somebody else's organisation.
        #expect(try !admits("subject=CN=a,O=b", certificate(#"CN=a\,O=b"#)))
    }

    @Test(arguments: [
        ("dns=a.example", "a.example", true), ("dns=a.example", "A.Example", true),
        ("dns=A.example", "a.example", true),
        ("dns=a.example", "b.a.example", false), ("dns=*.example", "a.example", true),
        ("dns=*.example", "b.a.example", false), ("dns=*.example", "example", false),
        ("dns=*.example", ".example", false),
        ("dns=a.example", "*.example", false), ("dns=*.example", "*.example", true), ("dns=*", "a", false),
        ("dns=*.", "a.", false),
    ])
    func `names of certificates`(_ rule: String, _ name: String, _ isIn: Bool) throws {
        #expect(try admits(rule, certificate("CN=x", names: [(.dns, name)])) == isIn)
    }

    @Test func `names that look alike are not the same`() throws {
        // The Kelvin sign is a K to the eye, and to string comparison; so is an e with its accent in two ways.
        #expect(try !admits("cn=K1", certificate("CN=x", cn: "\u{212A}1")))
        #expect(try !admits("psk=caf\u{E9}", psk("cafe\u{301}")))
        #expect(try !admits("subject=CN=K1", certificate("CN=\u{212A}1")))
        #expect(try !admits("dns=k.example", certificate("CN=x", names: [(.dns, "\u{212A}.example")])))
        #expect(try !admits("psk=disk and export=K", psk("disk"), to: "\u{212A}"))
    }

    @Test func `a name of one kind is none of another`() throws {
        let client = try certificate("CN=x", cn: "a", names: [(.dns, "a"), (.ip, "10.0.0.1"), (.uri, "urn:a")])
        #expect(try admits("ip=10.0.0.1", client))
        #expect(try admits("uri=urn:a", client))
        #expect(try !admits("email=a", client))
        #expect(try !admits("dns=10.0.0.1", client))
        #expect(try !admits("uri=a", client))
    }

    @Test func `once there are rules, who fits none is refused`() throws {
        var options = ExportOptions()
        let device = try PatternDevice(size: 4096)
        #expect(try Export(name: "disk", device: device, options: options).admission(of: psk("x")) == .full)
        options.allow = [try AllowRule("psk=a and export=disk"), try AllowRule("psk=b and read-only")]
        let disk = try Export(name: "disk", device: device, options: options)
        let other = try Export(name: "other", device: device, options: options)
        #expect(disk.admission(of: psk("a")) == .full)
        #expect(other.admission(of: psk("a")) == .refused)
        #expect(disk.admission(of: psk("b")) == .readOnly)
        #expect(other.admission(of: psk("b")) == .readOnly)
        #expect(disk.admission(of: psk("c")) == .refused)
    }

    @Test func `several rules give the most that one of them gives`() throws {
        var options = ExportOptions()
        options.allow = [try AllowRule("tls and read-only"), try AllowRule("psk=a")]
        let export = try Export(name: "", device: try PatternDevice(size: 4096), options: options)
        #expect(export.admission(of: psk("a")) == .full)
        #expect(export.admission(of: psk("b")) == .readOnly)
    }
}
