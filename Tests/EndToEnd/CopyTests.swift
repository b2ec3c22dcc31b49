// `diskgate copy` in all directions: the copy equals the source, byte for byte, as other programs see it.
import Glibc
import Testing

@Suite struct CopyTests {
    private static let size = (24 << 20) + 512

    @Test(arguments: [
        [], ["--workers", "1"], ["--workers", "4"], ["--keep-zeros"], ["--verify"], ["--limit-rate", "200M"],
        ["--no-flush"],
    ])
    func `a file is copied to a new file`(_ options: [String]) throws {
        let folder = try Folder()
        let image = try folder.image("disk.raw", size: Self.size)
        try run("diskgate", "copy", image, folder.file("copy.raw"), with: options)
        #expect(try isSame(image, folder.file("copy.raw")))
        #expect(access(folder.file("copy.raw.partial"), F_OK) != 0)
        #expect(access(folder.file("copy.raw.journal"), F_OK) != 0)
    }

    @Test(arguments: [
        ["file"], ["file", "-r"], ["--filter=blocksize-policy", "file", "blocksize-minimum=4096"],
        ["--filter=blocksize-policy", "file", "blocksize-maximum=64K", "blocksize-preferred=4096"],
        ["--filter=noextents", "file"], ["--filter=multi-conn", "file", "multi-conn-mode=disable"],
        ["--filter=limit", "file", "limit=1"], ["--filter=limit", "file", "limit=2"], ["--no-sr", "file"],
    ])
    func `an export of nbdkit is copied`(_ arguments: [String]) throws {
        let folder = try Folder()
        let size = arguments.contains { $0.contains("minimum") } ? (24 << 20) + 4096 : Self.size
        let image = try folder.image("disk.raw", size: size, seed: 2)
        let plugin = (arguments.firstIndex(of: "file") ?? 0) + 1
        let socket = folder.file("nbdkit")
        let peer = try Peer(
            "nbdkit", ["-f", "-U", socket] + arguments[..<plugin] + [image] + arguments[plugin...], socket: socket)
        try run("diskgate", "copy", peer.uri(), folder.file("copy.raw"), with: ["--verify"])
        #expect(try isSame(image, folder.file("copy.raw")))
    }

    @Test func `a sparse disk stays sparse`() throws {
        let folder = try Folder()
        let peer = try Peer.nbdkit("sparse-random", "512M", "seed=3", "percent=5", in: folder)
        try run("diskgate", "copy", peer.uri(), folder.file("copy.raw"))
        try run("nbdcopy", peer.uri(), folder.file("theirs.raw"))
        #expect(try isSame(folder.file("copy.raw"), folder.file("theirs.raw")))
        let (ours, theirs) = (try blocks(folder.file("copy.raw")), try blocks(folder.file("theirs.raw")))
        #expect(ours <= theirs + theirs / 10, "\(ours) blocks, theirs has \(theirs)")
    }

    @Test func `zeros that the source calls data become holes`() throws {
        let folder = try Folder()
        let image = try folder.filled("zeros.raw", size: 8 << 20, with: 0)
        try run("diskgate", "copy", image, folder.file("copy.raw"))
        #expect(try isSame(image, folder.file("copy.raw")))
        #expect(try blocks(folder.file("copy.raw")) < 64)
    }

    @Test func `a qcow2 chain becomes one raw disk`() throws {
        let folder = try Folder()
        let base = try folder.image("base.raw", seed: 4)
        try run("qemu-img", "convert", "-O", "qcow2", base, folder.file("base.qcow2"))
        try run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", folder.file("top.qcow2"))
        try run("qemu-io", "-c", "write -P 7 1M 300k", "-c", "write -z 5M 2M", folder.file("top.qcow2"))
        try run("diskgate", "copy", folder.file("top.qcow2"), folder.file("copy.raw"))
        try run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", folder.file("top.qcow2"), folder.file("copy.raw"))
    }

    @Test(arguments: [[], ["--compress"], ["--verify", "--compress"]])
    func `a new qcow2 image is what qemu reads`(_ options: [String]) throws {
        let folder = try Folder()
        let image = try folder.image("disk.raw", seed: 5)
        let peer = try Peer.nbdkit("file", image, in: folder)
        let copy = folder.file("copy.qcow2")
        try run("diskgate", "copy", peer.uri(), copy, with: ["--to-format", "qcow2"] + options)
        try run("qemu-img", "check", "-q", copy)
        try run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", image, copy)
    }

    @Test func `standard output gets every byte in order`() throws {
        let folder = try Folder()
        let image = try folder.image("disk.raw", size: Self.size, seed: 6)
        let peer = try Peer.nbdkit("--filter=delay", "file", image, "delay-read=1ms", in: folder)
        let diskgate = Tool.diskgate.path
        try run("sh", "-c", "'\(diskgate)' copy '\(peer.uri())' - | cmp - '\(image)'")
        try run("sh", "-c", "'\(diskgate)' copy '\(image)' - | cmp - '\(image)'")
    }

