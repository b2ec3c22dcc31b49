// Copying what a dirty bitmap of QEMU says, onto an older copy.
import Glibc
import Testing

/// A qcow2 disk with a bitmap `changes`, an exact older copy of it, and changes since.
private final class ChangedDisk {
    let folder: Folder
    let disk: String
    let copy: String
    let peer: Peer

    init() throws {
        folder = try Folder()
        (disk, copy) = (folder.file("disk.qcow2"), folder.file("copy.raw"))
        let base = try folder.image("base.raw", seed: 3)
        try run("qemu-img", "convert", "-O", "qcow2", base, disk)
        try run("qemu-img", "convert", "-O", "raw", disk, copy)
        try run("qemu-img", "bitmap", "--add", disk, "changes")
        try run(
            "qemu-io", "-c", "write -P 0x11 1M 200k", "-c", "write -P 0x22 3333333 77777", "-c", "write -z 8M 1M",
            "-c", "discard 12M 2M", "-c", "write -P 0x33 25165312 512", disk)
        let socket = folder.file("qemu-nbd")
        peer = try Peer("qemu-nbd", ["-t", "-r", "-f", "qcow2", "-B", "changes", "-k", socket, disk], socket: socket)
    }

    var isCopied: Bool {
        get throws {
            try attempt("qemu-img", "compare", "-U", "-f", "qcow2", "-F", "raw", disk, copy).status == 0
        }
    }
}

@Suite struct CopyChangedTests {
    @Test(arguments: ["changes", "qemu:dirty-bitmap:changes"], [[], ["--verify"]])
    func `an older copy is brought up to date`(_ name: String, _ options: [String]) throws {
        let changed = try ChangedDisk()
        let outcome = try run(
            "diskgate", "copy", changed.peer.uri(), changed.copy, with: ["--changed", name, "--json"] + options)
        #expect(try changed.isCopied)
        #expect(access("\(changed.copy).incomplete", F_OK) != 0)
        #expect(access("\(changed.copy).journal", F_OK) != 0)
        let script = """
            import json
            report = json.loads(sys.argv[1])
            done = report["bytesWritten"] + report["bytesZeroed"]
            assert 3000000 < done < 5 << 20, report
            assert report.get("bytesVerified") == (int(sys.argv[2]) or None), report
            """
        _ = try python(script, outcome.text, options.isEmpty ? "0" : "\(24 << 20)")
    }

    @Test func `a source that has not told all that changed is found by --verify`() throws {
        let changed = try ChangedDisk()
        changed.peer.kill()
        // Nothing counts this: neither what was written before the bitmap was made, nor what it has forgotten since.
        try run("qemu-img", "bitmap", "--disable", changed.disk, "changes")
        try run("qemu-io", "-c", "write -P 0x44 20M 4k", changed.disk)
        try changed.peer.start()
        let plain = try attempt("diskgate", "copy", changed.peer.uri(), changed.copy, "--changed", "changes")
        #expect(plain.status == 0)
        #expect(try !changed.isCopied)
        let outcome = try attempt(
            "diskgate", "copy", changed.peer.uri(), changed.copy, "--changed", "changes", "--verify")
        #expect(outcome.status == 1 && outcome.errors.contains("first at offset \(20 << 20)"), "\(outcome)")
        #expect(outcome.errors.contains("does not tell all that has changed"), "\(outcome)")
        // It is known to be no copy, and nothing less than the whole makes it one.
        #expect(access("\(changed.copy).incomplete", F_OK) == 0)
        let again = try attempt("diskgate", "copy", changed.peer.uri(), changed.copy, "--changed", "changes")
        #expect(again.status == 1, "\(again)")
        try run("diskgate", "copy", changed.peer.uri(), changed.copy, "--force", "--verify")
        #expect(try changed.isCopied)
    }

    @Test func `a bitmap in a local image works, too`() throws {
        let changed = try ChangedDisk()
        changed.peer.kill()
        try run("diskgate", "copy", changed.disk, changed.copy, with: ["--changed", "changes"])
        #expect(try changed.isCopied)
    }

    @Test func `an export is brought up to date`() throws {
        let changed = try ChangedDisk()
        let target = try Peer.nbdkit("file", changed.copy, in: changed.folder)
        try run("diskgate", "copy", changed.peer.uri(), target.uri(), with: ["--changed", "changes", "--verify"])
        #expect(try changed.isCopied)
    }

    @Test func `a target of another size, or none, is refused untouched`() throws {
        let changed = try ChangedDisk()
        let other = try changed.folder.filled("other.raw", size: 1 << 20)
        let before = try checksum(other)
        for path in [other, changed.folder.file("none.raw")] {
            let outcome = try attempt("diskgate", "copy", changed.peer.uri(), path, "--changed", "changes")
            #expect(outcome.status == 1, "\(outcome.errors)")
            #expect(access("\(path).incomplete", F_OK) != 0)
        }
        #expect(try checksum(other) == before)
    }

    @Test func `an interrupted update is marked, refused, and goes on`() throws {
        let changed = try ChangedDisk()
        let outcome = try Tool.diskgate.run(
            ["copy", changed.peer.uri(), changed.copy, "--changed", "changes", "--journal-every", "64K"],
            environment: ["DISKGATE_STEP_KILL=copy.marked"])
        #expect(outcome.status == 128 + SIGKILL)
        #expect(access("\(changed.copy).incomplete", F_OK) == 0)
        let refused = try attempt("diskgate", "copy", changed.peer.uri(), changed.copy, "--changed", "changes")
        #expect(refused.status == 1 && refused.errors.contains("--resume"), "\(refused.errors)")
        // What changed since would not be all that is missing.
        let forced = try attempt(
            "diskgate", "copy", changed.peer.uri(), changed.copy, "--changed", "changes", "--force")
        #expect(forced.status == 1 && forced.errors.contains("whole copy"), "\(forced.errors)")
        try run("diskgate", "copy", changed.peer.uri(), changed.copy, with: ["--changed", "changes", "--resume"])
        #expect(try changed.isCopied)
        #expect(access("\(changed.copy).incomplete", F_OK) != 0)
    }
}
