// Snapshots of a real libvirt's domain, whose processor stands still: checkpoints, pull backups, images when it is off.
import Block
import Glibc
import LinuxIO
import Support
import Testing
import Transports

@testable import Hypervisors

/// A libvirtd of its own with a domain, from Scripts/lab/libvirt-domain.
private final class Domain {
    let directory: TemporaryDirectory
    let machine: String
    let image: String

    static let isAvailable =
        QEMUProcess.isAvailable && Tool.exists("libvirtd") && Tool.exists("virsh") && Tool.exists("python3")

    init(_ directory: TemporaryDirectory) throws {
        self.directory = directory
        let text = try Self.lab(directory, ["start", "--no-guest", "--size", "16M"])
        let answer = JSONValue(parsing: text.utf8)
        guard let machine = answer?["machine"]?.string, let image = answer?["disk"]?.string else {
            throw CheckFailure("libvirt-domain start: \(text)")
        }
        self.machine = machine
        self.image = image
        try io("write -q -P 0x11 0 8M")
    }

    deinit { _ = try? lab(["stop"]) }

    @discardableResult
    func lab(_ words: [String]) throws -> String { try Self.lab(directory, words) }

    private static func lab(_ directory: TemporaryDirectory, _ words: [String]) throws -> String {
        let repository = #filePath.split(separator: "/").dropLast(3).reduce("") { "\($0)/\($1)" }
        let script = "\(repository)/Scripts/lab/libvirt-domain"
        return try Tool.output("python3", [script, "-w", directory.path] + words)
    }

    func io(_ command: String) throws { try lab(["io", command]) }

    /// Gives the domain, which is off, another disk.
    func attach(_ image: String, _ target: String) throws {
        let kind = ["--driver", "qemu", "--subdriver", "qcow2"]
        try lab(["virsh", "--", "attach-disk", "lab", image, target, "--config"] + kind)
    }

    func checkpoints() throws -> [String] {
        try lab(["virsh", "--", "checkpoint-list", "lab", "--topological", "--name"])
            .split(separator: "\n").map(String.init)
    }

    func content(_ name: String) throws -> String {
        try io("flush")
        let path = directory.file(name)
        _ = try Tool.output("qemu-img", ["convert", "-U", "-f", "qcow2", "-O", "raw", image, path])
        return path
    }

    func ledger() throws -> RunLedger {
        try RunLedger.begin(stateDirectory: directory.file("state"), machine: machine, repository: nil)
    }

    /// A request with scratch files in the test's directory.
    func wanted(since: String? = nil, _ checkpoint: String) -> SnapshotRequest {
        var wanted = request(["vda"], since: since, checkpoint: checkpoint)
        wanted.scratchDirectory = directory.path
        return wanted
    }

    func leftovers() throws -> [String] {
        let job = try LibvirtPlace(machine).runningBackup().map { [$0.server] } ?? []
        return try job + namesInDirectory(directory.path).filter { $0.hasPrefix("diskgate-") }
    }
}

private func withDomain(_ body: (Domain, any Provider) throws -> Void) throws {
    try withTemporaryDirectory { directory in
        let domain = try Domain(directory)
        try body(domain, try Hypervisors.open(domain.machine))
    }
}

@Suite(.enabled(if: Domain.isAvailable), .serialized)
struct LibvirtTests {
    @Test func fullThenIncrementalThenAFailedOneThenOff() throws {
        try withDomain { domain, provider in
            let machine = try provider.inspect()
            #expect(machine.name == "lab" && machine.isRunning && !machine.hasGuestAgent)
            #expect(machine.disks.map(\.id) == ["vda"] && machine.disks[0].size == 16 << 20)
            #expect(machine.documents.contains { $0.name == "domain.xml" })
            #expect(machine.disks[0].checkpoints.isEmpty && machine.disks[0].obstacle == nil)
            let copy = domain.directory.file("copy.raw")
            var truth = try domain.content("truth.raw")
            // Full.
            var ledger = try domain.ledger()
            let full = try provider.begin(domain.wanted("r-1"), ledger: ledger)
            try domain.io("write -q -P 0x22 1M 1M")
            try copyWhole(full.disks[0], to: copy)
            try full.check(isLast: true)
            try full.finish(adopting: true)
            try ledger.end()
            try requireEqual(copy, truth, "the full copy")
            #expect(try domain.checkpoints() == ["diskgate-r-1"])
            // Incremental.
            truth = try domain.content("truth.raw")
            ledger = try domain.ledger()
            let next = try provider.begin(domain.wanted(since: "diskgate-r-1", "r-2"), ledger: ledger)
            try domain.io("write -q -P 0x33 2M 64k")
            #expect(next.disks[0].downgrade == nil)
            #expect(try copyChanges(next.disks[0], onto: copy) == 1 << 20)
            try next.finish(adopting: true)
            try requireEqual(copy, truth, "the incremental")
            #expect(try domain.checkpoints() == ["diskgate-r-2"])
            #expect(try provider.inspect().disks[0].checkpoints == ["diskgate-r-2"])
            // Failed: nothing is missed.
            let failed = try provider.begin(domain.wanted(since: "diskgate-r-2", "r-3"), ledger: ledger)
            try domain.io("write -q -P 0x44 3M 64k")
            try failed.finish(adopting: false)
            #expect(try domain.checkpoints() == ["diskgate-r-2"])
            #expect(try domain.leftovers().isEmpty)
            truth = try domain.content("truth.raw")
            let again = try provider.begin(domain.wanted(since: "diskgate-r-2", "r-4"), ledger: ledger)
            #expect(try copyChanges(again.disks[0], onto: copy) == 2 * 65536)
            try again.finish(adopting: true)
            try requireEqual(copy, truth, "the copy after a failed run")
            #expect(ledger.obligations.isEmpty)
            try offline(domain, provider, ledger, copy)
        }
    }