    @Test func `standard output that is closed early is an error`() throws {
        let folder = try Folder()
        let image = try folder.image("disk.raw", seed: 6)
        let outcome = try attempt(
            "sh", "-c",
            "('\(Tool.diskgate.path)' copy '\(image)' -; echo \"status $?\" >&2) | head -c 100000 >/dev/null")
        #expect(outcome.errors.contains("status 1") && outcome.errors.contains("standard output"), "\(outcome.errors)")
    }

    @Test func `a server is written to, and old content goes`() throws {
        let folder = try Folder()
        let image = try folder.image("disk.raw", seed: 7)
        let nbdkit = try folder.filled("nbdkit.raw")
        let peer = try Peer.nbdkit("file", nbdkit, in: folder)
        try run("diskgate", "copy", image, peer.uri(), with: ["--verify"])
        #expect(try isSame(image, nbdkit))

        let qemu = try folder.filled("qemu.raw")
        let socket = folder.file("qemu-nbd")
        let other = try Peer("qemu-nbd", ["-t", "-f", "raw", "-k", socket, qemu], socket: socket)
        try run("diskgate", "copy", peer.uri(), other.uri())
        #expect(try isSame(image, qemu))

        let own = try folder.filled("own.raw")
        try serving(["--writable", own], in: folder) { (gateway) throws in
            try run("diskgate", "copy", peer.uri(), gateway.uri(), with: ["--verify"])
        }
        #expect(try isSame(image, own))
    }

    @Test func `a server that cannot zero is written zeros to`() throws {
        let folder = try Folder()
        let image = try folder.image("disk.raw", seed: 8)
        let target = try folder.filled("target.raw")
        let peer = try Peer.nbdkit("--filter=nozero", "file", target, in: folder)
        try run("diskgate", "copy", image, peer.uri())
        #expect(try isSame(image, target))
    }

    @Test func `reports are for programs too`() throws {
        let folder = try Folder()
        let image = try folder.image("disk.raw", seed: 9)
        let outcome = try run("diskgate", "copy", image, folder.file("copy.raw"), with: ["--json", "--verify"])
        let script = """
            import json
            report = json.loads(sys.argv[1])
            assert report["size"] == 24 << 20 and report["scope"] == "full", report
            assert report["bytesVerified"] == report["size"], report
            assert report["bytesWritten"] + report["bytesSkipped"] == report["size"], report
            """
        _ = try python(script, outcome.text)
    }

    /// Arguments, and the exit status that they lead to.
    private static let refused: [(arguments: String, status: Int32)] = [
        ("pattern:1M x.qcow2", 2), ("pattern:1M x.raw --to-format vhd", 2),
        ("pattern:1M x.vmdk --to-format stream-optimized-vmdk --resume", 1), ("pattern:1M x.vmdk", 2),
        ("pattern:1M - --to-format stream-optimized-vmdk --resume", 1), ("pattern:1M memory:1M", 1),
        ("pattern:1M - --verify", 1), ("pattern:1M x.raw --changed b", 1), ("pattern:1M x.raw --workers 0", 1),
        ("pattern:1M x.raw --no-flush --verify", 1), ("pattern:1M x.raw --no-flush --journal x.j", 1),
        ("pattern:1M x.qcow2 --no-flush --to-format qcow2", 1), ("pattern:1M - --no-flush", 1),
        ("pattern:1M x.raw --compress", 2), ("pattern:1M", 2), ("pattern:1M /var/tmp", 1),
    ]

    @Test(arguments: refused)
    func `what cannot be is refused and leaves nothing`(_ arguments: String, _ status: Int32) throws {
        let folder = try Folder()
        let words = arguments.split(separator: " ").map(String.init)
        let mapped = words.map { $0.hasPrefix("x.") ? folder.file($0) : $0 }
        let outcome = try Tool.diskgate.run(["copy"] + mapped)
        #expect(outcome.status == status, "\(outcome.errors)")
        #expect(try run("ls", folder.path).text.isEmpty)
    }
}

/// Runs diskgate with options behind the arguments; it must succeed.
@discardableResult
func run(_ name: String, _ first: String, _ source: String, _ target: String, with options: [String]) throws -> Outcome
{
    let outcome = try Tool.diskgate.run([first, source, target] + options)
    if outcome.status != 0 { throw Trouble("\(name) \(first): status \(outcome.status)\n\(outcome.errors)") }
    return outcome
}

/// The blocks of 512 bytes that a file takes.
private func blocks(_ path: String) throws -> Int {
    var status = stat()
    if stat(path, &status) < 0 { throw Trouble("\(path) is missing") }
    return Int(status.st_blocks)
}
