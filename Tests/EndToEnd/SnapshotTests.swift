// `diskgate snapshot`: a point in time of an export that is being written, for every tool that reads NBD.
import Glibc
import Testing

/// A server with a writable export `disk` that keeps checkpoints.
struct SnapshotBench {
    let folder: Folder
    let image: String
    let gateway: Gateway

    init(_ folder: Folder, options: [String] = [], image: String? = nil) throws {
        self.folder = folder
        self.image = try image ?? folder.image("disk.raw")
        gateway = try Gateway(
            [
                "--writable", "--checkpoints", folder.file("checkpoints"), "--control",
                "unix:\(folder.file("control"))", "--name", "disk",
            ] + options + [self.image], in: folder)
    }

    func command(_ arguments: String...) throws -> Outcome {
        try Tool.diskgate.run(arguments + ["--control", "unix:\(folder.file("control"))"])
    }

    /// Makes a snapshot and returns what the command said to people.
    @discardableResult
    func snapshot(_ checkpoint: String) throws -> String {
        let outcome = try command("snapshot", "disk", "--checkpoint", checkpoint)
        if outcome.status != 0 || outcome.lines != ["disk@\(checkpoint)"] {
            throw Trouble("snapshot: \(outcome.status) \(outcome.text)\(outcome.errors)")
        }
        return outcome.errors
    }

    func write(_ commands: String...) throws {
        let arguments = ["-f", "raw"] + commands.flatMap { ["-c", $0] } + [gateway.uri("disk")]
        let outcome = try Tool("qemu-io").run(arguments)
        if outcome.status != 0 { throw Trouble("qemu-io: \(outcome.text)\(outcome.errors)") }
    }

    func checksum(of export: String) throws -> String {
        let copy = try folder.filled("copy-\(export)")
        try run("nbdcopy", gateway.uri(export), copy)
        return try String(run("sha256sum", copy).text.prefix(64))
    }

    func stop() throws {
        let status = try gateway.stop()
        if status != 0 { throw Trouble("the server ended with \(status): \(gateway.log)") }
    }
}

/// Lines of a dirty bitmap that say changed, as offset and length.
func changedRanges(_ uri: String, since checkpoint: String) throws -> [String] {
    try run("nbdinfo", "--map=qemu:dirty-bitmap:\(checkpoint)", uri).lines.compactMap { line in
        let fields = line.split(separator: " ")
        return fields.count > 2 && fields[2] == "1" ? "\(fields[0])+\(fields[1])" : nil
    }
}

@Suite struct SnapshotTests {
    @Test func `a snapshot keeps what the export held, while it is written`() throws {
        let bench = try SnapshotBench(try Folder())
        try bench.write("write -P 17 1M 3M", "flush")
        let before = try checksum(bench.image)
        #expect(try bench.snapshot("one") == "")
        #expect(
            try bench.command("exports").lines.contains { $0.hasPrefix("\"disk@one\"") && $0.contains("read-only") })
        // A writer all over the disk, as long as the snapshot is read.
        let output = try namelessFile()
        defer { close(output) }
        let fio = try Tool("fio").start(
            [
                "--name=writer", "--ioengine=nbd", "--uri=\(bench.gateway.uri("disk"))", "--rw=randrw",
                "--rwmixwrite=80", "--bsrange=512-200k", "--iodepth=8", "--size=24m", "--time_based", "--runtime=4",
            ], output: output, errors: output)
        for round in 0..<3 { #expect(try bench.checksum(of: "disk@one") == before, "round \(round)") }
        let converted = bench.folder.file("converted")
        try run("qemu-img", "convert", "-f", "raw", "-O", "raw", bench.gateway.uri("disk@one"), converted)
        #expect(try checksum(converted) == before)
        let long = try run("diskgate", "checksum", bench.gateway.uri("disk@one"))
        #expect(long.text.contains(before))
        #expect(try waitForEnd(of: fio, what: "fio") == 0)
        try bench.write("discard 0 24M", "write -z 0 8M", "write -P 3 8M 16M")
        #expect(try bench.checksum(of: "disk@one") == before)
        #expect(try attempt("qemu-io", "-f", "raw", "-c", "write 0 4k", bench.gateway.uri("disk@one")).status != 0)
        try bench.stop()
        #expect(try checksum(bench.image) != before)
    }

