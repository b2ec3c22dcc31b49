// Sessions of the site's hosts: every command that opens a disk there takes one, waits for one, or goes another way.
import Glibc
import Testing

/// A server at a port, on a host of the inventory that gives one session.
private struct Limited {
    let folder: Folder
    let image: String
    let peer: Peer
    let port: String
    var site: InventoryFile
    var uri: String { "nbd://127.0.0.1:\(port)/" }

    init(policy: String = #""waitsForSessions": false"#) throws {
        folder = try Folder()
        image = try folder.image("disk", size: 3 << 20)
        port = try freePorts(1)[0]
        peer = try Peer.nbdkit(port: port, "-r", "file", image, in: folder)
        site = InventoryFile(in: folder)
        site.policy = policy
        try site.store()
    }

    /// Runs a body while a server of ours has the session.
    func held(_ body: (Gateway) throws -> Void) throws {
        try body(try Gateway([uri], in: folder, environment: site.environment))
    }

    /// Starts a command that waits for the session, and runs a body with its process id once it says so.
    ///
    /// - Returns: how it ended, and all that it has said.
    func waiting(_ words: [String], _ body: (pid_t) throws -> Void) throws -> (status: Int32, said: String) {
        let errors = try namelessFile()
        defer { close(errors) }
        func said() throws -> String { String(decoding: try content(of: errors), as: UTF8.self) }
        let pid = try Tool.diskgate.start(words, output: errors, errors: errors, environment: site.environment)
        let waits = try eventually { try said().contains("waiting up to 100 s for a session of the host esx1") }
        #expect(waits)
        try body(pid)
        return (try waitForEnd(of: pid, what: words[0]), try said())
    }
}

@Suite struct SiteSessionTests {
    @Test func `who comes second is denied, or goes another way, until the first is gone`() throws {
        let limited = try Limited()
        let target = limited.folder.file("copy")
        try limited.held { gateway in
            let reason = "1 of 1 sessions of the host esx1 are taken (as the inventory says), and none is waited for: "
            for command in [["info"], ["map"], ["cat"], ["checksum"], ["copy"], ["serve"]] {
                let rest = command == ["copy"] ? [target] : []
                let denied = try Tool.diskgate.run(
                    command + [limited.uri] + rest, environment: limited.site.environment)
                #expect(denied.status == 1 && denied.output.isEmpty, "\(command): \(denied)")
                #expect(denied.errors.contains("\(reason)process \(gateway.pid) for \(limited.uri)"), "\(denied)")
            }
            #expect(access(target, F_OK) < 0)
            let named = try limited.site.run("info", "nbd://LocalHost:\(limited.port)/")
            #expect(named.status == 1 && named.errors.contains(reason), "\(named)")
            let written = try limited.site.run("copy", limited.image, limited.uri, "--force")
            #expect(written.status == 1 && written.errors.contains(reason), "\(written)")

            let other = try limited.site.run("copy", "--json", limited.uri, "--or", limited.image, target)
            #expect(other.status == 3 && other.errors.contains("not over nbd: opening \(limited.uri): \(reason)"))
            #expect(other.text.contains("\"chosen\" : \"file\"") && other.text.contains("\"position\" : 2"))
            #expect(try isSame(limited.image, target))

            // A connection that is made again is of the same session.
            limited.peer.kill()
            try limited.peer.start()
            #expect(try run("diskgate", "checksum", gateway.uri()).text.hasPrefix(try checksum(limited.image)))
            #expect(try limited.site.run("info", limited.uri).errors.contains("process \(gateway.pid)"))

            gateway.signal(SIGKILL)
            _ = try gateway.end()
            let free = try limited.site.run("copy", "--force", limited.uri, target)
            #expect(free.status == 0 && free.errors.isEmpty, "\(free)")
        }
    }

