// What doctor does where not everything can be given back: what it works off all the same, and how it forgets the rest.
import Glibc
import Testing

@Suite struct DoctorTests {
    /// A run that was killed when its disk was copied.
    private func crashed(_ site: Site) throws {
        try site.requireBackup()
        try site.machine.io("write -P 7 3M 1M")
        let outcome = try site.backup(environment: ["DISKGATE_STEP_KILL=run.disk-copied"])
        if outcome.status != 128 + SIGKILL { throw Trouble("the run was not killed: \(outcome)") }
    }

    /// The first run that is listed.
    private func runID(_ outcome: Outcome) throws -> String {
        String(try #require(outcome.lines.first { $0.hasPrefix("run ") }?.split(separator: " ")[1]))
    }

    /// The number of an obligation as it is listed.
    private func number(of kind: String, _ outcome: Outcome) throws -> String {
        let line = try #require(outcome.lines.first { $0.contains(": \(kind)") }, "\(outcome)")
        return String(try #require(line.split(separator: ":").first?.split(separator: " ").last))
    }

    @Test func `where the repository is gone, the hypervisor is relieved all the same`() throws {
        let site = try Site()
        try crashed(site)
        let aside = site.folder.file("aside")
        rename(site.repository, aside)
        let fixed = try site.doctor("--fix")
        // Whether the point is durable cannot be told: the checkpoint waits, and so does the point.
        #expect(fixed.status == 1, "\(fixed)")
        let left = fixed.lines.filter { $0.contains("left as number") }
        #expect(left.count == 2 && left[0].contains("qemu.checkpoint"), "\(fixed)")
        #expect(left[1].contains("repository.partial"), "\(fixed)")
        #expect(try site.machine.leftovers() == [])
        rename(aside, site.repository)
        #expect(try site.doctor("--fix").status == 0)
        #expect(try site.machine.bitmaps().count == 1)
        try site.requireBackup()
        #expect(try site.restores("latest", to: try site.machine.snapshot("now")))
    }

    @Test func `the next run gives back what a run of the same machine has left, by whatever URI`() throws {
        var site = try Site()
        try crashed(site)
        site.uri += "&timeout=20"
        let listed = try site.doctor("--vm", site.uri)
        #expect(listed.status == 1 && listed.text.contains("qemu.job"), "\(listed)")
        let next = try site.backup()
        #expect(next.status == 0 && next.text.contains("was given back"), "\(next)")
        #expect(try site.machine.leftovers() == [] && site.machine.bitmaps().count == 1)
        #expect(try site.restores("latest", to: try site.machine.snapshot("now")))
    }

    @Test func `a directory waits for what may still use it`() throws {
        let site = try Site()
        try crashed(site)
        // Somebody else has taken the export's server: it cannot be told whether that is ours.
        let export = """
            name = next(e["node-name"] for e in execute("query-block-exports"))
            execute("block-export-add", {"type": "nbd", "id": "theirs", "node-name": name, "name": "theirs"})
            """
        try site.machine.monitor(export)
        let fixed = try site.doctor("--fix")
        #expect(fixed.status == 1, "\(fixed)")
        #expect(fixed.text.contains("qemu.directory: it waits for"), "\(fixed)")
        #expect(try site.machine.leftovers().contains { $0.hasPrefix("diskgate-") })
        try site.machine.monitor("execute('block-export-del', {'id': 'theirs', 'mode': 'hard'})")
        let gone = try eventually { try site.machine.monitor("print(len(execute('query-block-exports')))") == ["0"] }
        #expect(gone)
        #expect(try site.doctor("--fix").status == 0)
        #expect(try site.machine.leftovers() == [])
    }

    @Test func `what can never be given back is forgotten by its exact id only`() throws {
        let site = try Site()
        try crashed(site)
        site.machine.kill()
        let fixed = try site.doctor("--fix")
        #expect(fixed.status == 1 && fixed.text.contains("doctor --forget"), "\(fixed)")
        let run = try runID(fixed)
        let number = try number(of: "qemu.checkpoint", fixed)
        for wrong in ["\(run.prefix(8)):\(number)", "\(run):99", "\(run):", "\(number)", run.uppercased()] {
            let refused = try site.doctor("--forget", wrong)
            #expect(refused.status == 1, "\(wrong): \(refused)")
        }
        #expect(try site.doctor("--forget", "\(run):\(number)", "--fix").status == 2)
        #expect(try site.doctor().text.contains("qemu.checkpoint"))
        let forgotten = try site.doctor("--forget", "\(run):\(number)")
        #expect(forgotten.status == 0 && forgotten.text.contains("forgotten: qemu.checkpoint"), "\(forgotten)")
        #expect(forgotten.text.contains("qemu-img bitmap --remove"), "\(forgotten)")
        let empty = try site.doctor()
        #expect(empty.status == 0 && empty.text.contains("nothing is left behind"), "\(empty)")
        #expect(try ledgers(site) == [])
    }

    @Test func `a whole run is forgotten, with a ledger that makes no sense`() throws {
        let site = try Site()
        try crashed(site)
        site.machine.kill()
        let ledger = try #require(try Tool("sh").run(["-c", "ls \(site.state)/obligations/*.run"]).lines.first)
        try EndToEnd.run("sh", "-c", "sed -i '3s/.*/{nonsense}/' \(ledger)")
        let fixed = try site.doctor("--fix")
        #expect(fixed.status == 1 && fixed.text.contains("make no sense"), "\(fixed)")
        let run = try runID(fixed)
        let forgotten = try site.doctor("--forget", run)
        #expect(forgotten.status == 0, "\(forgotten)")
        #expect(try site.doctor().status == 0 && ledgers(site) == [])
    }

    private func ledgers(_ site: Site) throws -> [String] { try EndToEnd.run("ls", "\(site.state)/obligations").lines }
}
