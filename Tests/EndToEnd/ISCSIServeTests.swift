// A logical unit of an iSCSI target served without the kernel's initiator: copied, written over, and lost on the way.
import Glibc
import Testing

/// A target (tgtd) with one file as a thin unit.
private final class Target {
    let folder: Folder
    let image: String
    private(set) var uri = ""

    private static let script =
        "\(#filePath.split(separator: "/").dropLast(3).reduce("") { "\($0)/\($1)" })/Scripts/lab/iscsi-target"

    init(in folder: Folder, image: String) throws {
        self.folder = folder
        self.image = image
        try start()
    }

    deinit { _ = try? Tool("bash").run([Self.script, "-w", folder.path, "stop"]) }

    @discardableResult
    private func tell(_ words: [String]) throws -> String {
        let outcome = try Tool("bash").run([Self.script, "-w", folder.path] + words)
        if outcome.status != 0 { throw Trouble("iscsi-target \(words): \(outcome)") }
        return outcome.text
    }

    /// Starts it, again at the same port after `kill`.
    func start() throws {
        let port = uri.split(separator: ":").dropFirst(2).first?.prefix { $0.isNumber }
        try tell(["start"] + (port.map { ["--ports", String($0)] } ?? []))
        let said = try tell(["add", image, "--thin", "--serial", "UNIT1"])
        uri = said.split(separator: "\"").first { $0.hasPrefix("iscsi://") }.map(String.init) ?? ""
    }

    func kill() throws {
        let text = try run("cat", folder.file("iscsi/pid")).text
        guard let pid = pid_t(text.split(separator: "\n")[0]), pid > 1 else { throw Trouble("no target runs") }
        Glibc.kill(pid, SIGKILL)
    }
}

@Suite struct ISCSIServeTests {
    private func words(_ line: String) -> [Substring] { line.split(separator: " ") }

    private static func target() throws -> Target {
        let folder = try Folder()
        return try Target(in: folder, image: try folder.image("unit"))
    }

    @Test func `nbdcopy of a served unit is equal and as sparse, and nothing is written to it`() throws {
        let target = try Self.target()
        let folder = target.folder
        let before = try checksum(target.image)
        try serving([target.uri], in: folder) { gateway in
            let copy = try folder.filled("copy")
            try run("nbdcopy", gateway.uri(), copy)
            #expect(try isSame(target.image, copy))
            let map = try run("nbdinfo", "--map", gateway.uri()).lines
            let expected = try run("diskgate", "map", target.image).lines
            #expect(map.map(words) == expected.map(words))
            #expect(map.contains { $0.contains("hole,zero") })
        }
        let copied = try run("diskgate", "copy", target.uri, folder.file("own"))
        #expect(copied.status == 0)
        #expect(try isSame(target.image, folder.file("own")))
        #expect(try checksum(target.image) == before)
    }

    @Test func `what is written over a unit stays in scratch space`() throws {
        let target = try Self.target()
        let new = try target.folder.image("new", seed: 5)
        try serving([target.uri], in: target.folder) { gateway in
            let refused = try attempt("nbdcopy", new, gateway.uri())
            #expect(refused.status != 0)
        }
        let before = try checksum(target.image)
        try serving(["--overlay", target.uri], in: target.folder) { gateway in
            try run("nbdcopy", "--flush", new, gateway.uri())
            let copy = try target.folder.filled("copy")
            try run("nbdcopy", gateway.uri(), copy)
            #expect(try isSame(new, copy))
        }
        #expect(try checksum(target.image) == before)
        let writable = try attempt("diskgate", "serve", "--writable", target.uri, "--run", "true")
        #expect(writable.status == 1 && writable.errors.contains("--overlay"), "\(writable)")
    }

    @Test func `a target that is killed ends in an error for its clients only, and is read on when it is back`() throws
    {
        let target = try Self.target()
        let folder = target.folder
        let sources = ["\(target.uri)?reconnect=0", "\(target.uri)?reconnect=60", "memory:1M"]
        let names = ["--name", "once", "--name", "patient", "--name", "other"]
        try serving(sources + names, in: folder) { gateway in
            for name in ["once", "patient"] { try run("nbdcopy", gateway.uri(name), "null:") }
            try target.kill()
            let failed = try attempt("nbdcopy", gateway.uri("once"), "null:")
            #expect(failed.status != 0 && failed.errors.contains("error"), "\(failed)")
            try run("nbdcopy", gateway.uri("other"), "null:")
            try target.start()
            let copy = try folder.filled("copy")
            try run("nbdcopy", gateway.uri("patient"), copy)
            #expect(try isSame(target.image, copy))
        }
    }

    @Test func `info tells who a unit is, and refusals say what to do`() throws {
        let target = try Self.target()
        let info = try run("diskgate", "info", "--json", target.uri).text
        #expect(info.contains("UNIT1") && info.contains("LABSAN"))
        let secret = target.uri.replacing("iscsi://", with: "iscsi://me%hush@")
        let refused = try attempt("diskgate", "info", secret)
        #expect(refused.status == 1 && refused.errors.contains("password-file") && !refused.errors.contains("hush"))
        let copied = try attempt("diskgate", "copy", "memory:1M", target.uri)
        #expect(copied.status == 1 && copied.errors.contains("initiator"), "\(copied)")
    }
}
