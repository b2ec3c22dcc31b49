// A virtual machine for one test: QEMU with real disks and dirty bitmaps; what its guest would write, tests write.
import CLinux
import Glibc

/// A QEMU whose processor stands still.
final class Machine {
    let folder: Folder
    private var pid: pid_t = 0
    private let log: Int32
    /// Disks by their ids, and their images.
    let disks: [(id: String, image: String)]
    private let words: [String]

    /// How diskgate names the machine.
    var uri: String { "qmp+unix:\(folder.file("qmp"))?scratch=\(folder.path)" }

    /// Makes images with some random data and starts a QEMU with them.
    ///
    /// - Parameter options: more words of QEMU's command line.
    init(
        in folder: Folder, disks names: [String] = ["vda"], megabytes: Int = 32, options: [String] = []
    ) throws {
        self.folder = folder
        log = try namelessFile()
        disks = names.map { ($0, folder.file("\($0).qcow2")) }
        var words = [
            "-machine", "q35,accel=tcg", "-S", "-display", "none", "-nodefaults", "-m", "32", "-name", "mail",
            "-uuid", "5a6b7c8d-0001-4002-8003-00000000000\(names.count)",
            "-qmp", "unix:\(folder.file("qmp")),server=on,wait=off",
            "-qmp", "unix:\(folder.file("own")),server=on,wait=off",
            "-object", "throttle-group,id=pace",
        ]
        for (index, disk) in disks.enumerated() {
            let raw = try folder.image("\(disk.id).first", size: megabytes << 20, seed: UInt64(index) + 3)
            try run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, disk.image)
            words += [
                "-blockdev",
                "driver=qcow2,node-name=node-\(disk.id),discard=unmap,file.driver=throttle,file.throttle-group=pace,"
                    + "file.file.driver=file,file.file.filename=\(disk.image)",
                "-device", "virtio-blk-pci,drive=node-\(disk.id),id=\(disk.id)",
            ]
        }
        self.words = words + options
        try start()
    }

    deinit {
        kill()
        close(log)
    }

    /// Starts it, again after `kill`.
    func start() throws {
        pid = try Tool("qemu-system-x86_64").start(words, output: log, errors: log)
        if !(eventually { (try? monitor("")) != nil }) {
            throw Trouble("QEMU does not start: \(String(decoding: try content(of: log), as: UTF8.self))")
        }
    }

    /// Ends it as a crash does.
    func kill() {
        guard pid > 0 else { return }
        Glibc.kill(pid, SIGKILL)
        var status: Int32 = 0
        waitpid(pid, &status, 0)
        pid = 0
    }

    func signal(_ number: Int32) { Glibc.kill(pid, number) }

    /// Lets its images be read so fast, and no faster; 0 is as fast as it goes.
    func limit(bytesPerSecond: Int) throws {
        try monitor(
            """
            execute("qom-set", {"path": "/objects/pace", "property": "limits",
                                "value": {"bps-read": int(sys.argv[2])}})
            """, ["\(bytesPerSecond)"])
    }

    /// Runs Python with `execute(command, arguments)` on a monitor of the test's own, and gives the lines it prints.
    @discardableResult
    func monitor(_ script: String, _ arguments: [String] = []) throws -> [String] {
        let prelude = """
            import json, socket, sys
            link = socket.socket(socket.AF_UNIX)
            link.settimeout(20)
            link.connect(sys.argv[1])
            stream = link.makefile("rw")
            stream.readline()
            def execute(command, arguments={}):
                stream.write(json.dumps({"execute": command, "arguments": arguments}) + "\\n")
                stream.flush()
                while True:
                    answer = json.loads(stream.readline())
                    if "error" in answer: raise SystemExit(str(answer["error"]))
                    if "return" in answer: return answer["return"]
            execute("qmp_capabilities")

            """
        let outcome = try Tool("python3").run(["-c", prelude + script, folder.file("own")] + arguments)
        if outcome.status != 0 { throw Trouble("the monitor: \(outcome.errors)") }
        return outcome.lines
    }

    /// Lets the guest do something with a disk, as qemu-io says it.
    func io(_ commands: String..., disk: String = "vda") throws { try io(commands, disk: disk) }

    func io(_ commands: [String], disk: String = "vda") throws {
        try monitor(
            """
            for command in sys.argv[3:]:
                said = execute("human-monitor-command", {"command-line":
                    f'qemu-io -d /machine/peripheral/{sys.argv[2]}/virtio-backend "{command}"'})
                if said: raise SystemExit(f"{command}: {said}")
            """, [disk] + commands)
    }

    /// A disk's content now, as a raw file.
    func snapshot(_ name: String, disk: String = "vda") throws -> String {
        try io("flush", disk: disk)
        let image = disks.first { $0.id == disk }?.image ?? ""
        try run("qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw", image, folder.file(name))
        return folder.file(name)
    }

    /// Names of the dirty bitmaps that diskgate has made on its disks, each once for each disk.
    func bitmaps() throws -> [String] {
        try monitor(
            """
            for node in execute("query-named-block-nodes", {"flat": True}):
                for bitmap in node.get("dirty-bitmaps", []):
                    print(node["node-name"], bitmap["name"], "recording" if bitmap["recording"] else "stopped")
            """
        ).filter { $0.contains(" diskgate-") }
    }

    /// What lies in its block layer besides its disks, and beside their images.
    func leftovers() throws -> [String] {
        let inside = try monitor(
            """
            nodes = [node["node-name"] for node in execute("query-named-block-nodes", {"flat": True})]
            exports = [export["id"] for export in execute("query-block-exports")]
            jobs = [job["id"] for job in execute("query-jobs")]
            for name in [name for name in nodes if name.startswith("dg-")] + exports + jobs: print(name)
            """)
        return inside + (try Tool("sh").run(["-c", "ls \(folder.path) | grep '^diskgate-' || true"]).lines)
    }
}
