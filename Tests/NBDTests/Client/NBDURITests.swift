// NBD URIs: what they mean, and everything that they may not smuggle in.
import Block
import LinuxIO
import NBD
import Support
import Testing

@Suite struct NBDURITests {
    @Test func `every scheme names its address and its export`() throws {
        let cases: [(String, ServerAddress, String)] = [
            ("nbd://host", .tcp(host: "host", port: 10809), ""),
            ("nbd://host/", .tcp(host: "host", port: 10809), ""),
            ("NBD://host:10/a/b", .tcp(host: "host", port: 10), "a/b"),
            ("nbd://host//a", .tcp(host: "host", port: 10809), "/a"),
            ("nbd://[::1]:99/x", .tcp(host: "::1", port: 99), "x"),
            ("nbd://[fe80::1%25eth0]/x", .tcp(host: "fe80::1%eth0", port: 10809), "x"),
            ("nbd://h/%41%2f%c3%bc%3F", .tcp(host: "h", port: 10809), "A/ü?"),
            ("nbds://h/a+b", .tcp(host: "h", port: 10809), "a+b"),
            ("nbd+unix:///name?socket=/run/a%20b", .unix(path: "/run/a b"), "name"),
            ("nbd+unix://?socket=x", .unix(path: "x"), ""),
            ("nbds+unix:///?socket=/x", .unix(path: "/x"), ""),
            ("nbd+vsock://2:1234/e", .vsock(cid: 2, port: 1234), "e"),
            ("nbds+vsock://2/e", .vsock(cid: 2, port: 10809), "e"),
        ]
        for (text, address, name) in cases {
            let uri = try NBDURI(text)
            #expect(uri.address == address && uri.exportName == name, "\(text): \(uri.address) \(uri.exportName)")
            #expect((uri.tls != nil) == text.lowercased().hasPrefix("nbds"))
        }
    }

    @Test func `parameters are libnbd's and ours`() throws {
        let pin = String(repeating: "ab", count: 32)
        let colons = Array(repeating: "CD", count: 20).joined(separator: ":")
        let uri = try NBDURI(
            "nbds://alice@h/e?tls-certificates=/c&tls-psk-file=/p&tls-hostname=n&tls-verify-peer=false&connections=7"
                + "&timeout=5&reconnect=0&format=qcow2&fingerprint=sha256:\(pin),sha1:\(colons)")
        #expect(uri.tls?.identity == "alice" && uri.tls?.certificates == "/c" && uri.tls?.preSharedKeys == "/p")
        #expect(uri.tls?.hostName == "n" && uri.tls?.verifiesPeer == false)
        #expect(uri.tls?.fingerprints.map(\.bytes.count) == [32, 20])
        #expect(uri.connectionsMax == 7 && uri.timeoutSeconds == 5 && uri.reconnectSeconds == 0)
        #expect(uri.format == "qcow2")
        let plain = try NBDURI("nbd://h")
        #expect(plain.connectionsMax == 4 && plain.timeoutSeconds == 120 && plain.reconnectSeconds == 60)
    }

