// A QEMU for one test: real block layer, real monitor, no guest that runs. What a guest would write, tests write.
import Block
import Glibc
import LinuxIO
import Support

@testable import Hypervisors

/// A QEMU with some disks, whose processor stands still.
final class QEMUProcess {
    /// A disk: the device's id and its image.
    struct Disk {
        var id: String
        var path: String
        var format = "qcow2"
    }

    let directory: TemporaryDirectory
    let disks: [Disk]
    private let words: [String]
    private(set) var pid: pid_t = 0

    /// Whether there is a QEMU here.
    static let isAvailable = Tool.exists("qemu-system-x86_64") && Tool.exists("qemu-img")

    /// The monitor of diskgate.
    var monitor: String { directory.file("qmp.sock") }
    /// The machine's URI.
    var uri: String { "qmp+unix:\(monitor)?scratch=\(directory.path)" }
    private var ownMonitor: String { directory.file("own.sock") }

    /// Makes images of a pattern and starts a QEMU with them.
    init(
        _ directory: TemporaryDirectory, disks: [(id: String, format: String)], size: String = "16M",
        _ more: [String] = []
    )
        throws
    {
        self.directory = directory
        self.disks = disks.map { Disk(id: $0.id, path: directory.file("\($0.id).\($0.format)"), format: $0.format) }
        var words = [
            "-machine", "q35,accel=tcg", "-S", "-display", "none", "-nodefaults", "-m", "32",
            "-qmp", "unix:\(directory.file("qmp.sock")),server=on,wait=off",
            "-qmp", "unix:\(directory.file("own.sock")),server=on,wait=off",
        ]
        for disk in self.disks {
            _ = try Tool.output("qemu-img", ["create", "-q", "-f", disk.format, disk.path, size])
            _ = try Tool.output(
                "qemu-io", ["-f", disk.format, "-c", "write -q -P 0x11 0 8M", disk.path])
            words += [
                "-blockdev",
                "driver=\(disk.format),node-name=node-\(disk.id),discard=unmap,"
                    + "file.driver=file,file.filename=\(disk.path)",
                "-device", "virtio-blk-pci,drive=node-\(disk.id),id=\(disk.id)",
            ]
        }
        self.words = words + more
        try start()
    }

    deinit { kill() }

    /// Starts it, again.
    func start() throws {
        guard let program = Tool.path(of: "qemu-system-x86_64") else { throw CheckFailure("there is no QEMU") }
        let log = try Descriptor.open(directory.file("qemu.log"), O_CREAT | O_WRONLY | O_APPEND)
        pid = try ChildProgram.start([program] + words, input: nil, output: log.number, errors: log.number)
        let deadline = monotonicSeconds() + 30
        while (try? own { _ in }) == nil {
            try require(monotonicSeconds() < deadline, "QEMU does not start: \(directory.file("qemu.log"))")
            usleep(5000)
        }
    }

    /// Ends it as a crash does.
    func kill() {
        guard pid > 0 else { return }
        Glibc.kill(pid, SIGKILL)
        ChildProgram.reap(pid)
        pid = 0
    }

    /// Ends it in order.
    func quit() throws {
        try own { try $0.execute("quit") }
        ChildProgram.reap(pid)
        pid = 0
    }

    /// Runs a body with a monitor that is the test's own.
    @discardableResult
    func own<R>(_ body: (QMPClient) throws -> R) throws -> R {
        try body(try QMPClient.connect(to: .unix(path: ownMonitor), seconds: 10))
    }

    /// Lets the guest do something with a disk, as qemu-io says it.
    func io(_ disk: String, _ command: String) throws {
        let answer = try own {
            try $0.execute(
                "human-monitor-command",
                ["command-line": .text("qemu-io -d /machine/peripheral/\(disk)/virtio-backend \"\(command)\"")])
        }
        try require(answer.string == "", "qemu-io \(command): \(answer)")
    }

    /// Names of the bitmaps on a disk, without what tells that they are this disk's.
    func bitmaps(_ disk: String) throws -> [String] {
        let nodes = try own { try $0.execute("query-named-block-nodes", ["flat": true]) }.elements
        let node = nodes.first { $0["node-name"]?.string == "node-\(disk)" }
        let names = node?["dirty-bitmaps"]?.elements.compactMap { $0["name"]?.string } ?? []
        return names.map { $0.replacing("-\(OwnName.hash(disk))-", with: "-") }.sorted()
    }

    /// What lies in its block layer besides the disks: jobs, exports, scratch nodes; and directories beside it.
    func leftovers() throws -> [String] {
        let found = try own { monitor in
            let jobs = try monitor.execute("query-jobs").elements.compactMap { $0["id"]?.string }
            let exports = try monitor.execute("query-block-exports").elements.compactMap { $0["id"]?.string }
            let nodes = try monitor.execute("query-named-block-nodes", ["flat": true]).elements
            return jobs + exports + nodes.compactMap { $0["node-name"]?.string }.filter { $0.hasPrefix("dg-") }
        }
        return try found + namesInDirectory(directory.path).filter { $0.hasPrefix("diskgate-") }
    }

    /// A disk's content now, as a raw file.
    func content(_ disk: Disk, _ name: String) throws -> String {
        let path = directory.file(name)
        try io(disk.id, "flush")
        _ = try Tool.output("qemu-img", ["convert", "-U", "-f", disk.format, "-O", "raw", disk.path, path])
        return path
    }
}

/// Runs a body with a QEMU, which is ended.
func withQEMU(
    _ disks: [(id: String, format: String)] = [("vda", "qcow2")], size: String = "16M", _ more: [String] = [],
    _ body: (QEMUProcess) throws -> Void
) throws {
    try withTemporaryDirectory { directory in
        let process = try QEMUProcess(directory, disks: disks, size: size, more)
        defer { process.kill() }
        try body(process)
    }
}
