// Where a server listens: Unix sockets new, stale and taken, TCP v4 and v6, several at once, and what is refused.
import CLinux
import Glibc
import Testing

@Suite struct ListenTests {
    @Test(arguments: ["tcp://127.0.0.1:0", "tcp://[::1]:0", "tcp://localhost:0"])
    func `TCP on the loopback`(_ address: String) throws {
        let folder = try Folder()
        let image = try folder.image("disk")
        let copy = try folder.filled("copy")
        try serving(["--listen", address, image], in: folder) { (gateway) throws in
            let uri = try #require(gateway.addresses.first)
            #expect(
                uri.hasPrefix(address.contains("[") ? "nbd://[::1]:" : "nbd://127.0.0.1:") || address.contains("local"))
            try run("nbdcopy", uri, copy)
        }
        #expect(try isSame(image, copy))
    }

    @Test func `several addresses and several exports at once`() throws {
        let folder = try Folder()
        let (one, two) = (try folder.image("one", seed: 1), try folder.image("two", seed: 2))
        let arguments = ["--listen", "unix:\(folder.file("a"))", "--listen", "tcp://127.0.0.1:0", one, two]
        try serving(arguments, in: folder) { (gateway) throws in
            let tcp = try #require(gateway.addresses.last)
            for (name, image) in [("one", one), ("two", two)] {
                for uri in ["nbd+unix:///\(name)?socket=\(folder.file("a"))", tcp + name] {
                    let copy = try folder.filled("copy")
                    try run("nbdcopy", uri, copy)
                    #expect(try isSame(image, copy))
                }
            }
            #expect(try attempt("nbdinfo", tcp + "three").status != 0)
        }
    }

    @Test(arguments: ["tcp://0.0.0.0:0", "tcp://[::]:0", "tcp://*:0", "tcp://:0"])
    func `other machines are let in only where that is said aloud`(_ address: String) throws {
        let refused = try attempt("diskgate", "serve", "--listen", address, "pattern:1M")
        #expect(refused.status == 1 && refused.errors.contains("--tls off"))
        try serving(["--tls", "off", "--listen", address, "pattern:1M"], in: Folder()) { (gateway) throws in
            let uri = try #require(gateway.addresses.first)
            let port = try #require(uri.split(separator: ":").last)
            let host = address.contains("[") ? "[::1]" : "127.0.0.1"
            #expect(try run("nbdinfo", "--size", "nbd://\(host):\(port)").lines == ["1048576"])
        }
    }

    @Test func `a live socket is not taken over, a stale one is`() throws {
        let folder = try Folder()
        let first = try Gateway(["pattern:1M"], in: folder)
        let second = try attempt("diskgate", "serve", "--listen", "unix:\(first.socket)", "pattern:2M")
        #expect(second.status == 1 && second.errors.contains("in use"))
        #expect(try run("nbdinfo", "--size", first.uri()).lines == ["1048576"])
        first.signal(SIGKILL)
        #expect(try first.end() == 128 + SIGKILL)
        #expect(access(first.socket, F_OK) == 0)
        try serving(["pattern:2M"], in: folder) { (gateway) throws in
            #expect(try run("nbdinfo", "--size", gateway.uri()).lines == ["2097152"])
        }
        #expect(access(first.socket, F_OK) != 0)
    }

    @Test func `a file that is no socket is not replaced`() throws {
        let folder = try Folder()
        let file = try folder.filled("socket", size: 4096)
        let outcome = try attempt("diskgate", "serve", "--listen", "unix:\(file)", "pattern:1M")
        let before = try folder.filled("before", size: 4096)
        #expect(outcome.status == 1)
        #expect(try isSame(file, before))
    }

    @Test func `a taken TCP port is refused`() throws {
        let folder = try Folder()
        try serving(["--listen", "tcp://127.0.0.1:0", "pattern:1M"], in: folder) { (gateway) throws in
            let port = try #require(gateway.addresses.first?.dropLast().split(separator: ":").last)
            let outcome = try attempt("diskgate", "serve", "--listen", "tcp://127.0.0.1:\(port)", "pattern:1M")
            #expect(outcome.status == 1 && outcome.errors.contains("in use"))
        }
    }

    @Test func `rules admit and refuse by address and user`() throws {
        let folder = try Folder()
        try serving(["--allow", "uid=\(getuid())", "pattern:1M"], in: folder) { (gateway) throws in
            try run("nbdinfo", gateway.uri())
        }
        try serving(["--allow", "uid=\(getuid() + 1)", "pattern:1M"], in: folder) { (gateway) throws in
            #expect(try attempt("nbdinfo", gateway.uri()).status != 0)
            #expect(try !run("nbdinfo", "--list", gateway.uri()).text.contains("export="))
        }
        for (rule, isAdmitted) in [("127.0.0.0/8", true), ("127.0.0.1", true), ("10.0.0.0/8", false), ("::/0", false)] {
            try serving(["--allow", "address=\(rule)", "--listen", "tcp://127.0.0.1:0", "pattern:1M"], in: folder) {
                gateway in
                let uri = try #require(gateway.addresses.first)
                #expect(try attempt("nbdinfo", uri).status == (isAdmitted ? 0 : 1), "\(rule)")
            }
        }
    }
}