    @Test(arguments: [
        "", "nbd", "nbd:", "nbd:/h", "nbd:h", "http://h/", "nbd://", "nbd:///x", "nbd://:10809/", "nbd://h:/",
        "nbd://h:0/", "nbd://h:65536/", "nbd://h:+1/", "nbd://h:1:2/", "nbd://::1/", "nbd://[::1/", "nbd://[::1]x/",
        "nbd://[h]/", "nbd://[::1%25]/", "nbd://[::1%25a;b]/", "nbd://-oProxyCommand=id/", "nbd://a b/",
        "nbd://h%0a/", "nbd://h%2f/", "nbd://h/%", "nbd://h/%4", "nbd://h/%zz", "nbd://h/%00", "nbd://h/%ff",
        "nbd://h/a#b", "nbd://h/?x=1", "nbd://h/?timeout", "nbd://h/?timeout=", "nbd://h/?timeout=0",
        "nbd://h/?timeout=3601", "nbd://h/?timeout=+5", "nbd://h/?connections=0", "nbd://h/?connections=17",
        "nbd://h/?reconnect=86401", "nbd://h/?reconnect=-1", "nbd://h/?socket=x", "nbd://user@h/", "nbds://@h/",
        "nbds://a:b@h/", "nbds://a@b@h/", "nbd://h/?tls-certificates=x", "nbd://h/?fingerprint=sha1:00",
        "nbd://h/?tls-verify-peer=false", "nbds://h/?tls-verify-peer=maybe", "nbds://h/?fingerprint=md5:00",
        "nbds://h/?fingerprint=sha256:00", "nbds://h/?fingerprint=", "nbds://h/?tls-hostname=", "nbd+unix:///x",
        "nbd+unix:///x?socket=", "nbd+unix://h/x?socket=y", "nbd+unix:///x?socket=a&socket=b",
        "nbd+unix:///x?socket=%00", "nbd+vsock://h:1/", "nbd+vsock://2:x/", "nbd+vsock://-1:1/",
        "nbd+vsock://4294967296:1/", "nbd+tcp://h/", "nbd+ssh://h/", "nbd+ssh://-oProxyCommand=id/?socket=x",
        "nbd+ssh://-l@h/?socket=x",
        "nbd+ssh://h%20id/?socket=x", "nbd+ssh://a%3bid@h/?socket=x", "nbd+ssh://h/?socket=", "nbds+ssh://h/?socket=x",
        "nbd+ssh:///?socket=x", "nbd+ssh://h:0/?socket=x",
    ])
    func `what is malformed is refused with its reason`(text: String) throws {
        let error = #expect(throws: BlockError.self) { try NBDURI(text) }
        #expect(error?.kind == .invalid)
    }

    @Test func `a long name is refused, and one in bounds kept`() throws {
        let longest = String(repeating: "n", count: 4096)
        #expect(try NBDURI("nbd://h/\(longest)").exportName == longest)
        #expect(throws: BlockError.self) { try NBDURI("nbd://h/\(longest)n") }
        #expect(throws: BlockError.self) {
            try NBDURI("nbd+unix:///?socket=/\(String(repeating: "s", count: 107))")
        }
    }

    @Test func `nothing in a message steers a terminal`() throws {
        let uri = try NBDURI("nbd+unix:///%1b%5b2J%0d%0a%e2%80%ae?socket=/x%1b")
        #expect(uri.exportName == "\u{1b}[2J\r\n\u{202e}")
        #expect(uri.description.unicodeScalars.allSatisfy { $0.value >= 32 && $0.value < 127 })
        let error = #expect(throws: BlockError.self) { try NBDURI("nbd://h/?\u{1b}[2J=1") }
        #expect(error?.message.contains("\u{1b}") == false)
    }

    @Test func `CVE-2025-14946: nothing becomes an option of ssh or a command over there`() throws {
        let uri = try NBDURI("nbd+ssh://me@host:22/e?socket=/x%20'%24(id)%3b")
        guard case .ssh(let target) = uri.address else { throw Violation("\(uri.address)") }
        #expect(
            target.arguments == [
                "-T", "-o", "BatchMode=yes", "-l", "me", "-p", "22", "--", "host", "nc", "-U", "--", "'/x '\\''$(id);'",
            ])
    }

    @Test func `what is shown can be opened again`() throws {
        for text in [
            "nbd://h/e", "nbd://[::1]:99/x", "nbds://h:1/", "nbd+unix:///n?socket=/s", "nbd+vsock://2:9/e",
            "nbd://h/a%20b%3F%25%C3%BC%0A/", "nbd+unix:///%26?socket=/%26%20",
        ] {
            let uri = try NBDURI(text)
            #expect(uri.description == text)
        }
    }
}
