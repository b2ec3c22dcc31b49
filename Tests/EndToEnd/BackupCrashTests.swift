// A backup that is killed at every step it has: what is left is given back, points before stand, the next run is right.
import Glibc
import Testing

@Suite struct BackupCrashTests {
    /// The environment that all runs of a test share.
    private func arguments(_ machine: Machine, _ folder: Folder) -> [String] {
        [
            "backup", "--vm", machine.uri, "--repository", folder.file("repository"), "--state-directory",
            folder.file("state"), "--quiesce", "never", "--scratch-reserve", "1M", "--keep-last", "3",
        ]
    }

    private func restored(_ folder: Folder, _ point: String) throws -> String {
        let path = folder.file("restored")
        unlink(path)
        try run("diskgate", "restore", "--repository", folder.file("repository"), point, path)
        return path
    }

    @Test func `killed at any step, a run leaves nothing that is not given back`() throws {
        let folder = try Folder()
        let machine = try Machine(in: folder, megabytes: 8)
        let arguments = arguments(machine, folder)
        let log = folder.file("steps")
        // Points enough that each run removes one, too.
        for round in 0..<4 {
            try machine.io("write -P \(round + 1) \(round)M 100k")
            let outcome = try Tool.diskgate.run(arguments, environment: ["DISKGATE_STEP_LOG=\(log)"])
            if outcome.status != 0 { throw Trouble("backup: \(outcome)") }
            if round < 3 { unlink(log) }
        }
        var seen: [String: Int] = [:]
        var moments: [String] = []
        for step in try run("cat", log).text.split(separator: "\n").map(String.init) {
            seen[step, default: 0] += 1
            moments.append("\(step):\(seen[step] ?? 1)")
        }
        #expect(moments.count > 20, "\(moments)")
        for (index, moment) in moments.enumerated() {
            try killed(at: moment, index, machine, folder, arguments)
        }
    }

    private func killed(
        at moment: String, _ index: Int, _ machine: Machine, _ folder: Folder, _ arguments: [String]
    ) throws {
        try machine.io("write -P \(index + 50) \(index % 7)M 200k", "discard \((index + 3) % 7)M 64k")
        let crashed = try Tool.diskgate.run(arguments, environment: ["DISKGATE_STEP_KILL=\(moment)"])
        #expect(crashed.status == 128 + SIGKILL, "\(moment): \(crashed)")
        let state = folder.file("state")
        let fixed = try Tool.diskgate.run(["doctor", "--fix", "--state-directory", state])
        #expect(fixed.status == 0, "\(moment): \(fixed)")
        #expect(try machine.leftovers() == [], "\(moment)")
        // One checkpoint, that of the newest point, which goes on recording.
        let bitmaps = try machine.bitmaps()
        #expect(bitmaps.count == 1 && bitmaps[0].hasSuffix("recording"), "\(moment): \(bitmaps)")
        let verified = try attempt("diskgate", "verify", "--repository", folder.file("repository"))
        #expect(verified.status == 0, "\(moment): \(verified)")
        // Changes from before the crash and after it are in the next point, which is incremental.
        try machine.io("write -P \(index + 51) \((index + 1) % 7)M 40k")
        let now = try machine.snapshot("now")
        let next = try Tool.diskgate.run(arguments)
        #expect(next.status == 0 && next.text.contains("incremental"), "\(moment): \(next)")
        #expect(try isSame(try restored(folder, "latest"), now), "\(moment)")
        let halves = try Tool("sh").run([
            "-c", "find \(folder.file("repository")) -name '*.partial' -o -name '*.doomed'",
        ])
        #expect(halves.text == "", "\(moment)")
    }
}
