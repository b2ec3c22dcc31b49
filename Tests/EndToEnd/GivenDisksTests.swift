// Backups of a machine that is given by its disks: whatever can be opened, without a hypervisor to ask.
import Glibc
import Testing

/// A folder with a repository and two disks: a raw one, and one behind a server.
private struct Given {
    let folder: Folder
    let raw: String
    let served: String
    let peer: Peer

    init() throws {
        folder = try Folder()
        raw = try folder.image("one disk.raw", size: (3 << 20) + 512)
        served = try folder.image("served.raw", size: 2 << 20, seed: 5)
        peer = try Peer.nbdkit("file", served, in: folder)
    }

    func backup(_ machine: String, _ more: String...) throws -> Outcome {
        try Tool.diskgate.run(
            [
                "backup", "--vm", machine, "--repository", folder.file("points"), "--state-directory",
                folder.file("state"),
                "--source", "sda=\(raw)", "--source", "sdb=\(peer.uri())",
            ] + more)
    }

    func restored(_ point: String, _ disk: String) throws -> String {
        let target = folder.file("restored-\(point)-\(disk).raw")
        try run("diskgate", "restore", "--repository", folder.file("points"), point, target, "--disk", disk)
        return target
    }
}

@Suite struct GivenDisksTests {
    @Test func `disks given by their sources are backed up and restored`() throws {
        let given = try Given()
        let first = try given.backup("disks:web?snapshot=nightly", "--json")
        #expect(first.status == 0, "\(first)")
        for fact in ["crash-consistent", "\"transport\" : \"nbd\"", "\"transport\" : \"file\""] {
            #expect(first.text.contains(fact), "\(fact) is not in \(first.text)")
        }
        try run("dd", "if=/dev/zero", "of=\(given.raw)", "bs=1M", "count=1", "conv=notrunc", "status=none")
        // Nobody could tell what has changed, so that this is no downgrade.
        let second = try given.backup("disks:web?offline=yes", "--verify", "--json")
        #expect(second.status == 0 && second.text.contains("offline"), "\(second)")
        #expect(try isSame(given.restored("2", "sda"), given.raw))
        #expect(try isSame(given.restored("1", "sdb"), given.served))
        #expect(try !isSame(given.restored("1", "sda"), given.raw))
        try run("diskgate", "verify", "--repository", given.folder.file("points"))
    }

