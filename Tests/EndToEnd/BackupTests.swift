// Backups of a machine: full, then what has changed; each point is the disk of its moment, whatever happens between.
import Glibc
import Testing

@Suite struct BackupTests {
    @Test func `points are the disk of their moment, and qemu-img reads them without diskgate`() throws {
        let site = try Site()
        var moments = [try site.machine.snapshot("moment-1")]
        try site.requireBackup()
        for round in 1...5 {
            try site.machine.io(changes(round))
            moments.append(try site.machine.snapshot("moment-\(round + 1)"))
            let outcome = try site.backup("--json")
            #expect(outcome.status == 0 && outcome.text.contains("\"level\" : \"incremental\""), "\(outcome)")
            // Something changes behind the snapshot's back, and after it.
            try site.machine.io("write -P 5 \(round)M 64k")
        }
        #expect(try site.machine.bitmaps().count == 1)
        #expect(try site.machine.leftovers() == [])
        for (index, moment) in moments.enumerated() {
            #expect(try site.restores("\(index + 1)", to: moment))
            let image = try #require(
                try Tool("sh").run(["-c", "ls \(site.repository)/vms/*/disks/vda/00000\(index + 1).qcow2"]).lines.first)
            try run("qemu-img", "check", "-q", image)
            try run("qemu-img", "convert", "-O", "raw", image, site.folder.file("converted"))
            #expect(try isSame(site.folder.file("converted"), moment))
        }
        let pruned = try site.backup("--keep-last", "3")
        #expect(pruned.status == 0, "\(pruned)")
        #expect(try site.points.count == 3)
        try run("diskgate", "verify", "--repository", site.repository)
        for sequence in 5...6 { #expect(try site.restores("\(sequence)", to: moments[sequence - 1])) }
    }

    @Test func `two disks have one moment, and a new disk begins with a full point of its own`() throws {
        let site = try Site(disks: ["vda", "vdb"])
        try site.requireBackup("--disk", "vda")
        try site.machine.io(["write -P 9 1M 1M"], disk: "vda")
        try site.machine.io(["write -P 8 2M 1M"], disk: "vdb")
        let outcome = try site.backup("--json")
        #expect(outcome.status == 0, "\(outcome)")
        #expect(outcome.text.contains("\"level\" : \"incremental\"") && outcome.text.contains("\"level\" : \"full\""))
        for disk in ["vda", "vdb"] {
            #expect(try site.restores("latest", to: try site.machine.snapshot("now", disk: disk), disk: disk))
        }
    }

    @Test func `a plan changes nothing`() throws {
        let site = try Site()
        let plan = try site.backup("--dry-run")
        #expect(plan.status == 0 && plan.text.contains("the machine's first point"), "\(plan)")
        #expect(access(site.repository, F_OK) != 0)
        #expect(try site.machine.bitmaps().isEmpty)
        try site.requireBackup()
        let next = try site.backup("--dry-run")
        #expect(next.text.contains("incremental"), "\(next)")
        #expect(try site.points.count == 1)
    }

    @Test func `a lost checkpoint makes a full point, and that is said`() throws {
        let site = try Site()
        try site.requireBackup()
        try run("diskgate", "reset-cbt", site.machine.uri)
        try site.machine.io(changes(3))
        let outcome = try site.backup()
        #expect(outcome.status == 3 && outcome.text.contains("not there any more"), "\(outcome)")
        #expect(try site.restores("latest", to: try site.machine.snapshot("now")))
        // The one after that is incremental again.
        try site.machine.io(changes(4))
        try site.requireBackup()
        #expect(try site.restores("latest", to: try site.machine.snapshot("now")))
    }

    @Test func `changes that the hypervisor has lost are found, and the point is right`() throws {
        let site = try Site()
        try site.requireBackup()
        try site.machine.io("write -P 77 5M 1M")
        try site.requireBackup()
        // The tracker forgets what the guest writes.
        try site.machine.io("write -P 78 9M 1M")
        try site.machine.monitor(
            """
            for node in execute("query-named-block-nodes", {"flat": True}):
                for bitmap in node.get("dirty-bitmaps", []):
                    execute("block-dirty-bitmap-clear", {"node": node["node-name"], "name": bitmap["name"]})
            """)
        let outcome = try site.backup("--verify")
        #expect(outcome.status == 3 && outcome.text.contains("lost changes"), "\(outcome)")
        #expect(try site.restores("latest", to: try site.machine.snapshot("now")))
        // The point before was made by the same tracker, and nobody had looked at these chunks since.
        #expect(try attempt("diskgate", "points", "--repository", site.repository).text.contains("suspect"))
        try site.machine.io("write -P 79 10M 64k")
        try site.requireBackup("--verify")
        #expect(try site.restores("latest", to: try site.machine.snapshot("now")))
    }

    @Test func `a hook is told how it went`() throws {
        let site = try Site()
        let said = site.folder.file("said")
        try site.requireBackup("--hook", "echo $DISKGATE_RESULT >\(said); cat >>\(said)")
        let text = try run("cat", said).text
        #expect(text.hasPrefix("done\n") && text.contains("\"point\""))
        let failing = try site.backup("--disk", "no-such", "--hook", "echo $DISKGATE_RESULT >\(said)")
        #expect(failing.status == 1 && failing.text.contains("none is called no-such"), "\(failing)")
        #expect(try run("cat", said).text == "failed\n")
        let broken = try site.backup("--hook", "exit 7")
        #expect(broken.status == 0 && broken.text.contains("ended with status 7"), "\(broken)")
    }

    @Test func `a second run of the same machine is refused, or waits`() throws {
        let site = try Site()
        try site.requireBackup()
        let lock = try Tool("sh").run(["-c", "ls \(site.repository)/vms/*/locks/machine"]).lines[0]
        let holder = try Tool("sh").start(
            ["-c", "exec flock -o \(lock) sleep 60"], output: STDERR_FILENO, errors: STDERR_FILENO)
        defer {
            kill(holder, SIGTERM)
            var status: Int32 = 0
            waitpid(holder, &status, 0)
        }
        let isHeld = try eventually { try attempt("flock", "-n", lock, "true").status != 0 }
        #expect(isHeld)
        let refused = try site.backup()
        #expect(refused.status == 1 && refused.text.contains("going on"), "\(refused)")
        let releasing = try Tool("sh").start(
            ["-c", "sleep 1; kill \(holder)"], output: STDERR_FILENO, errors: STDERR_FILENO)
        let waiting = try site.backup("--wait", "60")
        #expect(waiting.status == 0, "\(waiting)")
        var status: Int32 = 0
        waitpid(releasing, &status, 0)
    }
}
