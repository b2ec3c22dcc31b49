// What a server says of its clients: summaries, stuck requests, figures on the control socket, and its memory.
import Glibc
import Testing

@Suite struct FiguresTests {
    @Test func `the log tells what was done, on a signal and at the end`() throws {
        let folder = try Folder()
        let image = try folder.filled("disk", size: 8 << 20)
        let gateway = try Gateway(["--name", "web", image, "--name", "unused", "memory:1M"], in: folder)
        try run("nbdcopy", "--requests=4", "--request-size=262144", gateway.uri("web"), "null:")
        gateway.signal(SIGUSR1)
        #expect(eventually { gateway.log.contains("export \"web\": 0 clients, ") })
        #expect(gateway.log.contains("; read ") && gateway.log.contains(", 8388608 bytes, half within "))
        #expect(eventually { gateway.log.contains("export \"unused\": 0 clients, 0 so far") })
        let before = gateway.log.split(separator: "\n").count
        #expect(try gateway.stop() == 0)
        let last = gateway.log.split(separator: "\n").dropFirst(before)
        #expect(last.filter { $0.contains("export \"web\": 0 clients") }.count == 1)
        #expect(last.allSatisfy { !$0.contains("unused") }, "nobody has used it")
    }

    @Test func `a stuck request is seen in the log, the metrics and the list of clients`() throws {
        let folder = try Folder()
        let image = try folder.filled("disk", size: 1 << 20)
        let control = ["--control", "unix:\(folder.file("control"))"]
        let slow = ["--delay-read", "6000", "--stuck-after", "1"]
        try serving(control + slow + [image], in: folder) { (gateway) throws in
            let output = try namelessFile()
            defer { close(output) }
            let pid = try Tool("qemu-io").start(
                ["-f", "raw", "-r", "-c", "read 64k 4k", gateway.uri()], output: output, errors: output)
            #expect(
                eventually {
                    gateway.log.contains("a read of 4096 bytes at 65536 of \(image) (export \"\") has waited for")
                })
            let list = try Tool.diskgate.run(["clients"] + control)
            #expect(list.text.contains("1 in flight, the oldest for "), "\(list.text)")
            let json = try Tool.diskgate.run(["clients", "list", "--json"] + control)
            #expect(json.text.contains("\"inFlight\" : 1") && json.text.contains("\"oldestRequestSeconds\" : "))
            gateway.signal(SIGUSR1)
            #expect(eventually { gateway.log.contains("1 requests in flight, the oldest for ") })
            #expect(try waitForEnd(of: pid, what: "qemu-io") == 0)
            #expect(eventually { gateway.log.contains("has waited for storage until") })
            let exports = try Tool.diskgate.run(["exports", "list", "--json"] + control)
            #expect(exports.text.contains("\"operation\" : \"read\"") && exports.text.contains("\"medianSeconds\" : 8"))
        }
    }

    /// Connects many clients of which none reads what it asked for, or each sends half of a write; says when all have.
    private static let hoarders = """
        import socket, struct, time
        def receive(s, n):
            data = b""
            while len(data) < n:
                got = s.recv(n - len(data)); assert got; data += got
            return data
        def enter(path):
            s = socket.socket(socket.AF_UNIX); s.connect(path); receive(s, 18); s.sendall(struct.pack(">I", 3))
            for option, data in (8, b""), (7, b"\\0\\0\\0\\0\\0\\0"):
                s.sendall(b"IHAVEOPT" + struct.pack(">II", option, len(data)) + data)
                while True:
                    kind, length = struct.unpack(">II", receive(s, 20)[12:]); receive(s, length)
                    if kind == 1: break
                    assert kind < 1 << 31
            return s
        def request(command, index):
            return struct.pack(">IHHQQI", 0x25609513, 0, command, index, index % 64 * 262144, 262144)
        held = []
        for client in range(200):
            s = enter(sys.argv[1]); held.append(s)
            if sys.argv[2] == "read": s.sendall(b"".join(request(0, client + index) for index in range(128)))
            else: s.sendall(request(1, client) + b"x" * 131072)
        print("ready", flush=True)
        time.sleep(600)
        """

    /// Bytes that a process has in memory, most of all so far.
    private func peak(_ pid: pid_t) throws -> Int {
        let file = open("/proc/\(pid)/status", O_RDONLY)
        defer { close(file) }
        var bytes = [UInt8](repeating: 0, count: 8192)
        let text = String(decoding: bytes[..<max(0, read(file, &bytes, bytes.count))], as: UTF8.self)
        let line = text.split(separator: "\n").first { $0.hasPrefix("VmHWM:") } ?? ""
        guard
            let kilobytes = line.split(whereSeparator: { $0 == " " || $0 == "\t" }).dropFirst().first.flatMap({
                Int($0)
            })
        else { throw Trouble("the memory of process \(pid) is not known") }
        return kilobytes * 1024
    }

    /// Bounds: 200 buffers of 324 KiB and stacks, one piece of 256 KiB each, the budget, and a program of 60 MiB.
    @Test(arguments: [("direct", "read"), ("cached", "read"), ("memory", "write")])
    func `memory stays bounded when 200 clients take nothing`(_ source: String, _ kind: String) throws {
        let folder = try Folder()
        let image = source == "memory" ? "memory:16M" : try folder.filled("disk", size: 16 << 20)
        let disk = source == "direct" ? "file://\(image)?direct=true" : image
        let budget = ["--request-memory", "64M"] + (source == "memory" ? ["--writable"] : [])
        let gateway = try Gateway(budget + [disk], in: folder)
        let output = try namelessFile()
        defer { close(output) }
        let script = "import sys\n" + Self.hoarders
        let pid = try Tool("python3").start(["-c", script, gateway.socket, kind], output: output, errors: output)
        defer {
            kill(pid, SIGKILL)
            var status: Int32 = 0
            waitpid(pid, &status, 0)
        }
        #expect(
            eventually { String(decoding: (try? content(of: output)) ?? [], as: UTF8.self).contains("ready") },
            "\(String(decoding: (try? content(of: output)) ?? [], as: UTF8.self))")
        // Served beside them, and the requests of all have been looked at by then.
        try run(
            "qemu-io", "-f", "raw", "-r", "-c", source == "memory" ? "read 0 64k" : "read -P 0x5A 0 64k", gateway.uri())
        usleep(1_000_000)
        let bound = 200 * ((324 + 64 + 256) << 10) + (64 << 20) + (60 << 20)
        #expect(try peak(gateway.pid) < bound)
    }
}
