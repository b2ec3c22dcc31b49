// Several sources of one disk: the first that can be read is taken, the reasons are told, and the exit status says so.
import Glibc
import Testing

/// A LUN that no machine of this world sees.
private let missingLUN = "san:wwn=naa.6000000000000000000000000000dead?snapshot=nightly"

@Suite struct SourceChoiceTests {
    @Test func `a missing LUN leads to the next source, with the reason and status 3`() throws {
        let folder = try Folder()
        let image = try folder.image("disk", size: 3 << 20)
        let peer = try Peer.nbdkit("-r", "file", image, in: folder)
        let reason =
            "diskgate: not over san: opening the LUN wwn=naa.6000000000000000000000000000dead: this machine sees"
        let ways = [missingLUN, "--or", peer.uri(), "--or", folder.file("none")]

        let info = try Tool.diskgate.run(["info"] + ways)
        #expect(info.status == 3 && info.errors.hasPrefix(reason) && info.errors.split(separator: "\n").count == 1)
        #expect(info.lines.contains { $0.hasPrefix("transport:       nbd (2nd of 3; san: opening the LUN") })
        let json = try Tool.diskgate.run(["info", "--json"] + ways)
        #expect(
            json.status == 3 && json.text.contains("\"chosen\" : \"nbd\"") && json.text.contains("\"position\" : 2"))

        let sum = try checksum(image)
        let digest = try Tool.diskgate.run(["checksum"] + ways)
        #expect(digest.status == 3 && digest.text.hasPrefix(sum) && digest.errors.hasPrefix(reason))
        let bytes = try Tool.diskgate.run(["cat"] + ways)
        let content = try run("cat", image)
        #expect(bytes.status == 3 && bytes.output == content.output)
        let map = try Tool.diskgate.run(["map"] + ways)
        let direct = try run("diskgate", "map", peer.uri())
        #expect(map.status == 3 && map.output == direct.output)

