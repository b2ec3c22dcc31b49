// The control socket: exports and clients listed, added, removed and disconnected while somebody reads.
import Glibc
import Testing

@Suite struct ControlTests {
    /// Reads one export over and over, compares, and ends when a file appears or the server ends the connection.
    static let reader = """
        h = nbd.NBD()
        h.connect_uri(sys.argv[1])
        expected = open(sys.argv[2], "rb").read()
        rounds = 0
        try:
            while not os.path.exists(sys.argv[3]):
                offset = rounds * 77777 % (len(expected) - 100000)
                assert h.pread(100000, offset) == expected[offset:offset + 100000]
                rounds += 1
                if rounds == 1: open(sys.argv[3] + ".began", "w").close()
            print("stopped", rounds)
        except nbd.Error as error:
            print("disconnected", rounds)
        """

    private func startReader(_ uri: String, _ image: String, _ flag: String, output: Int32) throws -> pid_t {
        let script = "import nbd, sys, os\n" + Self.reader
        let pid = try Tool("python3").start(["-c", script, uri, image, flag], output: output, errors: output)
        guard eventually({ access(flag + ".began", F_OK) == 0 }) else { throw Trouble("the reader does not begin") }
        return pid
    }

    private func said(_ file: Int32) throws -> String { String(decoding: try content(of: file), as: UTF8.self) }

    @Test func `exports come and go while others are read`() throws {
        let folder = try Folder()
        let (one, two) = (try folder.image("one", seed: 1), try folder.image("two", seed: 2))
        let control = ["--control", "unix:\(folder.file("control"))"]
        func command(_ arguments: String...) throws -> Outcome { try Tool.diskgate.run(arguments + control) }
        let output = try namelessFile()
        defer { close(output) }
        try serving(control + ["--name", "one", one], in: folder) { (gateway) throws in
            let pid = try startReader(gateway.uri("one"), one, folder.file("flag"), output: output)
            for round in 0..<5 {
                let name = "two\(round)"
                let added = try command("exports", "add", two, "--name", name, "--description", "later", "--writable")
                #expect(added.status == 0, "\(added.errors)")
                #expect(try command("exports", "add", two, "--name", name).status == 1)
                let list = try command("exports").lines
                #expect(list.count == 2 && list[1].contains("\"\(name)\"") && list[1].contains("writable"))
                try run("qemu-io", "-f", "raw", "-c", "write -P 9 0 64k", gateway.uri(name))
                try run("nbdcopy", gateway.uri(name), folder.file("copy"))
                #expect(try isSame(two, folder.file("copy")))
                #expect(try command("exports", "remove", name).status == 0)
                #expect(try command("exports", "remove", name).status == 1)
                #expect(try attempt("nbdinfo", gateway.uri(name)).status != 0)
            }
            #expect(try command("exports", "add", "/nonexistent", "--name", "x").status == 1)
            let json = try command("exports", "list", "--json").text
            #expect(json.contains("\"name\" : \"one\"") && json.contains("\"clients\" : 1"))
            try run("touch", folder.file("flag"))
            #expect(try waitForEnd(of: pid, what: "the reader") == 0)
            #expect(try said(output).hasPrefix("stopped"))
        }
    }

    @Test func `a disconnected client goes, the others stay`() throws {
        let folder = try Folder()
        let image = try folder.image("disk")
        let control = ["--control", "unix:\(folder.file("control"))"]
        let (first, second) = (try namelessFile(), try namelessFile())
        defer {
            close(first)
            close(second)
        }
        try serving(control + [image], in: folder) { (gateway) throws in
            let goes = try startReader(gateway.uri(), image, folder.file("one"), output: first)
            let stays = try startReader(gateway.uri(), image, folder.file("two"), output: second)
            let clients = try Tool.diskgate.run(["clients"] + control).lines
            #expect(clients.count == 2 && clients.allSatisfy { $0.contains("unix pid") && $0.contains("bytes read") })
            let line = try #require(clients.first { $0.contains("pid \(goes) ") })
            let id = String(line.prefix { $0 != " " })
            #expect(try Tool.diskgate.run(["clients", "disconnect", id] + control).status == 0)
            #expect(try waitForEnd(of: goes, what: "the reader") == 0)
            #expect(try said(first).hasPrefix("disconnected"))
            #expect(try Tool.diskgate.run(["clients", "disconnect", id] + control).status == 1)
            try run("touch", folder.file("two"))
            #expect(try waitForEnd(of: stays, what: "the reader") == 0)
            #expect(try said(second).hasPrefix("stopped"))
        }
    }

    @Test func `an export that is removed ends its clients only`() throws {
        let folder = try Folder()
        let (one, two) = (try folder.image("one", seed: 1), try folder.image("two", seed: 2))
        let control = ["--control", "unix:\(folder.file("control"))"]
        let (first, second) = (try namelessFile(), try namelessFile())
        defer {
            close(first)
            close(second)
        }
        try serving(control + [one, two], in: folder) { (gateway) throws in
            let goes = try startReader(gateway.uri("one"), one, folder.file("a"), output: first)
            let stays = try startReader(gateway.uri("two"), two, folder.file("b"), output: second)
            #expect(try Tool.diskgate.run(["exports", "remove", "one"] + control).status == 0)
            #expect(try waitForEnd(of: goes, what: "the reader") == 0)
            try run("touch", folder.file("b"))
            #expect(try waitForEnd(of: stays, what: "the reader") == 0)
            #expect(try said(first).hasPrefix("disconnected") && said(second).hasPrefix("stopped"))
        }
    }

    @Test func `only its own user reaches the control socket, and nonsense is answered`() throws {
        let folder = try Folder()
        try serving(["--control", "unix:\(folder.file("control"))"], in: folder) { (_) throws in
            #expect(try run("stat", "-c", "%a", folder.file("control")).lines == ["600"])
            let script =
                "printf 'nonsense\\n{}\\n{\"command\":\"fly\"}\\n' | socat - UNIX-CONNECT:'\(folder.file("control"))'"
            _ = try Tool("socat")
            let answers = try run("sh", "-c", script).lines
            #expect(answers.count == 3 && answers.allSatisfy { $0.hasPrefix("{\"error\":") })
        }
        #expect(access(folder.file("control"), F_OK) != 0)
    }
}
