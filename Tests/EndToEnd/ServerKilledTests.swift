// The server killed while clients copy and write: they fail, nothing answered is lost, and a new server goes on.
import Glibc
import Testing

@Suite struct ServerKilledTests {
    /// Starts a program and returns a function that waits for its end.
    private func start(_ name: String, _ arguments: [String]) throws -> () throws -> Int32 {
        let output = try namelessFile()
        let pid = try Tool(name).start(arguments, output: output, errors: output)
        return {
            defer { close(output) }
            return try waitForEnd(of: pid, what: name)
        }
    }

    private static let ways = [Access.plain, .certificate("client"), .key("backup")]

    /// What makes a server take a client, and be slow enough to be killed in the middle: 24 MiB take four seconds.
    private func options(_ way: Access) throws -> [String] {
        let slow = ["--limit-rate", "6M"]
        return try slow + (way.isPlain ? [] : Gateway.tls())
    }

    /// Kills a server once a file has got some bytes that are not 0x5A.
    private func kill(_ gateway: Gateway, once file: String) throws {
        let script = """
            import sys, time
            for turn in range(1000):
                with open(sys.argv[1], "rb") as file:
                    if file.read().count(0x5A) < (22 << 20): break
                time.sleep(0.02)
            else: raise SystemExit("nothing has arrived")
            """
        let outcome = try Tool("python3").run(["-c", script, file])
        if outcome.status != 0 { throw Trouble(outcome.errors) }
        gateway.signal(SIGKILL)
        #expect(try gateway.end() == 128 + SIGKILL)
    }

    @Test(arguments: ways) func `nbdcopy fails when its server is killed, and succeeds with the next`(_ way: Access)
        throws
    {
        let folder = try Folder()
        let image = try folder.image("disk")
        let copy = try folder.filled("copy")
        let first = try Gateway(options(way) + [image], in: folder)
        let uri = try way.uri(socket: first.socket)
        let copying = try start("nbdcopy", [uri, copy])
        try kill(first, once: copy)
        #expect(try copying() != 0)
        #expect(try !isSame(image, copy))
        // The socket of the first is in the way of nobody.
        try serving(way.isPlain ? [image] : Gateway.tls() + [image], in: folder) { (_) throws in
            try run("nbdcopy", uri, copy)
        }
        #expect(try isSame(image, copy))
    }

    @Test(arguments: ways)
    func `a target has what was there or what was written, byte by byte, and can be written again`(
        _ way: Access
    ) throws {
        let folder = try Folder()
        let image = try folder.image("disk")
        let target = try folder.filled("target")
        let first = try Gateway(options(way) + ["--writable", target], in: folder)
        let uri = try way.uri(socket: first.socket)
        let copying = try start("nbdcopy", ["--flush", image, uri])
        try kill(first, once: target)
        #expect(try copying() != 0)
        let script = """
            import sys
            new, got = [open(path, "rb").read() for path in sys.argv[1:]]
            assert len(new) == len(got)
            assert all(one in (other, 0x5A) for one, other in zip(got, new))
            """
        let compared = try Tool("python3").run(["-c", script, image, target])
        #expect(compared.status == 0, "\(compared.errors)")
        try serving(way.isPlain ? ["--writable", target] : Gateway.tls() + ["--writable", target], in: folder) {
            (_) throws in try run("nbdcopy", "--flush", image, uri)
        }
        #expect(try isSame(image, target))
    }

    @Test func `fio fails when its server is killed, and verifies with the next`() throws {
        let folder = try Folder()
        let target = try folder.filled("target")
        let uri = try Access.plain.uri(socket: folder.file("socket"))
        let job = [
            "--name=v", "--ioengine=nbd", "--uri=\(uri)", "--rw=randwrite", "--bs=4k", "--size=24M", "--iodepth=16",
            "--verify=crc32c", "--do_verify=1", "--verify_state_save=0", "--randseed=1",
        ]
        let first = try Gateway(["--writable", "--limit-rate", "6M", target], in: folder)
        let writing = try start("fio", job)
        try kill(first, once: target)
        #expect(try writing() != 0)
        try serving(["--writable", target], in: folder) { (_) throws in
            let outcome = try Tool("fio").run(job)
            #expect(outcome.status == 0, "\(outcome.text)\(outcome.errors)")
        }
    }

    @Test(arguments: ways) func `what was answered before the server was killed is there afterwards, whole`(
        _ way: Access
    ) throws {
        let folder = try Folder()
        let target = try folder.filled("target", size: 4 << 20)
        let tls = way.isPlain ? [] : try Gateway.tls()
        let first = try Gateway(tls + ["--writable", target], in: folder)
        let uri = try way.uri(socket: first.socket)
        // Eight writes at a time; the script kills the server when two hundred were answered, and says which those are.
        let script = """
            h = nbd.NBD()
            h.set_uri_allow_local_file(True)
            h.connect_uri(sys.argv[1])
            def block(number): return number.to_bytes(8, "big") * 512
            answered, waiting, number = [], {}, 0
            try:
                while True:
                    while len(waiting) < 8 and number < 1024:
                        buffer = nbd.Buffer.from_bytearray(bytearray(block(number)))
                        waiting[h.aio_pwrite(buffer, number * 4096)] = number
                        number += 1
                    h.poll(1000)
                    for cookie in [cookie for cookie in waiting if h.aio_command_completed(cookie)]:
                        answered.append(waiting.pop(cookie))
                    if len(answered) >= 200: os.kill(int(sys.argv[2]), 9)
                    if not waiting and number == 1024: raise SystemExit("the server is still there")
            except nbd.Error:
                pass
            content = open(sys.argv[3], "rb").read()
            for number in range(1024):
                found = content[number * 4096 : (number + 1) * 4096]
                assert found == block(number) or (found == b"\\x5a" * 4096 and number not in answered), number
            print(len(answered) >= 200)
            """
        #expect(try python(script, uri, "\(first.pid)", target).lines == ["True"])
        #expect(try first.end() == 128 + SIGKILL)
    }
}