        let target = try folder.filled("copy", size: 3 << 20)
        let copy = try Tool.diskgate.run(["copy", "--json", "--force"] + ways + [target])
        #expect(copy.status == 3 && copy.errors.contains(reason))
        #expect(
            copy.text.contains("\"downgrades\" : [\n    \"not over san: ") && copy.text.contains("\"chosen\" : \"nbd\"")
        )
        #expect(try isSame(image, target))

        try serving(ways, in: folder) { (gateway) throws in
            #expect(gateway.log.contains("not over san: "))
            #expect(try run("diskgate", "checksum", gateway.uri()).text.hasPrefix(try checksum(image)))
        }
    }

    @Test func `the first source that works is taken without a word`() throws {
        let folder = try Folder()
        let image = try folder.image("disk", size: 1 << 20)
        let outcome = try Tool.diskgate.run(["info", image, "--or", missingLUN])
        #expect(outcome.status == 0 && outcome.errors.isEmpty)
        #expect(outcome.lines.contains("transport:       file (1st of 2)"))
        #expect(try run("diskgate", "info", image).lines.contains("transport:       file"))
        #expect(try !run("diskgate", "info", "pattern:1M").text.contains("transport:"))
    }

    @Test func `where nothing works all reasons are told`() throws {
        let folder = try Folder()
        let target = folder.file("copy")
        for command in [["info"], ["cat"], ["copy"], ["serve"]] {
            let rest = command == ["copy"] ? [target] : []
            let outcome = try Tool.diskgate.run(
                command + [missingLUN, "--or", folder.file("none"), "--or", "nbd://127.0.0.1:1/"] + rest)
            #expect(outcome.status == 1 && outcome.output.isEmpty && outcome.errors.split(separator: "\n").count == 1)
            for part in ["none can be used: san: ", "no such LUN", "; file: ", "No such file", "; nbd: ", "refused"] {
                #expect(outcome.errors.contains(part), "\(outcome.errors)")
            }
        }
        #expect(access(target, F_OK) < 0)
    }

    @Test func `a source that opens and cannot be read is passed over`() throws {
        let folder = try Folder()
        let image = try folder.image("disk", size: 1 << 20)
        let sum = try checksum(image)
        for range in ["0-1", "1048575-1048576"] {
            try serving(["--fault", "read-error@\(range)", image], in: folder) { (gateway) throws in
                let outcome = try Tool.diskgate.run(["checksum", gateway.uri(), "--or", image])
                #expect(outcome.status == 3 && outcome.text.hasPrefix(sum))
                #expect(outcome.errors.hasPrefix("diskgate: not over nbd: "))
                // Alone it is opened as ever.
                #expect(try run("diskgate", "info", gateway.uri()).text.contains("1048576 bytes"))
            }
        }
    }

    @Test func `another size is another disk`() throws {
        let folder = try Folder()
        let image = try folder.image("disk", size: 1 << 20)
        let other = try folder.image("other", size: 2 << 20)
        try serving(["--fault", "read-error@0-1", image], in: folder) { (gateway) throws in
            let outcome = try Tool.diskgate.run(["info", gateway.uri(), "--or", other, "--or", image])
            #expect(outcome.status == 3 && outcome.errors.contains("they are not the same disk"))
            #expect(outcome.lines.contains { $0.hasPrefix("transport:       file (3rd of 3;") })
        }
    }

    @Test func `an order of transports sorts, leaves out, and is checked`() throws {
        let folder = try Folder()
        let image = try folder.image("disk", size: 1 << 20)
        let peer = try Peer.nbdkit("-r", "file", image, in: folder)
        let both = [peer.uri(), "--or", image]
        func transport(_ order: String) throws -> String? {
            try Tool.diskgate.run(["info", "--transports", order] + both).lines.first { $0.hasPrefix("transport:") }
        }
        #expect(try transport("nbd:file") == "transport:       nbd (1st of 2)")
        #expect(try transport("san:file:nbd") == "transport:       file (1st of 2)")
        #expect(try transport("file") == "transport:       file (1st of 2)")
        let none = try Tool.diskgate.run(["info", "--transports", "san:hotadd", image])
        #expect(none.status == 1 && none.errors.contains("file: it is not among the transports asked for (san:hotadd)"))
        let wrong = try Tool.diskgate.run(["info", "--transports", "san:lan", image])
        #expect(
            wrong.status == 1 && wrong.errors.contains("lan is no transport (there are san, hotadd, nbdssl, nbd, file"))
    }

    @Test func `whoever cannot prove who he is does not make us speak in clear text`() throws {
        let folder = try Folder()
        let image = try folder.image("disk", size: 1 << 20)
        let plain = try Peer.nbdkit("-r", "file", image, in: folder)
        try serving(try Gateway.tls(certificates: "other-ca") + ["--tls", "require", image], in: folder) {
            (gateway) throws in
            let tls = try Access.certificate("client").uri(socket: gateway.socket)
            let outcome = try Tool.diskgate.run(["info", tls, "--or", plain.uri()])
            #expect(outcome.status == 1 && outcome.errors.contains("nbd: not tried: "), "\(outcome)")
            // What does not cross a network may follow.
            let file = try Tool.diskgate.run(["info", tls, "--or", plain.uri(), "--or", image])
            #expect(file.status == 3 && file.text.contains("transport:       file (3rd of 3;"))
            // A server that is merely not there is another matter.
            let gone = tls.split(separator: "socket=").first.map { "\($0)socket=\(folder.file("gone"))" } ?? ""
            let fallen = try Tool.diskgate.run([
                "info", "\(gone)&tls-certificates=\(try Certificates.made()["client"])", "--or", plain.uri(),
            ])
            #expect(fallen.status == 3 && fallen.text.contains("transport:       nbd (2nd of 2;"), "\(fallen)")
        }
    }

    @Test func `a fingerprint that is asked for leaves clear text out`() throws {
        let folder = try Folder()
        let image = try folder.image("disk", size: 1 << 20)
        let peer = try Peer.nbdkit("-r", "file", image, in: folder)
        let pin = "sha256:" + String(repeating: "ab", count: 32)
        let outcome = try Tool.diskgate.run(["info", "--fingerprint", pin, missingLUN, "--or", peer.uri()])
        #expect(outcome.status == 1 && outcome.errors.contains("a certificate was asked for"))
        let file = try Tool.diskgate.run(["info", "--fingerprint", pin, missingLUN, "--or", peer.uri(), "--or", image])
        #expect(file.status == 3 && file.text.contains("transport:       file (2nd of 3;"))
    }

    @Test(arguments: [
        ["serve", "a", "b", "--or", "c"], ["serve", "--writable", "--checkpoints", "/x", "a", "--or", "c"],
        ["info", "--list", "nbd://h", "--or", "nbd://i"], ["check", "--vm", "web"], ["check", "--try"],
        ["check", "--as-is"],
    ])
    func `wrong usage is 2`(_ arguments: [String]) throws {
        let outcome = try Tool.diskgate.run(arguments)
        #expect(outcome.status == 2 && outcome.output.isEmpty && !outcome.errors.isEmpty)
    }
}
