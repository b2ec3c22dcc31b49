// What can happen to the machine while it is backed up: each run ends cleanly, nothing is lost or left behind.
import Glibc
import Testing

@Suite struct BackupFaultTests {
    @Test func `QEMU dies in the middle: the run ends, and the next one after its return is right`() throws {
        let site = try Site()
        try site.requireBackup()
        try site.machine.io("write -P 7 3M 24M")
        let outcome = try site.duringBackup(endsIt: true) { site.machine.kill() }
        #expect(outcome.status == 1 && outcome.text.contains("without a restore point"), "\(outcome)")
        #expect(outcome.text.contains("keeping the snapshot"), "\(outcome)")
        #expect(try site.halves == [] && site.points.count == 1)
        try run("diskgate", "verify", "--repository", site.repository)
        // Only what may be in the image waits for QEMU.
        let left = try site.doctor("--fix")
        #expect(left.status == 1 && left.text.contains("start it"), "\(left)")
        #expect(left.lines.filter { $0.contains("left as number") }.count == 1, "\(left)")
        try site.machine.start()
        let fixed = try site.doctor("--fix")
        #expect(fixed.status == 0, "\(fixed)")
        #expect(try site.machine.leftovers() == [])
        // A crash makes bitmaps inconsistent: all is read, and that is said.
        let next = try site.backup()
        #expect(next.status == 3 && next.text.contains("is not consistent"), "\(next)")
        #expect(try site.restores("latest", to: try site.machine.snapshot("now")))
        #expect(try site.machine.bitmaps().count == 1)
        try site.machine.io("write -P 8 20M 64k")
        try site.requireBackup()
        #expect(try site.restores("latest", to: try site.machine.snapshot("now")))
    }

    @Test func `QEMU that stands still for a moment is waited for, and for longer the run ends`() throws {
        var site = try Site()
        site.uri += "&timeout=5"
        try site.requireBackup()
        try site.machine.io("write -P 7 3M 24M")
        let moment = try site.machine.snapshot("moment")
        let waited = try site.duringBackup {
            site.machine.signal(SIGSTOP)
            usleep(500_000)
            site.machine.signal(SIGCONT)
            try site.machine.limit(bytesPerSecond: 0)
        }
        #expect(waited.status == 0, "\(waited)")
        #expect(try site.restores("latest", to: moment))
        try site.machine.io("write -P 9 1M 20M")
        let ended = try site.duringBackup { site.machine.signal(SIGSTOP) }
        #expect(ended.status == 1 && ended.text.contains("doctor --fix"), "\(ended)")
        #expect(try site.halves == [] && site.points.count == 2)
        // Silent, not gone: what it has is not given up.
        let silent = try site.doctor("--fix")
        #expect(silent.status == 1 && silent.text.contains("qemu.job"), "\(silent)")
        site.machine.signal(SIGCONT)
        let fixed = try site.doctor("--fix")
        #expect(fixed.status == 0, "\(fixed)")
        #expect(try site.machine.leftovers() == [])
        try site.machine.limit(bytesPerSecond: 0)
        // The guest writes, and not one change was missed.
        try site.machine.io("write -P 10 2M 1M")
        try site.requireBackup()
        #expect(try site.restores("latest", to: try site.machine.snapshot("now")))
        #expect(try site.machine.bitmaps().count == 1)
    }

    @Test(.enabled(if: Mount.isPossible))
    func `scratch space that runs low ends the run before the guest suffers`() throws {
        let site = try Site()
        try site.requireBackup()
        try site.machine.io("write -P 7 3M 24M")
        let scratch = try Mount(site.folder, "scratch", megabytes: 24)
        let outcome = try site.duringBackup("--scratch", scratch.path, "--scratch-reserve", "21M", endsIt: true) {
            // What is overwritten is kept aside, until there is no more room for it than is to stay.
            for megabyte in 3..<9 { try site.machine.io("write -P 9 \(megabyte)M 1M") }
        }
        #expect(outcome.status == 1 && outcome.text.contains("before the guest suffers"), "\(outcome)")
        try site.machine.limit(bytesPerSecond: 0)
        for megabyte in 9..<31 { try site.machine.io("write -P 10 \(megabyte)M 1M") }
        #expect(try site.machine.leftovers() == [])
        #expect(try run("ls", scratch.path).text == "")
        #expect(try site.halves == [] && site.points.count == 1)
        let next = try site.backup()
        #expect(next.status == 0 && next.text.contains("incremental"), "\(next)")
        #expect(try site.restores("latest", to: try site.machine.snapshot("now")))
    }

    @Test func `beside a run, doctor and another run touch nothing of it`() throws {
        let site = try Site()
        try site.requireBackup()
        try site.machine.io("write -P 7 3M 24M")
        let moment = try site.machine.snapshot("moment")
        var waiting: Running?
        let outcome = try site.duringBackup {
            let before = try site.machine.leftovers()
            let listed = try site.doctor("--fix", "--json")
            #expect(listed.status == 0 && listed.text.contains("\"isGoingOn\" : true"), "\(listed)")
            let fixed = try site.doctor("--fix", "--repository", site.repository)
            #expect(fixed.text.contains("in use: qemu.job") && !fixed.text.contains("given back"), "\(fixed)")
            let id = try #require(fixed.lines.first { $0.hasPrefix("run ") }).split(separator: " ")[1]
            let forgotten = try site.doctor("--forget", "\(id):1")
            #expect(forgotten.status == 1 && forgotten.errors.contains("is going on"), "\(forgotten)")
            let second = try site.backup()
            #expect(second.status == 1 && second.text.contains("another run of it is going on"), "\(second)")
            waiting = try site.start("--wait", "100")
            #expect(try before.count > 1 && site.machine.leftovers() == before)
            try site.machine.limit(bytesPerSecond: 0)
        }
        #expect(outcome.status == 0 && outcome.text.contains("incremental"), "\(outcome)")
        let third = try #require(try waiting?.end())
        #expect(third.status == 0 && third.text.contains("incremental"), "\(third)")
        #expect(try site.restores("2", to: moment) && site.restores("3", to: moment))
        #expect(try site.machine.leftovers() == [] && site.doctor().status == 0)
    }
}
