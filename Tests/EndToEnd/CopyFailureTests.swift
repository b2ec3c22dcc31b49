// Copies from servers that go away, stall and fail, and to targets that do.
import Glibc
import Testing

@Suite struct CopyFailureTests {
    @Test func `a copy goes on when the server was restarted`() throws {
        let folder = try Folder()
        let image = try folder.image("disk.raw", size: 48 << 20)
        let peer = try Peer.nbdkit("-r", "--filter=delay", "file", image, "rdelay=300ms", in: folder)
        let output = try namelessFile()
        defer { close(output) }
        let pid = try Tool.diskgate.start(
            ["copy", peer.uri(), folder.file("copy.raw"), "--json", "--verify"], output: output, errors: output)
        #expect(eventually { access(folder.file("copy.raw.journal"), F_OK) == 0 })
        for _ in 0..<3 {
            usleep(200_000)
            peer.kill()
            usleep(200_000)
            try peer.start()
        }
        let status = try waitForEnd(of: pid, what: "the copy")
        let said = String(decoding: try content(of: output), as: UTF8.self)
        #expect(status == 0, "\(said)")
        #expect(!said.contains("\"retries\" : 0"), "\(said)")
        #expect(try isSame(image, folder.file("copy.raw")))
    }

    /// A copy whose server is replaced in the middle, by one with another disk or by the same.
    private func interrupted(_ other: (Folder, String) throws -> String, _ more: [String] = []) throws -> (
        outcome: Outcome, isRight: Bool
    ) {
        let folder = try Folder()
        let image = try folder.image("disk.raw", size: 48 << 20)
        let served = folder.file("served.raw")
        try run("cp", "--sparse=always", image, served)
        let socket = folder.file("server")
        let peer = try Peer(
            "qemu-nbd", ["-t", "-r", "-f", "raw", "-e", "8", "-k", socket, served] + more, socket: socket)
        let copy = folder.file("copy.raw")
        let running = try Running([
            "copy", peer.uri(), copy, "--json", "--limit-rate", "8M", "--journal-every", "1M", "--workers", "1",
        ])
        #expect(eventually { ((try? run("cat", "\(copy).journal").lines.count) ?? 0) > 5 })
        peer.kill()
        try run("cp", "--sparse=always", try other(folder, image), served)
        try peer.start()
        let outcome = try running.end()
        return (outcome, try access(copy, F_OK) == 0 && isSame(image, copy))
    }

    @Test func `a server that is lost and says nothing of its disk makes the copy doubtful`() throws {
        let (outcome, isRight) = try interrupted { $1 }
        #expect(outcome.status == 3 && isRight && outcome.errors.contains("only --verify tells"), "\(outcome)")
        #expect(outcome.text.contains("\"reconnects\" : 1") && outcome.text.contains("\"downgrades\" : ["))
    }

    @Test func `a server that is lost and describes its disk has it believed`() throws {
        let (outcome, isRight) = try interrupted({ $1 }, ["-D", "point 5 of vda"])
        #expect(outcome.status == 0 && isRight, "\(outcome)")
    }

    @Test func `a server that comes back with another disk is found out`() throws {
        let (outcome, isRight) = try interrupted(
            { folder, _ in
                try folder.image("other.raw", size: 48 << 20, seed: 5)
            }, ["-D", "point 5 of vda"])
        #expect(outcome.status == 1 && !isRight && outcome.errors.contains("another snapshot"), "\(outcome)")
    }

    @Test func `a server that stays away ends the copy, which can go on`() throws {
        let folder = try Folder()
        let image = try folder.image("disk.raw")
        let peer = try Peer.nbdkit("-r", "--filter=delay", "file", image, "rdelay=300ms", in: folder)
        let output = try namelessFile()
        defer { close(output) }
        let arguments = [
            "copy", peer.uri("", "reconnect=1"), folder.file("copy.raw"), "--journal-every", "1M", "--workers", "1",
        ]
        let pid = try Tool.diskgate.start(arguments, output: output, errors: output)
        #expect(eventually { ((try? run("cat", folder.file("copy.raw.journal")).lines.count) ?? 0) > 4 })
        peer.kill()
        #expect(try waitForEnd(of: pid, what: "the copy") == 1)
        let said = String(decoding: try content(of: output), as: UTF8.self)
        #expect(said.contains("--resume"), "\(said)")
        try peer.start()
        try run("diskgate", "copy", arguments[1], folder.file("copy.raw"), with: ["--resume"])
        #expect(try isSame(image, folder.file("copy.raw")))
    }

    @Test func `reads that fail at times are tried again`() throws {
        let folder = try Folder()
        let image = try folder.image("disk.raw", seed: 2)
        let peer = try Peer.nbdkit(
            "--filter=error", "file", image, "error-pread=EIO", "error-pread-rate=10%", in: folder)
        try run("diskgate", "copy", peer.uri(), folder.file("copy.raw"), with: ["--retries", "20"])
        #expect(try isSame(image, folder.file("copy.raw")))
        let outcome = try attempt("diskgate", "copy", peer.uri(), folder.file("other.raw"), "--retries", "0")
        #expect(outcome.status == 1 && outcome.errors.contains("reading"), "\(outcome.errors)")
        #expect(access(folder.file("other.raw"), F_OK) != 0)
    }

    @Test func `a server that fails at everything for a moment is tried again`() throws {
        let folder = try Folder()
        let trouble = try folder.filled("trouble", size: 1)
        let peer = try Peer.nbdkit(
            "--filter=error", "pattern", "64M", "error-pread=EIO", "error-pread-rate=100%",
            "error-pread-file=\(trouble)", in: folder)
        let copy = try Running(["copy", "--workers", "1", peer.uri(), folder.file("copy.raw")])
        // More requests of a piece than a piece may have tries: all that are in flight meet the same trouble.
        #expect(eventually { peer.log.split(separator: "\n").count { $0.contains("injecting") } >= 16 })
        unlink(trouble)
        let outcome = try copy.end()
        #expect(outcome.status == 0, "\(outcome)")
        try run("nbdcopy", peer.uri(), folder.file("whole.raw"))
        #expect(try isSame(folder.file("whole.raw"), folder.file("copy.raw")))
    }

    @Test func `a signal ends a copy from a server that does not answer`() throws {
        let folder = try Folder()
        let image = try folder.image("disk.raw", seed: 2)
        let peer = try Peer.nbdkit("-r", "--filter=delay", "file", image, "rdelay=60", in: folder)
        let output = try namelessFile()
        defer { close(output) }
        let pid = try Tool.diskgate.start(
            ["copy", peer.uri(), folder.file("copy.raw")], output: output, errors: output)
        #expect(eventually { access(folder.file("copy.raw.journal"), F_OK) == 0 })
        usleep(200_000)
        kill(pid, SIGTERM)
        // Far sooner than the server answers.
        #expect(try waitForEnd(of: pid, what: "the copy") == 1)
    }

    @Test func `a target that fails ends the copy with its error`() throws {
        let folder = try Folder()
        let image = try folder.image("disk.raw", seed: 2)
        let target = try folder.filled("target.raw")
        let peer = try Peer.nbdkit(
            "--filter=error", "file", target, "error-pwrite=ENOSPC", "error-pwrite-rate=100%", in: folder)
        let outcome = try attempt("diskgate", "copy", image, peer.uri())
        #expect(outcome.status == 1 && outcome.errors.contains("ENOSPC"), "\(outcome.errors)")
    }
}
