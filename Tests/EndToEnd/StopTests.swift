// SIGTERM under load: what was asked is answered whole, then the server ends with 0.
import Glibc
import Testing

@Suite struct StopTests {
    @Test func `requests in flight are answered, all and right`() throws {
        let folder = try Folder()
        let image = try folder.image("disk")
        let gateway = try Gateway(["--delay-read", "700", image], in: folder)
        let output = try namelessFile()
        defer { close(output) }
        let script = """
            import nbd, sys, os
            h = nbd.NBD()
            h.connect_uri(sys.argv[1])
            expected = open(sys.argv[2], "rb").read()
            done, buffers = [], []
            for index in range(48):
                buffer = nbd.Buffer(65536)
                buffers.append(buffer)
                def finish(error, index=index): return done.append((index, error.value)) or 1
                h.aio_pread(buffer, index * 65536, completion=finish)
            open(sys.argv[3], "w").close()
            while len(done) < 48: h.poll(-1)
            for index, error in done:
                assert error == 0, (index, error)
                assert buffers[index].to_bytearray() == expected[index * 65536:(index + 1) * 65536], index
            print("all answered")
            """
        let pid = try Tool("python3").start(
            ["-c", script, gateway.uri(), image, folder.file("sent")], output: output, errors: output)
        #expect(eventually { access(folder.file("sent"), F_OK) == 0 })
        usleep(200_000)
        #expect(try gateway.stop() == 0)
        #expect(try waitForEnd(of: pid, what: "the client") == 0)
        #expect(String(decoding: try content(of: output), as: UTF8.self) == "all answered\n")
    }

    @Test(arguments: [SIGTERM, SIGINT]) func `a copy that runs does not hold the server`(_ signal: Int32) throws {
        let folder = try Folder()
        let gateway = try Gateway(["--limit-rate", "50M", "pattern:1G"], in: folder)
        let sink = try namelessFile()
        defer { close(sink) }
        let pid = try Tool("nbdcopy").start([gateway.uri(), "null:"], output: sink, errors: sink)
        usleep(400_000)
        gateway.signal(signal)
        #expect(try gateway.end() == 0)
        #expect(try waitForEnd(of: pid, what: "nbdcopy") != 0)
        #expect(access(gateway.socket, F_OK) != 0)
    }

    @Test func `clients that say nothing do not hold the server`() throws {
        let folder = try Folder()
        let gateway = try Gateway(["pattern:1M"], in: folder)
        let sink = try namelessFile()
        defer { close(sink) }
        let silent = try Tool("socat").start(["UNIX-CONNECT:\(gateway.socket)", "PIPE"], output: sink, errors: sink)
        usleep(200_000)
        #expect(try gateway.stop() == 0)
        kill(silent, SIGKILL)
        _ = try waitForEnd(of: silent, what: "socat")
    }
}
