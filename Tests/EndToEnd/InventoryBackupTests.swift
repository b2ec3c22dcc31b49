// Backups of a machine whose disks an inventory has: sources in order, rules that exclude some, the reasons kept.
import Glibc
import Testing

/// An inventory of a machine with two disks: one behind a server, and one in a file.
private struct Inventoried {
    let folder: Folder
    let (served, raw): (String, String)
    let peer: Peer
    let port: String
    var site: InventoryFile
    var uri: String { "nbd://127.0.0.1:\(port)/" }
    private let lun = "san:wwn=naa.6000000000000000000000000000dead?snapshot=s"

    init() throws {
        folder = try Folder()
        served = try folder.image("served", size: 2 << 20, seed: 5)
        raw = try folder.image("raw", size: 1 << 20)
        port = try freePorts(1)[0]
        peer = try Peer.nbdkit(port: port, "-r", "file", served, in: folder)
        site = InventoryFile(in: folder)
        site.disks = """
            {"key": 2000, "capacity": 2097152, "file": "[fast] web/a.vmdk", "sources": ["\(raw)x", "\(uri)", "\(lun)"]},
            {"key": 2001, "capacity": 1048576, "file": "[fast] web/b.vmdk", "sources": ["\(raw)"]}
            """
        try site.store()
    }

    func backup(_ machine: String, _ more: String..., environment: [String] = []) throws -> Outcome {
        let words = ["backup", "--vm", machine, "--repository", folder.file("points")]
        return try Tool.diskgate.run(words + more, environment: environment.isEmpty ? site.environment : environment)
    }

    func restored(_ disk: String) throws -> String {
        let target = folder.file("restored-\(disk)")
        unlink(target)
        try run("diskgate", "restore", "--repository", folder.file("points"), "latest", target, "--disk", disk)
        return target
    }

    var hasPoints: Bool { access(folder.file("points"), F_OK) == 0 }
}

@Suite struct InventoryBackupTests {
    private let reason = "disk 2000: not over san: fast is a vSAN datastore"

