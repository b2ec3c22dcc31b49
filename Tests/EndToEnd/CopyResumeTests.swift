// Copies that are interrupted: nothing is taken for complete that is not, and what was done is not done again.
import Glibc
import Testing

/// A copy of a pattern that is slow enough to be interrupted.
private struct SlowCopy {
    let folder: Folder
    let source = "pattern:64M?seed=8&allocated=70%"
    var path: String { folder.file("copy.raw") }

    init() throws { folder = try Folder() }

    func arguments(_ more: String...) -> [String] {
        ["copy", source, path, "--limit-rate", "24M", "--journal-every", "2M"] + more
    }

    /// Starts a copy and interrupts it when its journal has some lines.
    func interrupt(with signal: Int32, lines: Int) throws -> (status: Int32, errors: String) {
        let errors = try namelessFile()
        defer { close(errors) }
        let pid = try Tool.diskgate.start(arguments(), output: errors, errors: errors)
        let isNoted = eventually {
            ((try? run("cat", "\(path).journal").lines.count) ?? 0) >= 4 + lines
        }
        kill(pid, signal)
        let status = try waitForEnd(of: pid, what: "the copy")
        if !isNoted { throw Trouble("the journal does not grow") }
        return (status, String(decoding: try content(of: errors), as: UTF8.self))
    }

    func isComplete() throws -> Bool {
        let theirs = try run("diskgate", "checksum", source).text.prefix(64)
        return try checksum(path) == theirs && access("\(path).partial", F_OK) != 0
    }
}

@Suite struct CopyResumeTests {
    @Test(arguments: [SIGINT, SIGTERM])
    func `a signal stops a copy cleanly, and it goes on`(signal: Int32) throws {
        let copy = try SlowCopy()
        let ended = try copy.interrupt(with: signal, lines: 1)
        #expect(ended.status == 1)
        #expect(ended.errors.contains("--resume"), "\(ended.errors)")
        #expect(access(copy.path, F_OK) != 0)
        let refused = try attempt("diskgate", "copy", copy.source, copy.path)
        #expect(refused.status == 1 && refused.errors.contains("--resume"), "\(refused.errors)")
        let outcome = try run("diskgate", "copy", copy.source, copy.path, with: ["--resume", "--json"])
        #expect(try copy.isComplete())
        _ = try python("import json; assert json.loads(sys.argv[1])['bytesResumed'] >= 2 << 20", outcome.text)
    }

    @Test func `a copy that is not flushed leaves nothing when it is stopped`() throws {
        let copy = try SlowCopy()
        let errors = try namelessFile()
        defer { close(errors) }
        let pid = try Tool.diskgate.start(copy.arguments("--no-flush"), output: errors, errors: errors)
        #expect(eventually { access("\(copy.path).partial", F_OK) == 0 })
        kill(pid, SIGTERM)
        #expect(try waitForEnd(of: pid, what: "the copy") == 1)
        #expect(try run("ls", copy.folder.path).text.isEmpty)
    }

    @Test func `what an earlier copy has noted is not taken for that of one that keeps no journal`() throws {
        let copy = try SlowCopy()
        _ = try copy.interrupt(with: SIGTERM, lines: 1)
        let outcome = try Tool.diskgate.run(
            copy.arguments("--no-flush", "--force"), environment: ["DISKGATE_STEP_KILL=copy.complete"])
        #expect(outcome.status == 128 + SIGKILL, "\(outcome.errors)")
        let resumed = try attempt("diskgate", "copy", copy.source, copy.path, "--resume")
        #expect(resumed.status == 1 && !resumed.errors.isEmpty, "\(resumed)")
        #expect(access(copy.path, F_OK) != 0)
    }

    @Test func `killed again and again, it ends with the same bytes`() throws {
        let copy = try SlowCopy()
        _ = try copy.interrupt(with: SIGKILL, lines: 1)
        for _ in 1...3 {
            let outcome = try Tool.diskgate.run(
                copy.arguments("--resume"), environment: ["DISKGATE_STEP_KILL=copy.journal-noted"])
            #expect(outcome.status == 128 + SIGKILL, "\(outcome.errors)")
            #expect(access(copy.path, F_OK) != 0)
        }
        try run("diskgate", "copy", copy.source, copy.path, with: ["--resume", "--verify"])
        #expect(try copy.isComplete())
    }