    @Test func `a chain of checkpoints is copied increment by increment`() throws {
        let bench = try SnapshotBench(try Folder())
        let copy = bench.folder.file("backup")
        try bench.snapshot("cp0")
        try run("nbdcopy", bench.gateway.uri("disk@cp0"), copy)
        let ours = bench.folder.file("ours")
        try run("diskgate", "copy", bench.gateway.uri("disk@cp0"), ours)
        for index in 1...5 {
            try bench.write(
                "write -P \(index) \(index * 3)M 70k", "write -z \(index)M 128k", "discard \(20 + index % 3)M 64k",
                "write -P \(index + 9) \(index * 4 + 1)k 1")
            try bench.snapshot("cp\(index)")
            let uri = bench.gateway.uri("disk@cp\(index)")
            // Written after the snapshot: in the next increment only.
            try bench.write("write -P 77 23M 4k")
            let changed = try changedRanges(uri, since: "cp\(index - 1)")
            #expect(changed.count >= 3 && changed.first?.hasPrefix("0+") == true)
            for range in changed {
                let parts = range.split(separator: "+")
                let data = try run("diskgate", "cat", uri, "--offset", String(parts[0]), "--length", String(parts[1]))
                try patch(copy, Int(parts[0]) ?? 0, data.output)
            }
            let whole = bench.folder.file("whole")
            try run("nbdcopy", uri, whole)
            #expect(try isSame(copy, whole), "checkpoint \(index)")
            // diskgate's own copier does the same, onto a copy of its own.
            try run("diskgate", "copy", uri, ours, "--changed", "cp\(index - 1)")
            #expect(try isSame(ours, whole), "checkpoint \(index), by diskgate copy")
            #expect(try bench.command("snapshot", "--release", "disk@cp\(index - 1)").status == 0)
        }
        let all = try changedRanges(bench.gateway.uri("disk@cp5"), since: "cp0").joined()
        #expect(all.contains("3145728+") && all.contains("15728640+"))
        let json = try bench.command("checkpoints", "disk", "--json").text
        #expect(json.contains("\"name\" : \"cp0\"") && json.contains("\"export\" : \"disk@cp5\""))
        try bench.stop()
    }

    private func patch(_ path: String, _ offset: Int, _ bytes: [UInt8]) throws {
        let file = open(path, O_WRONLY)
        defer { close(file) }
        guard pwrite(file, bytes, bytes.count, off_t(offset)) == bytes.count else { throw Trouble("patching \(path)") }
    }

    @Test func `a stopped server's checkpoints are trusted, a killed one's are not`() throws {
        let folder = try Folder()
        var bench = try SnapshotBench(folder)
        try bench.snapshot("one")
        try bench.write("write -P 1 5M 64k")
        try bench.stop()
        bench = try SnapshotBench(folder, image: bench.image)
        try bench.write("write -P 1 6M 64k")
        #expect(try bench.snapshot("two").contains("131072 bytes have changed since one"))
        #expect(try changedRanges(bench.gateway.uri("disk@two"), since: "one") == ["5242880+65536", "6291456+65536"])
        try bench.write("write -P 1 7M 64k")
        bench.gateway.signal(SIGKILL)
        _ = try bench.gateway.end()
        unlink(folder.file("socket"))
        unlink(folder.file("control"))
        bench = try SnapshotBench(folder, image: bench.image)
        #expect(bench.gateway.log.contains("was not closed"))
        #expect(try bench.snapshot("three").contains("everything counts as changed since two"))
        #expect(try changedRanges(bench.gateway.uri("disk@three"), since: "two") == ["0+25165824"])
        #expect(try changedRanges(bench.gateway.uri("disk@three"), since: "one") == ["0+25165824"])
        #expect(try bench.snapshot("four").contains("0 bytes have changed since three"))
        try bench.stop()
        try run("dd", "if=/dev/zero", "of=\(bench.image)", "bs=512", "count=1", "conv=notrunc")
        bench = try SnapshotBench(folder, image: bench.image)
        #expect(bench.gateway.log.contains("changed by somebody else"))
        #expect(try bench.snapshot("five").contains("everything counts as changed since four"))
        try bench.stop()
    }