    @Test func `who waits is told once, and goes on when a session is free`() throws {
        let limited = try Limited(policy: #""sessionWaitSeconds": 100"#)
        let target = try limited.folder.filled("copy", size: 3 << 20)
        try limited.held { gateway in
            let copy = ["copy", "--force", limited.uri, target]
            let stopped = try limited.waiting(copy) { kill($0, SIGTERM) }
            #expect(stopped.status == 1 && stopped.said.contains("stopped while it waited"), "\(stopped.said)")
            let served = try limited.waiting(copy) { (_: pid_t) throws in #expect(try gateway.stop() == 0) }
            #expect(served.status == 0 && served.said.contains("process \(gateway.pid)"), "\(served.said)")
            #expect(served.said.split(separator: "waiting up to").count == 2)
        }
        #expect(try isSame(limited.image, target))
    }

    @Test(arguments: [SIGTERM, SIGINT]) func `a server that has disks added stops waiting`(_ signal: Int32) throws {
        let limited = try Limited(policy: #""sessionWaitSeconds": 100"#)
        try limited.held { _ in
            // Nobody answers there, but it is the other source's turn before.
            let added = "hotadd:image=/nowhere/disk?controller=qmp+unix:\(limited.folder.file("none"))&unprotected=yes"
            let listen = ["--listen", "unix:\(limited.folder.file("other"))"]
            let stopped = try limited.waiting(["serve", limited.uri, added] + listen) { kill($0, signal) }
            #expect(stopped.status == 1 && stopped.said.contains("stopped while it waited"), "\(stopped.said)")
        }
    }

    @Test func `sessions are counted in the directory that a command is given`() throws {
        var limited = try Limited()
        limited.site.disks = """
            {"key": 2000, "capacity": \(3 << 20), "file": "[fast] web/a.vmdk", "sources": ["\(limited.uri)"]}
            """
        try limited.site.store()
        let folder = limited.folder
        // The environment names another one than the holder's.
        let environment = ["DISKGATE_INVENTORY=\(limited.site.path)", "DISKGATE_STATE_DIRECTORY=\(folder.file("x"))"]
        func run(_ words: [String], state: String) throws -> Outcome {
            let all = words + ["--transports", "nbd", "--state-directory", folder.file(state)]
            return try Tool.diskgate.run(all, environment: environment)
        }
        let backup = ["backup", "--vm", "disks:web?snapshot=s", "--repository", folder.file("points")]
        let check = ["check", "--all", "--inventory", limited.site.path]
        try limited.held { _ in
            for words in [backup, check, check + ["--try"]] {
                let full = try run(words, state: "state")
                #expect(full.status == 1, "\(full)")
                #expect((full.text + full.errors).contains("1 of 1 sessions of the host esx1"), "\(full)")
                // A colon is a part of the name.
                let free = try run(words, state: "a:b")
                #expect(free.status != 1, "\(free)")
                #expect(!(free.text + free.errors).contains("1 of 1 sessions of the host esx1"), "\(free)")
            }
        }
        #expect(access(folder.file("a:b/sessions"), F_OK) == 0)
        #expect(access(folder.file("a"), F_OK) < 0 && access(folder.file("x"), F_OK) < 0)
    }

    @Test func `who cannot count sessions says what for, and where else to`() throws {
        let limited = try Limited()
        let denied = try Tool.diskgate.run(
            ["info", limited.uri],
            environment: ["DISKGATE_INVENTORY=\(limited.site.path)", "DISKGATE_STATE_DIRECTORY=/proc/none"])
        #expect(denied.status == 1 && denied.errors.contains("which has a session limit: "), "\(denied)")
        #expect(denied.errors.contains("/proc/none") && denied.errors.contains("(DISKGATE_STATE_DIRECTORY names"))
    }

    @Test func `who waited for as long as the policy says is denied`() throws {
        let limited = try Limited(policy: #""sessionWaitSeconds": 1"#)
        try limited.held { gateway in
            let denied = try limited.site.run("info", limited.uri)
            #expect(
                denied.status == 1 && denied.errors.contains("are taken (as the inventory says), for 1 s: process "))
        }
    }

    @Test func `all connections of a copy are one session, and each try gives its own back`() throws {
        let limited = try Limited(policy: "")
        let image = try limited.folder.image("large")
        let target = try limited.folder.filled("copy")
        // Large and slow enough for several workers to have something to do, however late they begin.
        let port = try freePorts(1)[0]
        let slow = try Peer.nbdkit(
            port: port, "-r", "--filter=delay", "file", image, "rdelay=500ms", in: limited.folder)
        let copy = try limited.site.run(
            "copy", "--json", "--workers", "4", "--force", "nbd://127.0.0.1:\(port)/", target)
        // It comes last in the report.
        #expect(copy.status == 0 && !copy.text.contains("\"workers\" : 1\n"), "\(copy)")
        #expect(try isSame(image, target))
        slow.kill()
        let tried = try limited.site.run("info", "nbd://127.0.0.1:1/", "--or", limited.uri)
        #expect(tried.status == 3 && tried.text.contains("transport:       nbd (2nd of 2;"), "\(tried)")
        // Nobody else could give one back.
        let both = try limited.site.run("serve", limited.uri, limited.uri)
        #expect(both.status == 1 && both.errors.contains("and all by this process itself"), "\(both)")
        // Unix sockets are not hosts, and hosts without a limit have no sessions.
        var free = limited.site
        free.host = #""name": "127.0.0.1", "kind": "qemu""#
        try free.store()
        try run("rm", "-rf", limited.folder.file("state"))
        #expect(try free.run("info", limited.uri).status == 0)
        #expect(access(limited.folder.file("state"), F_OK) < 0)
        free.host += #", "sessionLimit": 0"#
        try free.store()
        let none = try free.run("info", limited.uri)
        #expect(none.status == 1 && none.errors.contains("its limit is 0"), "\(none)")
    }

    @Test func `an inventory that cannot be read is an error where it is needed`() throws {
        let limited = try Limited()
        let path = limited.site.path
        func info(_ arguments: String..., inventory: String) throws -> Outcome {
            try Tool.diskgate.run(["info"] + arguments, environment: ["DISKGATE_INVENTORY=\(inventory)"])
        }
        let missing = try info(limited.uri, inventory: limited.folder.file("none"))
        #expect(missing.status == 1 && missing.errors.contains("reading the inventory"), "\(missing)")
        #expect(missing.errors.contains("No such file") && missing.errors.contains("the site's inventory"))
        try run("sh", "-c", "echo '{\"hosts\": 7}' >\(path)")
        let broken = try info(limited.uri, "--or", limited.folder.file("none"), inventory: path)
        #expect(broken.status == 1 && broken.errors.contains("at hosts"), "\(broken)")
        // Files have no host.
        #expect(try info(limited.image, inventory: path).status == 0)
        let said = try info(limited.image, "--inventory", path, inventory: "")
        #expect(said.status == 1 && said.errors.contains("at hosts"), "\(said)")
        #expect(try info(limited.uri, inventory: "").status == 0)
    }
}
