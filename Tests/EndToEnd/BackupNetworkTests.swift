// Backups of a QEMU whose monitor is at the other end of a network: over TLS, in clear text only where that is said.
import Glibc
import Testing

/// A machine with a monitor at a TCP port, and with certificates to serve its disks with.
private struct RemoteSite {
    var site: Site
    let (monitor, disks): (String, String)

    init(_ options: String = "") throws {
        let ports = try freePorts(2)
        (monitor, disks) = (ports[0], ports[1])
        let server = try Certificates.made()["server"]
        site = try Site(options: [
            "-qmp", "tcp:127.0.0.1:\(monitor),server=on,wait=off\(options)",
            "-object", "tls-creds-x509,id=tls0,endpoint=server,dir=\(server),verify-peer=yes",
        ])
        let scratch = site.folder.file("scratch")
        mkdir(scratch, 0o700)
        site.uri = "qmp+tcp:127.0.0.1:\(monitor)?nbd=127.0.0.1:\(disks)&scratch=\(scratch)"
    }
}

@Suite struct BackupNetworkTests {
    @Test func `disks come over TLS, full and then what has changed`() throws {
        var remote = try RemoteSite()
        let client = try Certificates.made()["client"]
        let plain = remote.site.uri
        remote.site.uri += "&tls-creds=tls0&tls-certificates=\(client)"
        let first = try remote.site.machine.snapshot("first")
        let full = try remote.site.backup()
        #expect(full.status == 0 && full.text.contains("over nbdssl"), "\(full)")
        #expect(try remote.site.restores("1", to: first))
        try remote.site.machine.io(changes(1))
        let moment = try remote.site.machine.snapshot("moment")
        let next = try remote.site.backup()
        #expect(next.status == 0 && next.text.contains("incremental"), "\(next)")
        #expect(try remote.site.restores("2", to: moment))
        // Only the scratch file stays, which nobody here can remove.
        #expect(try remote.site.machine.leftovers() == [] && remote.site.machine.bitmaps().count == 1)
        #expect(try run("ls", remote.site.folder.file("scratch")).text == "diskgate-scratch-vda.qcow2\n")
        // Neither without a certificate, nor with one that the server does not know.
        for other in ["", "&tls-certificates=\(try Certificates.made()["other-ca"])"] {
            remote.site.uri = plain + "&tls-creds=tls0" + other
            let refused = try remote.site.backup()
            #expect(refused.status == 1 && refused.text.contains("without a restore point"), "\(refused)")
            #expect(try remote.site.machine.leftovers() == [] && remote.site.doctor().status == 0)
        }
    }

    @Test func `a run over the network that was killed is given back over it`() throws {
        let remote = try RemoteSite()
        try remote.site.requireBackup()
        try remote.site.machine.io(changes(2))
        let killed = try remote.site.backup(environment: ["DISKGATE_STEP_KILL=run.disk-copied"])
        #expect(killed.status == 128 + SIGKILL)
        #expect(try remote.site.machine.leftovers().count > 1)
        let fixed = try remote.site.doctor("--fix")
        #expect(fixed.status == 0, "\(fixed)")
        #expect(try remote.site.machine.leftovers() == [] && remote.site.halves == [])
        try remote.site.requireBackup()
        #expect(try remote.site.restores("latest", to: try remote.site.machine.snapshot("now")))
    }

    @Test func `disks of a host of the inventory take its sessions`() throws {
        var remote = try RemoteSite()
        remote.site.uri += "&tls-creds=tls0&tls-certificates=\(try Certificates.made()["client"])"
        var inventory = InventoryFile(in: remote.site.folder)
        inventory.host = #""name": "lab", "addresses": ["127.0.0.1"], "kind": "qemu", "sessionLimit": 0"#
        try inventory.store()
        let refused = try remote.site.backup(environment: inventory.environment)
        #expect(refused.status == 1 && refused.text.contains("a session of host lab: its limit is 0"), "\(refused)")
        #expect(try remote.site.machine.leftovers() == [] && remote.site.doctor().status == 0)
        inventory.host = #""name": "lab", "addresses": ["127.0.0.1"], "kind": "qemu", "sessionLimit": 1"#
        try inventory.store()
        let done = try remote.site.backup(environment: inventory.environment)
        #expect(done.status == 0 && done.text.contains("over nbdssl"), "\(done)")
    }

    @Test func `what does not work over the network is refused, and says what does`() throws {
        let remote = try RemoteSite(",tls-creds=tls0")
        // A monitor that wants TLS.
        let refused = try remote.site.backup()
        #expect(refused.status == 1 && refused.text.contains("SSH tunnel"), "\(refused)")
        // Disks in clear text to another machine, unless somebody says so.
        for (uri, reason) in [
            ("qmp+tcp:192.0.2.1:4444?nbd=192.0.2.1:10809&scratch=/var/tmp", "in clear text"),
            ("qmp+tcp:192.0.2.1:4444", "nbd=HOST:PORT"),
            ("libvirt:qemu+ssh://192.0.2.1/system/vm", "nbd=HOST:PORT"),
            ("libvirt:qemu+ssh://192.0.2.1/system/vm?nbd=192.0.2.1:10809&scratch=/var/tmp", "in clear text"),
        ] {
            var site = remote.site
            site.uri = uri
            let outcome = try site.backup()
            #expect(outcome.status == 1 && outcome.text.contains(reason), "\(outcome)")
        }
    }
}