    @Test func `each disk takes the first transport that the rules allow, and the point keeps why`() throws {
        let machine = try Inventoried()
        let plan = try machine.backup("disks:web?snapshot=s", "--dry-run")
        #expect(plan.status == 0 && plan.text.contains("over nbd") && plan.text.contains("over file"), "\(plan)")
        #expect(plan.text.contains(reason) && !machine.hasPoints)
        let outcome = try machine.backup("disks:web?snapshot=s", "--json")
        #expect(outcome.status == 3 && outcome.text.contains(reason), "\(outcome)")
        for fact in [
            "\"chosen\" : \"nbd\"", "\"chosen\" : \"file\"", "\"rule\" : \"san.datastore-type\"",
            "\"rule\" : \"nbd.host\"", "a snapshot covers the disk",
        ] { #expect(outcome.text.contains(fact), "\(fact) is not in \(outcome)") }
        // It was never looked for.
        #expect(!outcome.text.contains("no such LUN"))
        let manifests = try run("sh", "-c", "find '\(machine.folder.file("points"))' -name '*.json' -exec cat {} +")
            .text
        #expect(manifests.contains(reason) && manifests.contains("\"transport\" : \"nbd\""))
        #expect(try isSame(machine.restored("2000"), machine.served))
        #expect(try isSame(machine.restored("2001"), machine.raw))
    }

    @Test func `an order leaves transports out, and one that is not wanted is no downgrade`() throws {
        let machine = try Inventoried()
        let state = ["DISKGATE_STATE_DIRECTORY=\(machine.folder.file("state"))"]
        let inventory = "inventory=\(machine.site.path)"
        let done = try machine.backup(
            "disks:vm-42?offline=yes&\(inventory)", "--transports", "nbd:file", environment: state)
        #expect(done.status == 0 && !done.text.contains("not over"), "\(done)")
        #expect(done.text.contains("the inventory says that web (vm-42) runs, and offline=yes that it is off"))
        let option = try machine.backup(
            "disks:web?snapshot=s", "--inventory", machine.site.path, "--disk", "2001", environment: state)
        #expect(option.status == 0 && option.text.contains("left out:    2000"), "\(option)")
    }

    @Test func `without a usable source of each disk there is no point, and all reasons are told`() throws {
        var machine = try Inventoried()
        let none = try machine.backup("disks:web?snapshot=s", "--transports", "san:hotadd")
        #expect(none.status == 1, "\(none)")
        for part in [
            "disk 2000 of web (vm-42): none can be used: san: fast is a vSAN datastore",
            "nbd: it is not among the transports asked for (san:hotadd)",
            "disk 2001 of web (vm-42): none can be used: file: it is not among",
        ] { #expect(none.text.contains(part), "\(part) is not in \(none)") }
        // A rule for this disk only: no snapshot covers it.
        machine.site.disks += #", {"key": "sdc", "mode": "independent_persistent", "sources": ["\#(machine.raw)"]}"#
        machine.site.disks += #", {"key": "sdd"}"#
        try machine.site.store()
        let outcome = try machine.backup("disks:web?snapshot=s")
        #expect(outcome.status == 1 && outcome.text.contains("since its mode is independent_persistent"), "\(outcome)")
        #expect(outcome.text.contains("disk sdd of web (vm-42): the inventory has no source of it"))
        // Those that take no part need none.
        let others = try machine.backup("disks:web?snapshot=s", "--exclude", "sd*")
        #expect(others.status == 3 && others.text.contains(reason), "\(others)")
        let added = try machine.backup(
            "disks:web?inconsistent=yes", "--exclude", "2*", "--or", "sdd=\(machine.raw)", "--json")
        #expect(added.status == 3 && added.text.contains("inconsistent=yes accepts that"), "\(added)")
        #expect(try isSame(machine.restored("sdd"), machine.raw))
        #expect(try isSame(machine.restored("sdc"), machine.raw))
    }

    @Test func `disks that do not take part take no session`() throws {
        let machine = try Inventoried()
        var site = machine.site
        site.disks = """
            {"key": 2000, "sources": ["\(machine.uri)"]}, {"key": 2001, "sources": ["\(machine.uri)"]}
            """
        try site.store()
        let both = try machine.backup("disks:web?snapshot=s")
        #expect(both.status == 1 && both.text.contains("all by this process itself"), "\(both)")
        let one = try machine.backup("disks:web?snapshot=s", "--disk", "2001")
        #expect(one.status == 0, "\(one)")
        #expect(try isSame(machine.restored("2001"), machine.served))
    }

    @Test func `sessions that others have send a disk another way`() throws {
        let machine = try Inventoried()
        let gateway = try Gateway([machine.uri], in: machine.folder, environment: machine.site.environment)
        let full = try machine.backup("disks:web?snapshot=s", "--or", "2000=\(machine.served)")
        #expect(full.status == 3 && full.text.contains("disk 2000: not over nbd: "), "\(full)")
        #expect(full.text.contains("1 of 1 sessions of the host esx1 are taken"), "\(full)")
        #expect(full.text.contains("not over file: "), "\(full)")
        #expect(try gateway.stop() == 0)
        // The machine's host is its sources' host, whatever they name.
        var local = machine.site
        local.disks = #"{"key": 1, "sources": ["nbd+unix:///?socket=\#(machine.folder.file("socket"))"]}"#
        local.policy = #""sessionWaitSeconds": 0"#
        try local.store()
        let first = try Gateway([machine.raw], in: machine.folder)
        let null = try namelessFile()
        defer { close(null) }
        let holder = try Tool.diskgate.start(
            ["serve", machine.uri, "--listen", "unix:\(machine.folder.file("other"))"], output: null, errors: null,
            environment: local.environment)
        defer {
            kill(holder, SIGKILL)
            _ = try? waitForEnd(of: holder, what: "the holder")
        }
        #expect(eventually { access(machine.folder.file("other"), F_OK) == 0 })
        let denied = try machine.backup("disks:web?snapshot=s")
        #expect(denied.status == 1 && denied.text.contains("process \(holder) for \(machine.uri)"), "\(denied)")
        #expect(try first.stop() == 0)
    }

    @Test(arguments: [
        ("disks:db?snapshot=s", [], "the inventory has none of this id or name"),
        ("disks:web?snapshot=s", ["--or", "9=/x"], "the disk 9, and the inventory has only 2000, 2001"),
        ("disks:web?snapshot=s&inventory=INVENTORY", ["--source", "1=/x"], "leave out inventory="),
        ("disks:web?snapshot=s&inventory=/nowhere", [], "/nowhere"),
        ("disks:web?snapshot=s", ["--transports", "lan"], "lan is no transport"),
        ("disks:web", [], "say what the disks are"),
        ("qmp+unix:/x", ["--transports", "nbd"], "are for machines disks:NAME"),
        ("disks:web?snapshot=s", ["--inventory", "/nowhere"], "/nowhere"),
    ])
    func `what makes no sense is refused before anything is made`(_ vm: String, _ more: [String], _ word: String)
        throws
    {
        let machine = try Inventoried()
        let name = vm.split(separator: "INVENTORY", omittingEmptySubsequences: false).joined(
            separator: machine.site.path)
        let outcome = try Tool.diskgate.run(
            ["backup", "--vm", name, "--repository", machine.folder.file("points")] + more,
            environment: machine.site.environment)
        #expect(outcome.status == 1 && (outcome.errors + outcome.text).contains(word), "\(outcome)")
        #expect(!machine.hasPoints)
    }
}