    @Test func `a server whose checkpoints cannot be stored at the end says so`() throws {
        let folder = try Folder()
        var bench = try SnapshotBench(folder)
        try bench.snapshot("one")
        try bench.write("write -P 1 5M 64k")
        try run("cp", "-p", bench.image, bench.image + ".other")
        try run("mv", bench.image + ".other", bench.image)
        #expect(try bench.gateway.stop() == 1)
        #expect(bench.gateway.log.contains("another file has taken its place"))
        bench = try SnapshotBench(folder, image: bench.image)
        #expect(try bench.snapshot("two").contains("everything counts as changed since one"))
        try bench.stop()
    }

    @Test func `a full scratch ends the snapshot, and the writer goes on`() throws {
        let folder = try Folder()
        let scratch = folder.file("scratch")
        try run("mkdir", scratch)
        try run("mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", scratch)
        defer { _ = try? run("umount", "-l", scratch) }
        let bench = try SnapshotBench(folder, options: ["--scratch", scratch])
        try bench.snapshot("one")
        try bench.write("write -P 5 0 1M")
        #expect(try attempt("nbdcopy", bench.gateway.uri("disk@one"), "null:").status == 0)
        try bench.write("write -P 5 0 24M", "flush", "read -P 5 0 24M")
        #expect(try attempt("nbdcopy", bench.gateway.uri("disk@one"), "null:").status != 0)
        #expect(eventually { bench.gateway.log.contains("is broken, its writers go on") })
        #expect(try bench.command("checkpoints", "disk").text.contains("the snapshot is broken"))
        // Its room comes back, and the next snapshot works.
        try bench.snapshot("two")
        #expect(try attempt("nbdcopy", bench.gateway.uri("disk@two"), "null:").status == 0)
        #expect(try changedRanges(bench.gateway.uri("disk@two"), since: "one") == ["0+25165824"])
        try bench.stop()
    }

    @Test func `snapshots are released while they are read, and refused where they cannot be`() throws {
        let bench = try SnapshotBench(try Folder())
        #expect(try bench.command("snapshot", "other").status == 1)
        try bench.snapshot("one")
        #expect(try bench.command("snapshot", "disk", "--checkpoint", "one").status == 1)
        #expect(try bench.command("snapshot", "disk", "--checkpoint", "a/b").status == 1)
        #expect(try bench.command("snapshot", "disk@one").errors.contains("no checkpoints"))
        #expect(try bench.command("snapshot", "disk", "--checkpoint", "two", "--as", "disk").status == 1)
        #expect(try bench.command("snapshot", "disk", "--checkpoint", "two", "--as", "night").lines == ["night"])
        let output = try namelessFile()
        defer { close(output) }
        let script = """
            import nbd, sys
            h = nbd.NBD()
            h.connect_uri(sys.argv[1])
            open(sys.argv[2], "w").close()
            try:
                while True: h.pread(65536, 0)
            except nbd.Error: print("disconnected")
            """
        let pid = try Tool("python3").start(
            ["-c", script, bench.gateway.uri("night"), bench.folder.file("began")], output: output, errors: output)
        #expect(eventually { access(bench.folder.file("began"), F_OK) == 0 })
        #expect(try bench.command("snapshot", "--release", "night").status == 0)
        #expect(try waitForEnd(of: pid, what: "the reader") == 0)
        #expect(try String(decoding: content(of: output), as: UTF8.self).contains("disconnected"))
        #expect(try bench.command("snapshot", "--release", "night").status == 1)
        #expect(try attempt("nbdinfo", bench.gateway.uri("night")).status != 0)
        #expect(try bench.command("snapshot", "disk", "--drop-checkpoint", "one").status == 0)
        #expect(try bench.command("snapshot", "disk", "--drop-checkpoint", "one").status == 1)
        #expect(try bench.command("checkpoints", "disk").lines.contains { $0.hasPrefix("checkpoint two ") })
        // Removing the export ends its snapshots; added again, its checkpoints are there.
        #expect(try bench.command("exports", "remove", "disk").status == 0)
        #expect(try bench.command("exports").lines.isEmpty)
        #expect(try bench.command("exports", "add", bench.image, "--name", "disk", "--writable").status == 0)
        #expect(try bench.snapshot("three").contains("0 bytes have changed since two"))
        #expect(try bench.command("exports", "add", bench.image, "--name", "again", "--writable").status == 1)
        for index in 2...8 { #expect(try bench.command("snapshot", "disk", "--checkpoint", "n\(index)").status == 0) }
        #expect(try bench.command("snapshot", "disk").errors.contains("the most at a time"))
        try bench.stop()
    }
}