    @Test(arguments: ["copy.journal-begun", "copy.complete", "copy.renamed", "copy.journal-removed"])
    func `killed at a step, it is complete or known not to be`(step: String) throws {
        let copy = try SlowCopy()
        let outcome = try Tool.diskgate.run(
            ["copy", copy.source, copy.path], environment: ["DISKGATE_STEP_KILL=\(step)"])
        #expect(outcome.status == 128 + SIGKILL)
        if access(copy.path, F_OK) != 0 {
            try run("diskgate", "copy", copy.source, copy.path, with: ["--resume"])
        }
        #expect(try copy.isComplete())
        // Whatever was left does not keep the next copy from its work.
        try run("diskgate", "copy", copy.source, copy.path, with: ["--force"])
        #expect(try copy.isComplete())
        #expect(try run("ls", copy.folder.path).lines == ["copy.raw"])
    }

    @Test func `another source is not copied on, nor another target`() throws {
        let copy = try SlowCopy()
        _ = try copy.interrupt(with: SIGKILL, lines: 1)
        let other = try attempt("diskgate", "copy", "pattern:64M?seed=9&allocated=70%", copy.path, "--resume")
        #expect(other.status == 1 && other.errors.contains("another copy"), "\(other.errors)")
        let partial = "\(copy.path).partial"
        try run("sh", "-c", "cp --sparse=always '\(partial)' '\(partial).new' && mv '\(partial).new' '\(partial)'")
        let replaced = try attempt("diskgate", "copy", copy.source, copy.path, "--resume")
        #expect(replaced.status == 1 && replaced.errors.contains("its target was"), "\(replaced.errors)")
        try run("diskgate", "copy", copy.source, copy.path, with: ["--force"])
        #expect(try copy.isComplete())
    }

    @Test func `a file that was written since is another source`() throws {
        let folder = try Folder()
        let image = try folder.image("disk.raw", seed: 3)
        let step = ["DISKGATE_STEP_KILL=copy.complete"]
        _ = try Tool.diskgate.run(["copy", image, folder.file("copy.raw")], environment: step)
        try run("sh", "-c", "printf x | dd of='\(image)' bs=1 seek=5000000 conv=notrunc status=none")
        let outcome = try attempt("diskgate", "copy", image, folder.file("copy.raw"), "--resume")
        #expect(outcome.status == 1 && outcome.errors.contains("its source was"), "\(outcome.errors)")
    }

    @Test func `another snapshot under the same name shows in samples`() throws {
        let folder = try Folder()
        let (one, other) = (try folder.image("one.raw", seed: 3), try folder.filled("other.raw"))
        let first = try Peer.nbdkit("file", one, in: folder)
        let arguments = ["copy", first.uri(), folder.file("copy.raw"), "--limit-rate", "20M", "--journal-every", "1M"]
        _ = try Tool.diskgate.run(arguments, environment: ["DISKGATE_STEP_KILL=copy.journal-noted:2"])
        first.kill()
        let second = try Peer.nbdkit("file", other, in: folder)
        let outcome = try attempt("diskgate", "copy", second.uri(), folder.file("copy.raw"), "--resume")
        #expect(outcome.status == 1 && outcome.errors.contains("another snapshot"), "\(outcome.errors)")
    }

    @Test func `a copy that is running keeps others away`() throws {
        let copy = try SlowCopy()
        let errors = try namelessFile()
        defer { close(errors) }
        let pid = try Tool.diskgate.start(copy.arguments(), output: errors, errors: errors)
        #expect(eventually { access("\(copy.path).journal", F_OK) == 0 })
        for option in ["--force", "--resume"] {
            let outcome = try attempt("diskgate", "copy", copy.source, copy.path, option)
            #expect(outcome.status == 1 && outcome.errors.contains("another copy is writing"), "\(outcome.errors)")
        }
        kill(pid, SIGKILL)
        _ = try waitForEnd(of: pid, what: "the copy")
    }

    @Test func `a copy to a server goes on by its journal`() throws {
        let folder = try Folder()
        let image = try folder.image("disk.raw", seed: 4)
        let target = try folder.filled("target.raw")
        let peer = try Peer.nbdkit("file", target, in: folder)
        let journal = ["--journal", folder.file("journal")]
        let outcome = try Tool.diskgate.run(
            ["copy", image, peer.uri(), "--limit-rate", "20M", "--journal-every", "1M"] + journal,
            environment: ["DISKGATE_STEP_KILL=copy.journal-noted:2"])
        #expect(outcome.status == 128 + SIGKILL)
        #expect(try attempt("diskgate", "copy", image, peer.uri(), "--journal", folder.file("journal")).status == 1)
        try run("diskgate", "copy", image, peer.uri(), with: ["--resume", "--verify"] + journal)
        #expect(try isSame(image, target))
        #expect(access(folder.file("journal"), F_OK) != 0)
    }
}
