// `diskgate check`: this machine, the disks of a site by its inventory, sources that are tried, sessions of others.
import Glibc
import Testing

/// An inventory of one machine with one disk on a datastore of LUNs, and a host that gives it away.
private struct SmallSite {
    var datastore = "vmfs6"
    var controller = "pvscsi"
    var luns = #"["naa.600a1"]"#
    var sources: [String] = []
    var sessionLimit = 5
    var libraries = #"["openssl"]"#

    var text: String {
        let names = sources.map { "\"\($0)\"" }.joined(separator: ", ")
        return """
            {"proxy": {"id": "vm-7", "name": "proxy-1", "host": "esx1", "power": "on", "datastore": "fast",
              "isProtected": true, "controllers": [{"kind": "pvscsi", "usedUnits": [0]}], "luns": \(luns),
              "libraries": \(libraries)},
             "hosts": [{"name": "esx1", "kind": "qemu", "sessionLimit": \(sessionLimit)}],
             "datastores": [{"name": "fast", "type": "\(datastore)", "extents": ["naa.600a1"], "hosts": ["esx1"]}],
             "machines": [{"id": "vm-42", "name": "web", "host": "esx1", "power": "on", "hasSnapshot": false,
              "disks": [
               {"key": 2000, "capacity": 1048576, "file": "[fast] web/web.vmdk", "controller": "\(controller)",
                "sources": [\(names)]}]}],
             "policy": {"waitsForSessions": false}}
            """
    }

    /// Writes it to a file.
    func stored(in folder: Folder, _ name: String = "site.json") throws -> String {
        let path = folder.file(name)
        let file = try #require(fopen(path, "we"))
        fputs(text, file)
        fclose(file)
        return path
    }

    /// Checks it.
    func check(_ folder: Folder, _ arguments: String...) throws -> Outcome {
        let state = ["--state-directory", folder.file("state")]
        return try Tool.diskgate.run(["check", "--inventory", try stored(in: folder)] + state + arguments)
    }
}

@Suite struct CheckTests {
    @Test func `each disk is told its transport, and the status says whether it is the first`() throws {
        let folder = try Folder()
        let first = try SmallSite().check(folder)
        #expect(first.status == 0 && first.lines.contains { $0.hasPrefix("san      chosen") })
        #expect(first.lines.first == "web (vm-42)" && first.lines[1] == "disk 2000, 1 MiB, [fast] web/web.vmdk")

        let vsan = try SmallSite(datastore: "vSAN").check(folder)
        #expect(vsan.status == 3 && vsan.lines.contains { $0.hasPrefix("san      excluded  fast is a vSAN datastore") })
        #expect(vsan.lines.contains { $0.hasPrefix("-> use hotadd with a proxy that lies on fast") })
        #expect(vsan.lines.contains { $0.hasPrefix("hotadd   chosen") })

        let ide = try SmallSite(datastore: "nfs", controller: "ide").check(folder, "--vm", "web")
        #expect(ide.status == 3 && ide.lines.contains { $0.hasPrefix("nbdssl   chosen") })

        let none = try SmallSite(datastore: "nfs", controller: "ide").check(folder, "--transports", "san:hotadd")
        #expect(none.status == 1 && none.lines.contains("there is no transport for this disk"))
        // As it is now there is no snapshot.
        let now = try SmallSite().check(folder, "--as-is")
        #expect(now.status == 1 && now.text.contains("the machine runs and has no snapshot"))
    }

    @Test func `JSON has every rule`() throws {
        let folder = try Folder()
        let path = try SmallSite(luns: "[]").stored(in: folder)
        let script = """
            import json, subprocess
            done = subprocess.run([sys.argv[1], "check", "--json", "--inventory", sys.argv[2]], capture_output=True)
            assert done.returncode == 3, done
            plan = json.loads(done.stdout)[0]
            assert plan["machine"] == "web (vm-42)" and plan["proxies"] == ["proxy-1"], plan
            choice = plan["disks"][0]["choice"]
            assert choice["chosen"] == "hotadd" and choice["position"] == 2, choice
            candidates = {c["transport"]: c["findings"] for c in choice["candidates"]}
            assert list(candidates) == ["san", "hotadd", "nbdssl", "nbd", "file"], candidates
            luns = [f for f in candidates["san"] if f["rule"] == "san.luns"][0]
            assert luns["verdict"] == "excluded" and "naa.600a1" in luns["reason"] and luns["remedy"], luns
            """
        _ = try python(script, Tool.diskgate.path, path)
    }

