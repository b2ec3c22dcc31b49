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
            func waiting(_ body: (pid_t) throws -> Void) throws -> (status: Int32, said: String) {
                let errors = try namelessFile()
                defer { close(errors) }
                func said() throws -> String { String(decoding: try content(of: errors), as: UTF8.self) }
                let pid = try Tool.diskgate.start(
                    ["copy", "--force", limited.uri, target], output: errors, errors: errors,
                    environment: limited.site.environment)
                let waits = try eventually { try said().contains("waiting up to 100 s for a session of the host esx1") }
                #expect(waits)
                try body(pid)
                return (try waitForEnd(of: pid, what: "the copy"), try said())
            }
            let stopped = try waiting { kill($0, SIGTERM) }
            #expect(stopped.status == 1 && stopped.said.contains("stopped while it waited"), "\(stopped.said)")
            let served = try waiting { (_: pid_t) throws in #expect(try gateway.stop() == 0) }
            #expect(served.status == 0 && served.said.contains("process \(gateway.pid)"), "\(served.said)")
            #expect(served.said.split(separator: "waiting up to").count == 2)
        }
        #expect(try isSame(limited.image, target))
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
        let target = try limited.folder.filled("copy", size: 3 << 20)
        // Slow enough for all workers to have something to do.
        let port = try freePorts(1)[0]
        let slow = try Peer.nbdkit(
            port: port, "-r", "--filter=delay", "file", limited.image, "rdelay=100ms", in: limited.folder)
        let copy = try limited.site.run(
            "copy", "--json", "--workers", "4", "--force", "nbd://127.0.0.1:\(port)/", target)
        #expect(copy.status == 0 && !copy.text.contains("\"workers\" : 1"), "\(copy)")
        #expect(try isSame(limited.image, target))
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
