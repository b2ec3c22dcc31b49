// Clients and sockets that a parent hands over: standard input and output, socket activation, libnbd's brackets.
import Glibc
import Testing

@Suite struct InheritedTests {
    @Test(arguments: [["serve", "--stdio"], ["serve"]]) func `libnbd's brackets start a server for themselves`(
        _ verb: [String]
    ) throws {
        let folder = try Folder()
        let image = try folder.image("disk")
        let copy = try folder.filled("copy")
        let server = ["[", Tool.diskgate.path] + verb + [image, "]"]
        let outcome = try Tool("nbdcopy").run(["--"] + server + [copy])
        #expect(outcome.status == 0, "\(outcome.errors)")
        #expect(try isSame(image, copy))
        let info = try Tool("nbdinfo").run(["--size", "--"] + server)
        #expect(info.lines == ["\(24 << 20)"], "\(info.errors)")
    }

    @Test func `standard input and output are a client`() throws {
        let folder = try Folder()
        let image = try folder.image("disk")
        _ = try python(
            """
            h = nbd.NBD()
            h.add_meta_context("base:allocation")
            h.connect_command([sys.argv[1], "serve", "--stdio", "--writable", sys.argv[2]])
            h.pwrite(b"through a pipe", 4000)
            assert h.pread(100000, 3000) == open(sys.argv[2], "rb").read()[3000:103000]
            assert h.pread(14, 4000) == b"through a pipe"
            h.shutdown()
            """, Tool.diskgate.path, image)
    }

    @Test(arguments: ["", ",pipes"]) func `socat connects a socket or pipes with standard input and output`(
        _ option: String
    ) throws {
        let folder = try Folder()
        let image = try folder.image("disk")
        let copy = try folder.filled("copy")
        let sink = try namelessFile()
        defer { close(sink) }
        let socket = folder.file("socat")
        let pid = try Tool("socat").start(
            ["UNIX-LISTEN:\(socket)", "EXEC:'\(Tool.diskgate.path)' serve --stdio '\(image)'\(option)"], output: sink,
            errors: sink)
        #expect(eventually { access(socket, F_OK) == 0 })
        try run("nbdcopy", "-C", "1", "nbd+unix:///?socket=\(socket)", copy)
        _ = try waitForEnd(of: pid, what: "socat")
        #expect(try isSame(image, copy))
    }

    @Test(arguments: [SIGTERM, SIGINT]) func `a signal ends a server on standard input`(_ signal: Int32) throws {
        let sink = try namelessFile()
        defer { close(sink) }
        let folder = try Folder()
        try run("mkfifo", folder.file("in"))
        let pid = try Tool("sh").start(
            ["-c", "exec '\(Tool.diskgate.path)' serve --stdio pattern:1M <> '\(folder.file("in"))'"], output: sink,
            errors: sink)
        #expect(eventually { (try? content(of: sink))?.count == 18 })
        kill(pid, signal)
        #expect(try waitForEnd(of: pid, what: "the server") == 128 + signal)
    }

    @Test func `systemd's socket activation`() throws {
        let folder = try Folder()
        let image = try folder.image("disk")
        let copy = try folder.filled("copy")
        let sink = try namelessFile()
        defer { close(sink) }
        let socket = folder.file("activated")
        let pid = try Tool("systemd-socket-activate").start(
            ["-l", socket, Tool.diskgate.path, "serve", image], output: sink, errors: sink)
        #expect(eventually { access(socket, F_OK) == 0 })
        try run("nbdcopy", "nbd+unix:///?socket=\(socket)", copy)
        kill(pid, SIGTERM)
        #expect(try waitForEnd(of: pid, what: "the server") == 0)
        #expect(try isSame(image, copy))
        // The socket is its maker's: it stays.
        #expect(access(socket, F_OK) == 0)
    }
}