    /// A powered-off machine is read from its image, changes since the checkpoint included.
    private func offline(_ domain: Domain, _ provider: any Provider, _ ledger: RunLedger, _ copy: String) throws {
        try domain.io("write -q -P 0x55 5M 64k")
        try domain.lab(["virsh", "--", "destroy", "lab", "--graceful"])
        let deadline = monotonicSeconds() + 30
        while try provider.inspect().isRunning {
            try require(monotonicSeconds() < deadline, "the domain does not end")
            usleep(50_000)
        }
        let session = try provider.begin(domain.wanted(since: "diskgate-r-4", "r-5"), ledger: ledger)
        #expect(session.consistency == .offline && session.disks[0].downgrade == nil)
        #expect(session.disks[0].checkpoint == "diskgate-r-4")
        #expect(try copyChanges(session.disks[0], onto: copy) == 65536)
        try session.check(isLast: true)
        try session.finish(adopting: true)
        let truth = domain.directory.file("truth.raw")
        _ = try Tool.output("qemu-img", ["convert", "-f", "qcow2", "-O", "raw", domain.image, truth])
        try requireEqual(copy, truth, "the copy of the machine that is off")
        // It goes on from there when it runs again, with one more disk.
        let other = domain.directory.file("other.qcow2")
        _ = try Tool.output("qemu-img", ["create", "-q", "-f", "qcow2", other, "16M"])
        try domain.attach(other, "vdb")
        try domain.lab(["restart"])
        try domain.io("write -q -P 0x66 6M 64k")
        let next = try provider.begin(domain.wanted(since: "diskgate-r-4", "r-6"), ledger: ledger)
        #expect(try copyChanges(next.disks[0], onto: copy) == 2 * 65536)
        try next.finish(adopting: true)
        try changedPlaces(domain, provider, ledger, other)
    }

    /// Two images that change places both have the checkpoint's bitmap.
    private func changedPlaces(_ domain: Domain, _ provider: any Provider, _ ledger: RunLedger, _ other: String) throws
    {
        var wanted = request(["vda", "vdb"], since: nil, checkpoint: "s-1")
        wanted.scratchDirectory = domain.directory.path
        try provider.begin(wanted, ledger: ledger).finish(adopting: true)
        #expect(try provider.inspect().disks.allSatisfy { $0.checkpoints.contains("diskgate-s-1") })
        try domain.lab(["virsh", "--", "destroy", "lab", "--graceful"])
        for target in ["vda", "vdb"] { try domain.lab(["virsh", "--", "detach-disk", "lab", target, "--config"]) }
        try domain.attach(other, "vda")
        try domain.attach(domain.image, "vdb")
        #expect(try provider.inspect().disks.map(\.checkpoints) == [[], []])
        wanted = request(["vda", "vdb"], since: "diskgate-s-1", checkpoint: "s-2")
        let session = try provider.begin(wanted, ledger: ledger)
        #expect(session.disks.allSatisfy { $0.changedContext == nil && $0.downgrade != nil })
    }

