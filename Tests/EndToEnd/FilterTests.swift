// What lies over a source: an overlay that leaves it alone, faults that are told, limits and delays that lose nothing.
import Glibc
import Testing

@Suite struct FilterTests {
    @Test func `an overlay leaves its source bit-identical`() throws {
        let folder = try Folder()
        let image = try folder.image("disk")
        let other = try folder.image("other", seed: 9)
        let before = try checksum(image)
        try serving(["--overlay", image], in: folder) { (gateway) throws in
            try run("nbdcopy", other, gateway.uri())
            try run("qemu-img", "compare", "-f", "raw", "-F", "raw", other, gateway.uri())
            try run("qemu-io", "-f", "raw", "-c", "discard 0 8M", "-c", "write -z 9M 1M", "-c", "flush", gateway.uri())
        }
        #expect(try checksum(image) == before)
        // What was written is gone with the server.
        try serving(["--overlay", image], in: folder) { (gateway) throws in
            try run("qemu-img", "compare", "-f", "raw", "-F", "raw", image, gateway.uri())
        }
    }

    @Test func `a read error fails the copy at its offset, and nothing else`() throws {
        let folder = try Folder()
        let image = try folder.image("disk")
        try serving(["--fault", "read-error@10M-10241K", image], in: folder) { (gateway) throws in
            let failed = try attempt("nbdcopy", gateway.uri(), "null:")
            #expect(failed.status == 1 && failed.errors.contains("Input/output error"))
            #expect(failed.errors.contains("0x") || failed.errors.contains("offset"), "\(failed.errors)")
            _ = try python(
                """
                h = nbd.NBD()
                h.connect_uri(sys.argv[1])
                expected = open(sys.argv[2], "rb").read()
                for offset in [0, 9 << 20, (10 << 20) - 65536, (10 << 20) + 1024]:
                    assert h.pread(65536, offset) == expected[offset:offset + 65536], offset
                try:
                    h.pread(1024, 10 << 20)
                    assert False
                except nbd.Error as error: assert error.errnum == errno.EIO
                h.shutdown()
                """, gateway.uri(), image)
            #expect(gateway.log.contains("injected error"))
        }
    }

    @Test(arguments: [("write-error", "Input/output error"), ("no-space", "No space left on device")])
    func `a failing write fails the copy`(_ kind: String, _ text: String) throws {
        let folder = try Folder()
        let image = try folder.image("disk")
        let target = try folder.filled("target")
        try serving(["--writable", "--fault", "\(kind)@8M-8193K", target], in: folder) { (gateway) throws in
            let outcome = try attempt("nbdcopy", image, gateway.uri())
            #expect(outcome.status == 1 && outcome.errors.contains(text), "\(outcome.errors)")
        }
    }

    @Test func `a failing flush is told`() throws {
        let folder = try Folder()
        let image = try folder.image("disk")
        let target = try folder.filled("target")
        try serving(["--writable", "--fault", "flush-error", target], in: folder) { (gateway) throws in
            let flushed = try attempt("nbdcopy", "--flush", image, gateway.uri())
            let unflushed = try attempt("nbdcopy", image, gateway.uri())
            #expect(flushed.status == 1 && unflushed.status == 0)
        }
    }

    @Test func `corruption is seen by compare, and nowhere without it`() throws {
        let folder = try Folder()
        let image = try folder.image("disk")
        try serving(["--fault", "corruption@64K-65K", image], in: folder) { (gateway) throws in
            #expect(try attempt("qemu-img", "compare", "-f", "raw", "-F", "raw", gateway.uri(), image).status == 1)
        }
        try run("qemu-img", "compare", "-f", "raw", "-F", "raw", image, image)
    }

    @Test(arguments: [["--limit-rate", "64M"], ["--delay-read", "3"], ["--fault", "read-error@0-1K%0"]])
    func `limits and delays lose nothing`(_ options: [String]) throws {
        let folder = try Folder()
        let image = try folder.image("disk")
        let copy = try folder.filled("copy")
        try serving(options + [image], in: folder) { (gateway) throws in try run("nbdcopy", gateway.uri(), copy) }
        #expect(try isSame(image, copy))
    }

    @Test func `offset, length and sizes show the part that is meant`() throws {
        let folder = try Folder()
        let image = try folder.image("disk")
        try serving(["--offset", "1000001", "--length", "5000003", "--round-size", "64K", image], in: folder) {
            gateway in
            #expect(try run("nbdinfo", "--size", gateway.uri()).lines == ["\(77 * 65536)"])
            try run("nbdcopy", gateway.uri(), folder.file("copy"))
        }
        try run("sh", "-c", "tail -c +1000002 '\(image)' | head -c 5000003 > '\(folder.file("part"))'")
        try run("truncate", "-s", "\(77 * 65536)", folder.file("part"))
        #expect(try isSame(folder.file("copy"), folder.file("part")))
    }

    @Test func `an image that shrinks while it is copied fails the copy`() throws {
        let folder = try Folder()
        let image = try folder.filled("disk")
        try serving(["--limit-rate", "40M", image], in: folder) { (gateway) throws in
            let sink = try namelessFile()
            defer { close(sink) }
            let copy = try folder.filled("copy", with: 0x77)
            let pid = try Tool("nbdcopy").start(["--no-extents", gateway.uri(), copy], output: sink, errors: sink)
            try run("truncate", "-s", "20M", image)
            #expect(try waitForEnd(of: pid, what: "nbdcopy") == 1)
            try run("nbdinfo", gateway.uri())
        }
    }
}
