// Remote disks over TLS: who is believed, who is not, and that nothing is ever said in clear text instead.
import Glibc
import Testing

@Suite struct RemoteTLSTests {
    /// A read-only nbdkit that requires TLS.
    private func nbdkit(_ image: String, _ options: [String], in folder: Folder) throws -> Peer {
        let socket = folder.file("nbdkit")
        return try Peer(
            "nbdkit", ["-f", "-U", socket, "-r", "--tls=require"] + options + ["file", image], socket: socket)
    }

    private func fingerprint(_ directory: String, _ algorithm: String = "sha256") throws -> String {
        let path = "\(try Certificates.made()[directory])/server-cert.pem"
        let line = try run("openssl", "x509", "-in", path, "-noout", "-fingerprint", "-\(algorithm)").lines[0]
        return "\(algorithm):\(line.split(separator: "=").last ?? "")"
    }

    @Test func `certificates and keys open what nbdkit serves`() throws {
        let folder = try Folder()
        let image = try folder.image("disk")
        let made = try Certificates.made()
        do {
            let peer = try nbdkit(
                image, ["--tls-certificates=\(made["server"])", "--tls-verify-peer"], in: folder)
            let uri = try Access.certificate("client").uri(socket: peer.socket)
            #expect(try run("diskgate", "checksum", uri).text.hasPrefix(try checksum(image)))
            #expect(try run("diskgate", "info", uri).text.contains("TLSv1.3"))
        }
        let peer = try nbdkit(image, ["--tls-psk=\(made.psk())"], in: folder)
        let uri = try Access.key("backup").uri(socket: peer.socket)
        #expect(try run("diskgate", "checksum", uri).text.hasPrefix(try checksum(image)))
    }

    @Test func `certificates open what qemu-nbd serves, for writing, too`() throws {
        let folder = try Folder()
        let image = try folder.image("disk", size: 8 << 20)
        let target = try folder.filled("target", size: 8 << 20)
        let socket = folder.file("qemu")
        let peer = try Peer(
            "qemu-nbd",
            [
                "-t", "-e", "4", "-f", "raw", "-k", socket, "--object",
                "tls-creds-x509,id=tls,endpoint=server,dir=\(try Certificates.made()["server"]),verify-peer=yes",
                "--tls-creds", "tls", target,
            ], socket: socket)
        let uri = try Access.certificate("client").uri(socket: peer.socket)
        try serving(["--writable", uri], in: folder) { (gateway) throws in
            try run("nbdcopy", "--flush", image, gateway.uri())
        }
        peer.kill()
        #expect(try isSame(image, target))
    }

    @Test func `our own two sides work together, and large copies arrive`() throws {
        let folder = try Folder()
        let image = try folder.image("disk", size: 64 << 20)
        for access in [Access.certificate("client"), .key("backup")] {
            try serving(try Gateway.tls() + ["--tls", "require", image], in: folder) { (gateway) throws in
                let uri = try access.uri(socket: gateway.socket)
                #expect(try run("diskgate", "checksum", uri).text.hasPrefix(try checksum(image)))
                let copy = try folder.filled("copy", size: 64 << 20)
                let inner = try Folder()
                try serving([uri], in: inner) { (second) throws in try run("nbdcopy", second.uri(), copy) }
                #expect(try isSame(image, copy))
            }
        }
    }

    @Test(arguments: [
        "wrong-host", "expired", "not-yet-valid", "revoked", "self-signed", "other-ca",
    ])
    func `a server with a bad certificate is refused`(directory: String) throws {
        let folder = try Folder()
        let image = try folder.image("disk", size: 1 << 20)
        let peer = try nbdkit(image, ["--tls-certificates=\(try Certificates.made()[directory])"], in: folder)
        let failed = try attempt(
            "diskgate", "info", try Access.certificate("client").uri(socket: peer.socket))
        #expect(failed.status == 1 && failed.errors.contains("TLS"), "\(failed.errors)")
    }

    @Test(arguments: [("wrong", "backup"), ("unknown", "stranger")])
    func `a key that the server does not have is refused`(file: String, identity: String) throws {
        let folder = try Folder()
        let image = try folder.image("disk", size: 1 << 20)
        let peer = try nbdkit(image, ["--tls-psk=\(try Certificates.made().psk())"], in: folder)
        let failed = try attempt(
            "diskgate", "info", try Access.key(identity, file: file).uri(socket: peer.socket))
        #expect(failed.status == 1 && failed.errors.contains("TLS"), "\(failed.errors)")
    }