    /// After an external snapshot, changes of before it are not in the image's own bitmaps: all of the disk is read,
    /// that below the image included.
    private func offlineOverABackingFile(_ domain: Domain, _ provider: any Provider) throws {
        try domain.lab(["virsh", "--", "destroy", "lab", "--graceful"])
        let deadline = monotonicSeconds() + 30
        while try provider.inspect().isRunning {
            try require(monotonicSeconds() < deadline, "the domain does not end")
            usleep(50_000)
        }
        let base = "\(domain.image).base"
        try require(rename(domain.image, base) == 0, "renaming the image")
        _ = try Tool.output("qemu-img", ["create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", domain.image])
        _ = try Tool.output("qemu-io", ["-f", "qcow2", "-c", "write -q -P 0x77 3M 64k", domain.image])
        let session = try provider.begin(domain.wanted(since: "diskgate-r-2", "r-9"), ledger: domain.ledger())
        #expect(session.disks[0].changedContext == nil)
        #expect(session.disks[0].downgrade?.contains("backing file") == true, "\(session.disks[0])")
        let device = try session.disks[0].source.open()
        var copy = [UInt8](repeating: 0xEE, count: Int(device.info.size))
        try copy.withUnsafeMutableBytes { try device.read(into: $0, at: 0) }
        try session.check(isLast: true)
        try session.finish(adopting: true)
        let truth = domain.directory.file("truth.raw")
        _ = try Tool.output("qemu-img", ["convert", "-f", "qcow2", "-O", "raw", domain.image, truth])
        try requireEqual(copy, try contentOfFile(truth), "the copy of an image with a backing file")
    }

    @Test func leftoversAndForeignThings() throws {
        try withDomain { domain, provider in
            // A crash after everything was made: the session is forgotten, the ledger is not.
            var ledger: RunLedger? = try domain.ledger()
            _ = try provider.begin(domain.wanted("r-1"), ledger: #require(ledger))
            let obligations = ledger?.obligations ?? []
            #expect(obligations.map(\.kind) == ["libvirt.directory", "libvirt.checkpoint", "libvirt.backup"])
            ledger = nil
            // While the backup goes on, neither its checkpoint nor its directory is taken from it.
            try requireError(.denied, "removing checkpoints during a backup") { _ = try provider.unprotect() }
            try requireError(.denied, "removing a directory in use") {
                try provider.settle(obligations[0], adopted: false)
            }
            for _ in 0..<2 {
                for obligation in obligations.reversed() { try provider.settle(obligation, adopted: false) }
            }
            #expect(try domain.leftovers().isEmpty)
            #expect(try domain.checkpoints().isEmpty)
            let socket = domain.directory.file("theirs.sock")
            // A foreign checkpoint stays, whatever is done to ours; a missing one means a full.
            try domain.lab(["virsh", "--", "checkpoint-create-as", "lab", "theirs"])
            let other = try domain.ledger()
            let session = try provider.begin(domain.wanted(since: "diskgate-gone-1", "r-1"), ledger: other)
            #expect(session.disks[0].downgrade?.contains("not there any more") == true)
            #expect(session.disks[0].changedContext == nil)
            // Somebody else's backup is not ended.
            #expect(throws: BlockError.self) { try provider.begin(domain.wanted("r-9"), ledger: try domain.ledger()) }
            try session.check(isLast: true)
            try session.finish(adopting: true)
            #expect(try domain.checkpoints() == ["theirs", "diskgate-r-1"])
            // Nor is it taken for ours, which somebody has ended.
            let ended = try provider.begin(domain.wanted("r-5"), ledger: other)
            let theirs = try domain.directory.makeFile(
                "theirs.xml",
                Array("<domainbackup mode='pull'><server transport='unix' socket='\(socket)'/></domainbackup>".utf8))
            try domain.lab(["virsh", "--", "domjobabort", "lab"])
            try domain.lab(["virsh", "--", "backup-begin", "lab", theirs])
            try requireError(.inputOutput, "another one has begun") { try ended.check(isLast: true) }
            try domain.lab(["virsh", "--", "domjobabort", "lab"])
            try ended.finish(adopting: false)
            #expect(try domain.checkpoints() == ["theirs", "diskgate-r-1"])
            // A bitmap that was removed behind libvirt's back.
            let removal: JSONValue = [
                "execute": "block-dirty-bitmap-remove",
                "arguments": ["node": "libvirt-1-format", "name": "diskgate-r-1"],
            ]
            try domain.lab([
                "virsh", "--", "qemu-monitor-command", "lab", String(decoding: removal.encoded, as: UTF8.self),
            ])
            let full = try provider.begin(domain.wanted(since: "diskgate-r-1", "r-2"), ledger: other)
            #expect(full.disks[0].downgrade?.contains("of no use") == true, "\(full.disks[0])")
            try full.finish(adopting: true)
            #expect(try domain.checkpoints() == ["theirs", "diskgate-r-2"])
            #expect(try provider.unprotect() == ["removed the checkpoint diskgate-r-2"])
            #expect(try domain.checkpoints() == ["theirs"])
            #expect(try domain.leftovers().isEmpty)
            try offlineOverABackingFile(domain, provider)
        }
    }
}