    @Test func `another source of a disk is taken where the first is missing, and the point keeps why`() throws {
        let given = try Given()
        let lun = "san:wwn=naa.6000000000000000000000000000dead?snapshot=nightly"
        // The disk sdc has the bytes of the server's, over the second of three ways.
        let ways = ["--source", "sdc=\(lun)", "--or", "sdc=\(given.peer.uri())", "--or", "sdc=/nowhere/disk"]
        let outcome = try Tool.diskgate.run(
            [
                "backup", "--vm", "disks:web?snapshot=s", "--repository", given.folder.file("points"),
                "--state-directory", given.folder.file("state"), "--json",
            ] + ways)
        #expect(outcome.status == 3, "\(outcome)")
        #expect(outcome.text.contains("\"transport\" : \"nbd\"") && outcome.text.contains("\"position\" : 2"))
        #expect(
            outcome.text.contains("disk sdc: not over san: opening the LUN wwn=naa.6000000000000000000000000000dead"))
        let manifests = try run("sh", "-c", "find '\(given.folder.file("points"))' -name '*.json' -exec cat {} +").text
        #expect(manifests.contains("\"transport\" : \"nbd\"") && manifests.contains("disk sdc: not over san: "))
        #expect(try isSame(given.restored("1", "sdc"), given.served))
        // The first that works is no downgrade.
        let first = try given.backup("disks:web?snapshot=s", "--or", "sda=\(lun)")
        #expect(first.status == 0 && !first.text.contains("not over"), "\(first)")
        for wrong in [["--or", "sdx=/x"], ["--or", "sdc"]] {
            let refused = try Tool.diskgate.run(
                ["backup", "--vm", "disks:web?snapshot=s", "--repository", "/nowhere/r", "--source", "sdc=\(lun)"]
                    + wrong)
            #expect(refused.status == 1)
        }
    }

    @Test func `disks that are to be added come in one request, also where there are other ways to them`() throws {
        let folder = try Folder()
        let machine = try Machine(in: folder, options: ["-device", "virtio-scsi-pci,id=scsi"])
        var words = ["backup", "--vm", "disks:web?snapshot=s", "--repository", folder.file("points")]
        for (index, id) in ["a", "b", "c"].enumerated() {
            let raw = try folder.image("\(id).raw", size: 1 << 20, seed: UInt64(index) + 20)
            words += [
                "--source", "\(id)=hotadd:image=\(raw)?controller=qmp+unix:\(folder.file("qmp"))&unprotected=yes",
            ]
            if id != "c" { words += ["--or", "\(id)=\(raw)"] }
        }
        // The disks never come to this machine: it ends when they were added.
        let state = "DISKGATE_STATE_DIRECTORY=\(folder.file("state"))"
        let outcome = try Tool.diskgate.run(words, environment: [state, "DISKGATE_STEP_KILL=hotadd.added"])
        #expect(outcome.status == 128 + SIGKILL, "\(outcome)")
        #expect(try machine.leftovers().count { $0.hasPrefix("dg-") } >= 3)
        let listed = try Tool.diskgate.run(["doctor"], environment: [state])
        let runs = listed.lines.filter { $0.hasPrefix("run ") }
        let added = listed.lines.filter { $0.contains("hotadd.disk") }
        #expect(listed.status == 1 && runs.count(where: { $0.contains("qmp+unix") }) == 1, "\(listed)")
        #expect(added.count == 3, "\(listed)")
        let fixed = try Tool.diskgate.run(["doctor", "--fix"], environment: [state])
        #expect(fixed.status == 0, "\(fixed)")
        #expect(try machine.leftovers() == [])
    }

    @Test func `disks that cannot be added together take their other ways`() throws {
        let given = try Given()
        var words: [String] = []
        for id in ["sdc", "sdd"] {
            let image = "hotadd:image=/nowhere/\(id)?controller=qmp+unix:\(given.folder.file("none"))&unprotected=yes"
            words += ["--source", "\(id)=\(image)", "--or", "\(id)=\(given.served)"]
        }
        let outcome = try Tool.diskgate.run(
            [
                "backup", "--vm", "disks:web?snapshot=s", "--repository", given.folder.file("points"),
                "--state-directory", given.folder.file("state"), "--source", "sda=\(given.raw)",
            ] + words, environment: ["DISKGATE_STATE_DIRECTORY=\(given.folder.file("state"))"])
        #expect(outcome.status == 3, "\(outcome)")
        for id in ["sdc", "sdd"] {
            #expect(outcome.text.contains("disk \(id): not over hotadd"), "\(outcome)")
            #expect(try isSame(given.restored("1", id), given.served))
        }
        #expect(try isSame(given.restored("1", "sda"), given.raw))
    }

    @Test func `another disk in the place of one is not passed over in silence`() throws {
        let given = try Given()
        #expect(try given.backup("disks:web?snapshot=one").status == 0)
        try run("truncate", "-s", "4M", given.raw)
        let outcome = try given.backup("disks:web?snapshot=two")
        #expect(outcome.status == 3 && outcome.text.contains("it had 3146240 bytes"), "\(outcome)")
    }

    @Test func `disks that change while they are read are said to be doubtful`() throws {
        let given = try Given()
        let outcome = try given.backup("disks:web?inconsistent=yes")
        #expect(outcome.status == 3 && outcome.text.contains("no snapshot is stated"), "\(outcome)")
        let points = try run("diskgate", "points", "--repository", given.folder.file("points"))
        #expect(points.text.contains("inconsistent"), "\(points.text)")
    }

    @Test func `a plan makes nothing, and only the disks that are given are opened`() throws {
        let given = try Given()
        let plan = try given.backup("disks:web?snapshot=s", "--dry-run")
        #expect(plan.status == 0 && plan.text.contains("sda") && plan.text.contains("sdb"), "\(plan)")
        #expect(try given.backup("disks:web?snapshot=s", "--exclude", "sdb").status == 2)
        #expect(access(given.folder.file("points"), F_OK) != 0)
    }

    @Test(arguments: [
        ("disks:web", "say what the disks are"), ("disks:?snapshot=s", "name of 1 to 200 bytes"),
        ("disks:web?snapshot=s&offline=yes", "say what the disks are"), ("disks:web?offline=maybe", "offline=maybe"),
        ("disks:web?offline=yes&quiesced=yes", "name it"), ("disks:web?snapshot=s&disk=sda=/x", "two disks sda"),
        ("disks:web?snapshot=s&colour=red", "colour means nothing"), ("qmp+unix:/x", "knows its disks"),
    ])
    func `what is not said is asked for`(_ machine: String, _ what: String) throws {
        let given = try Given()
        let outcome = try given.backup(machine)
        #expect(outcome.status == 1 && (outcome.errors + outcome.text).contains(what), "\(outcome)")
        #expect(access(given.folder.file("points"), F_OK) != 0)
    }

    @Test func `a disk that is not there, or no tracking, is an error that says so`() throws {
        let given = try Given()
        let missing = try given.backup("disks:web?snapshot=s", "--source", "sdc=/nowhere/disk")
        #expect(missing.status == 1 && missing.text.contains("/nowhere/disk"), "\(missing)")
        let none = try attempt("diskgate", "backup", "--vm", "disks:web?snapshot=s", "--repository", "/nowhere/r")
        #expect(none.status == 1 && (none.text + none.errors).contains("--source ID=SOURCE"), "\(none)")
        let protected = try attempt("diskgate", "protect", "disks:web?snapshot=s&disk=sda=\(given.raw)")
        #expect(protected.status == 1 && protected.errors.contains("nobody tracks changes"), "\(protected)")
        let frozen = try given.backup("disks:web?snapshot=s", "--quiesce", "required")
        #expect(frozen.status == 1 && frozen.text.contains("cannot be frozen"), "\(frozen)")
    }
}