    @Test func `clear text is neither fallen back to nor taken for TLS`() throws {
        let folder = try Folder()
        let image = try folder.image("disk", size: 1 << 20)
        let plain = try Peer.nbdkit("-r", "file", image, in: folder)
        let refused = try attempt("diskgate", "info", try Access.certificate("client").uri(socket: plain.socket))
        #expect(refused.status == 1 && refused.errors.contains("no TLS"), "\(refused.errors)")
        plain.kill()
        let secure = try nbdkit(image, ["--tls-psk=\(try Certificates.made().psk())"], in: folder)
        let told = try attempt("diskgate", "info", secure.uri())
        #expect(told.status == 1 && told.errors.contains("nbds"), "\(told.errors)")
    }

    @Test func `a fingerprint is enough, and has to be the right one`() throws {
        let folder = try Folder()
        let image = try folder.image("disk", size: 1 << 20)
        let peer = try nbdkit(image, ["--tls-certificates=\(try Certificates.made()["self-signed"])"], in: folder)
        let uri = "nbds+unix:///?socket=\(peer.socket)"
        for algorithm in ["sha256", "sha1"] {
            let right = try fingerprint("self-signed", algorithm)
            #expect(try run("diskgate", "checksum", "\(uri)&fingerprint=\(right)").text.hasPrefix(checksum(image)))
            _ = try run("diskgate", "info", "--fingerprint", right, uri)
            let wrong = try fingerprint("server", algorithm)
            for arguments in [["\(uri)&fingerprint=\(wrong)"], ["--fingerprint", wrong, uri]] {
                let failed = try Tool.diskgate.run(["info"] + arguments)
                #expect(failed.status == 1 && failed.errors.contains("pinned"), "\(failed.errors)")
            }
            _ = try run("diskgate", "info", "\(uri)&fingerprint=\(wrong),\(right)")
            // The command line narrows what the URI allows, and adds nothing to it.
            _ = try run("diskgate", "info", "--fingerprint", right, "\(uri)&fingerprint=\(wrong),\(right)")
            for (outer, inner) in [(wrong, right), (right, wrong)] {
                let failed = try Tool.diskgate.run(["info", "--fingerprint", outer, "\(uri)&fingerprint=\(inner)"])
                #expect(failed.status == 1 && failed.errors.contains("pinned"), "\(failed.errors)")
            }
        }
        let unverified = try attempt("diskgate", "info", uri)
        #expect(unverified.status == 1, "\(unverified.text)")
        _ = try run("diskgate", "info", "\(uri)&tls-verify-peer=false")
    }

    @Test func `a fingerprint without TLS is an error`() throws {
        let folder = try Folder()
        let image = try folder.image("disk", size: 1 << 20)
        let pin = try fingerprint("server")
        for source in [image, "nbd+unix:///?socket=\(folder.file("none"))"] {
            let failed = try attempt("diskgate", "info", "--fingerprint", pin, source)
            #expect(failed.status == 1 && failed.errors.contains("nbds"), "\(failed.errors)")
        }
    }

    /// The first connection is shown one certificate, every other one another: whether the first one was pinned, or
    /// nothing is checked.
    @Test(arguments: [true, false])
    func `a server that changes its certificate between connections is refused`(isPinned: Bool) throws {
        let folder = try Folder()
        let image = try folder.image("disk", size: 1 << 20)
        let made = try Certificates.made()
        let pin = try fingerprint("server")
        let first = try nbdkit(image, ["--tls-certificates=\(made["server"])"], in: folder)
        let trust = isPinned ? "fingerprint=\(pin)" : "tls-verify-peer=false"
        let uri = "nbds+unix:///?socket=\(first.socket)&\(trust)"
        try serving([uri], in: folder) { (gateway) throws in
            try run("qemu-io", "-r", "-f", "raw", "-c", "read 0 64k", gateway.uri())
            first.kill()
            let other = try nbdkit(image, ["--tls-certificates=\(made["server-next"])"], in: folder)
            for _ in 0..<2 {
                let failed = try attempt("qemu-io", "-r", "-f", "raw", "-c", "read 0 64k", gateway.uri())
                #expect(failed.status != 0 || failed.text.contains("failed"), "\(failed.text)")
            }
            other.kill()
        }
    }
}
