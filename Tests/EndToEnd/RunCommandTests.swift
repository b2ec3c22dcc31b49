// --run and --exit-with-last: a server that lives as long as somebody needs it.
import Glibc
import Testing

@Suite struct RunCommandTests {
    @Test(arguments: [0, 1, 7, 255]) func `the command's status is the server's`(_ status: Int32) throws {
        #expect(try attempt("diskgate", "serve", "pattern:1M", "--run", "exit \(status)").status == status)
    }

    @Test func `a command that a signal ended has the shell's status`() throws {
        #expect(try attempt("diskgate", "serve", "pattern:1M", "--run", "kill -9 $$").status == 128 + SIGKILL)
    }

    @Test func `the command finds the server by its variables`() throws {
        let private_ = try run(
            "diskgate", "serve", "pattern:3M", "--name", "a b", "--run",
            "nbdinfo --size \"$uri\"; test -S \"$unixsocket\" && echo \"$exportname $unixsocket\"; test -z \"$port\""
        ).lines
        #expect(private_.first == "3145728" && private_.last?.hasPrefix("a b /") == true)
        // The private socket and its directory are gone.
        let socket = String(private_.last?.dropFirst(4) ?? "")
        #expect(access(socket, F_OK) != 0)
        #expect(access(socket.split(separator: "/").dropLast().reduce("") { "\($0)/\($1)" }, F_OK) != 0)
        let tcp = try run(
            "diskgate", "serve", "pattern:3M", "--listen", "tcp://127.0.0.1:0", "--run",
            "nbdinfo --size nbd://127.0.0.1:$port; qemu-img info -f raw $nbd | grep -c 'virtual size: 3 MiB'"
        ).lines
        #expect(tcp == ["3145728", "1"])
    }

    @Test func `the command is ended with the server`() throws {
        let folder = try Folder()
        let gateway = try Gateway(
            ["pattern:1M", "--run", "echo $$ > '\(folder.file("pid"))'; exec sleep 300"], in: folder)
        #expect(
            eventually {
                access(folder.file("pid"), F_OK) == 0 && !((try? run("cat", folder.file("pid")).lines) ?? []).isEmpty
            })
        let pid = try #require(Int32(try run("cat", folder.file("pid")).lines[0]))
        #expect(try gateway.stop() == 128 + SIGTERM)
        #expect(kill(pid, 0) == -1 && errno == ESRCH)
    }

    @Test func `with the last client the server goes`() throws {
        let folder = try Folder()
        let gateway = try Gateway(["--exit-with-last", "pattern:1M"], in: folder)
        _ = try python(
            """
            first, second = nbd.NBD(), nbd.NBD()
            first.connect_uri(sys.argv[1])
            second.connect_uri(sys.argv[1])
            first.shutdown()
            second.pread(512, 0)
            second.shutdown()
            """, gateway.uri())
        #expect(try gateway.end() == 0)
        #expect(access(gateway.socket, F_OK) != 0)
    }
}
