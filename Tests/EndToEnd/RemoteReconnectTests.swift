// Remote disks whose server goes away and comes back, while they are read and written.
import Glibc
import Testing

@Suite struct RemoteReconnectTests {
    @Test func `reading goes on when the server was restarted`() throws {
        let folder = try Folder()
        let image = try folder.image("disk")
        let peer = try Peer.nbdkit("-r", "--filter=delay", "file", image, "rdelay=20ms", in: folder)
        let copy = try folder.filled("copy")
        try serving([peer.uri()], in: folder) { (gateway) throws in
            let output = try namelessFile()
            defer { close(output) }
            let reader = try Tool("nbdcopy").start(
                ["--request-size=65536", "--requests=1", "-C", "1", gateway.uri(), copy], output: output,
                errors: output)
            for _ in 0..<3 {
                usleep(400_000)
                peer.kill()
                usleep(300_000)
                try peer.start()
            }
            let status = try waitForEnd(of: reader, what: "nbdcopy")
            let said = String(decoding: try content(of: output), as: UTF8.self)
            #expect(status == 0, "\(said)")
        }
        #expect(try isSame(image, copy))
    }

    @Test func `writing goes on, and a flush tells once that writes may be lost`() throws {
        let folder = try Folder()
        let target = try folder.filled("target", size: 4 << 20)
        let peer = try Peer.nbdkit("file", target, in: folder)
        try serving(["--writable", peer.uri()], in: folder) { (gateway) throws in
            let script = """
                h = nbd.NBD()
                h.connect_uri(sys.argv[1])
                h.pwrite(b"1" * 65536, 0)
                h.flush()
                h.pwrite(b"2" * 65536, 65536)
                os.kill(int(sys.argv[2]), 9)
                os.unlink(sys.argv[3])
                os.system(sys.argv[4] + " &")
                h.pwrite(b"3" * 65536, 131072)
                try:
                    h.flush()
                    raise SystemExit("the flush did not tell of the loss")
                except nbd.Error as error:
                    assert error.errnum == errno.EIO, error
                h.pwrite(b"2" * 65536, 65536)
                h.flush()
                assert h.pread(196608, 0) == b"1" * 65536 + b"2" * 65536 + b"3" * 65536
                h.shutdown()
                """
            let again = "nbdkit -f -U \(peer.socket) file \(target) >/dev/null 2>&1"
            _ = try python(script, gateway.uri(), "\(peer.processID)", peer.socket, "timeout 60 \(again)")
        }
    }

    @Test func `a disk of another size is not taken for the same`() throws {
        let folder = try Folder()
        let image = try folder.image("disk", size: 8 << 20)
        let peer = try Peer.nbdkit("-r", "file", image, in: folder)
        try serving([peer.uri()], in: folder) { (gateway) throws in
            try run("qemu-io", "-r", "-f", "raw", "-c", "read 0 64k", gateway.uri())
            peer.kill()
            truncate(image, 12 << 20)
            try peer.start()
            for _ in 0..<2 {
                let failed = try python(
                    """
                    h = nbd.NBD()
                    h.connect_uri(sys.argv[1])
                    try:
                        h.pread(65536, 0)
                        raise SystemExit("another disk was read")
                    except nbd.Error as error:
                        print(error)
                    """, gateway.uri())
                #expect(!failed.text.isEmpty)
            }
        }
    }

    @Test func `a server that stays away is an error in time`() throws {
        let folder = try Folder()
        let image = try folder.image("disk", size: 1 << 20)
        let peer = try Peer.nbdkit("-r", "file", image, in: folder)
        for parameter in ["reconnect=1", "reconnect=0"] {
            try serving([peer.uri("", parameter)], in: folder) { (gateway) throws in
                peer.kill()
                let failed = try attempt(
                    "qemu-io", "-r", "-f", "raw", "-c", "read 0 64k", gateway.uri())
                #expect(failed.status != 0)
                try peer.start()
            }
        }
    }

    @Test func `a server that does not answer is an error in time`() throws {
        let folder = try Folder()
        let image = try folder.image("disk", size: 1 << 20)
        let peer = try Peer.nbdkit("-r", "--filter=delay", "file", image, "rdelay=60", in: folder)
        let failed = try attempt("diskgate", "checksum", peer.uri("", "timeout=1", "reconnect=0"))
        #expect(failed.status == 1 && failed.errors.contains("no answer"), "\(failed.errors)")
    }
}