    @Test func `sources are tried, and what fails is passed over`() throws {
        let folder = try Folder()
        let image = try folder.image("disk", size: 1 << 20)
        let peer = try Peer.nbdkit("-r", "file", image, in: folder)
        let lun = "san:wwn=naa.6000000000000000000000000000dead?snapshot=a"
        let site = SmallSite(sources: [lun, peer.uri()])
        // By the rules the LUN is fine: the inventory says that it is seen.
        #expect(try site.check(folder, "--transports", "san:nbd").status == 0)
        let tried = try site.check(folder, "--transports", "san:nbd", "--try")
        #expect(tried.status == 3 && tried.text.contains("this machine sees no such LUN"))
        #expect(tried.lines.contains { $0.hasPrefix("nbd      chosen") })
        peer.kill()
        let none = try site.check(folder, "--transports", "san:nbd", "--try")
        #expect(none.status == 1 && none.lines.contains("there is no transport for this disk"))
    }

    @Test func `sessions of other processes count, and those of killed ones do not`() throws {
        let folder = try Folder()
        let image = try folder.image("disk", size: 1 << 20)
        // Its server answers no read for as long as the test takes.
        let peer = try Peer.nbdkit("-r", "--filter=delay", "file", image, "rdelay=300", in: folder)
        let site = SmallSite(sources: [peer.uri()], sessionLimit: 1)
        #expect(try site.check(folder, "--transports", "nbd").status == 0)
        let null = try namelessFile()
        defer { close(null) }
        let arguments = [
            "check", "--inventory", try site.stored(in: folder, "other.json"), "--state-directory",
            folder.file("state"),
            "--transports", "nbd", "--try",
        ]
        let holder = try Tool.diskgate.start(arguments, output: null, errors: null)
        let isFull = try eventually { try site.check(folder, "--transports", "nbd").status == 1 }
        #expect(isFull)
        let full = try site.check(folder, "--transports", "nbd")
        #expect(full.text.contains("1 of 1 sessions of the host esx1 are taken"), "\(full)")
        kill(holder, SIGKILL)
        #expect(try waitForEnd(of: holder, what: "the holder") == 128 + SIGKILL)
        let free = try site.check(folder, "--transports", "nbd", "--all")
        #expect(free.status == 0 && free.text.contains("0 of 1 sessions of the host esx1 are taken"), "\(free)")
    }

    @Test func `this machine is checked without an inventory`() throws {
        let all = try Tool.diskgate.run(["check"])
        #expect(all.status == 0 && all.lines.first == "this machine")
        for name in ["san", "hotadd", "nbdssl", "nbd", "file", "iscsi", "mount", "vddk"] {
            #expect(all.lines.contains { $0.hasPrefix("\(name) ") }, "\(name) is missing in \(all)")
        }
        #expect(all.lines.contains { $0.hasPrefix("file     ok") })
        #expect(try Tool.diskgate.run(["check", "--transports", "nbd:san"]).status == 0)
        #expect(try run("diskgate", "check", "--json", "--transports", "file").text.contains("\"name\" : \"file\""))
    }

    @Test func `what is wrong with an inventory is told with its place`() throws {
        let folder = try Folder()
        var site = SmallSite()
        site.luns = "7"
        let wrong = try site.check(folder)
        #expect(wrong.status == 1 && wrong.output.isEmpty && wrong.errors.contains("at proxy.luns"))
        let unknown = try SmallSite().check(folder, "--vm", "db")
        #expect(unknown.status == 1 && unknown.errors.contains("the inventory has none of this id or name"))
        let order = try SmallSite().check(folder, "--transports", "san::nbd")
        #expect(order.status == 1 && order.errors.contains("an empty name is no transport"))
    }
}
