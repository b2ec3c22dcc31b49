// The inventory of a test's site: hosts, a machine with its disks, a policy; and commands that go by it.
import Glibc

/// A site with a host at 127.0.0.1, whose sessions are counted in a folder of its own.
struct InventoryFile {
    let folder: Folder
    /// JSON of the fields.
    var host = #""name": "esx1", "addresses": ["127.0.0.1", "localhost"], "kind": "qemu", "sessionLimit": 1"#
    var policy = #""waitsForSessions": false"#
    /// JSON of the disks of the machine web.
    var disks = ""
    var machine = #""id": "vm-42", "name": "web", "host": "esx1", "power": "on""#

    init(in folder: Folder) { self.folder = folder }

    /// Where it is, once it is stored.
    var path: String { folder.file("site.json") }

    /// What makes a command go by it.
    var environment: [String] {
        ["DISKGATE_INVENTORY=\(path)", "DISKGATE_STATE_DIRECTORY=\(folder.file("state"))"]
    }

    /// Writes it.
    func store() throws {
        let text = """
            {"proxy": {"id": "vm-7", "luns": []}, "hosts": [{\(host)}], "policy": {\(policy)},
             "datastores": [{"name": "fast", "type": "vsan"}, {"name": "slow", "type": "vmfs6"}],
             "machines": [{\(machine), "disks": [\(disks)]}]}
            """
        guard let file = fopen(path, "we") else { throw Trouble("writing \(path): error \(errno)") }
        fputs(text, file)
        fclose(file)
    }

    /// Runs a command that goes by it.
    func run(_ arguments: String...) throws -> Outcome {
        try Tool.diskgate.run(arguments, environment: environment)
    }
}
