// libnbd with its strict mode off: what a careless or hostile client may send, and that the server serves on.
import Testing

@Suite struct AttackTests {
    /// A function that tells the errno of a call, 0 where it went well.
    static let prelude = """
        def why(call):
            try:
                call()
                return 0
            except nbd.Error as error:
                return error.errnum
        def connect(uri, contexts=True):
            h = nbd.NBD()
            h.set_strict_mode(0)
            if contexts: h.add_meta_context("base:allocation")
            h.connect_uri(uri)
            return h
        h = connect(sys.argv[1])
        size = h.get_size()
        def expect(call, *numbers):
            got = why(call)
            assert got in numbers, (got, numbers)

        """

    private func attack(_ access: [String], _ script: String) throws {
        let folder = try Folder()
        let image = try folder.image("disk")
        try serving(access + [image], in: folder) { (gateway) throws in
            _ = try python(Self.prelude + script, gateway.uri())
            #expect(try run("nbdinfo", "--size", gateway.uri()).lines == ["\(24 << 20)"])
        }
    }

    @Test func `bounds of a read-only export`() throws {
        try attack(
            [],
            """
            for offset, length in [(size, 1), (size - 1, 2), (2**63 - 512, 512), (2**64 - 1, 1), (0, 0)]:
                expect(lambda: h.pread(length, offset), errno.EINVAL)
                expect(lambda: h.cache(length, offset), errno.EINVAL)
            expect(lambda: h.pwrite(b"x" * 70000, 0), errno.EPERM)
            expect(lambda: h.pwrite(b"x" * 70000, size), errno.EPERM)
            expect(lambda: h.trim(4096, 0), errno.EPERM)
            expect(lambda: h.zero(4096, 0), errno.EPERM)
            h.flush()
            h.shutdown()
            """)
    }

    @Test func `bounds of a writable export`() throws {
        try attack(
            ["--writable"],
            """
            for offset, length in [(size, 1), (size - 1, 2), (2**63 - 512, 512), (2**64 - 1, 1)]:
                expect(lambda: h.pwrite(b"x" * length, offset), errno.ENOSPC)
                expect(lambda: h.zero(length, offset), errno.ENOSPC)
                expect(lambda: h.trim(length, offset), errno.EINVAL)
                expect(lambda: h.pread(length, offset), errno.EINVAL)
            expect(lambda: h.pwrite(b"", 0), errno.EINVAL)
            expect(lambda: h.pwrite(b"x" * 511, 513, 0xFFFF), 0, errno.EINVAL)
            h.pwrite(b"hello", 4095)
            assert h.pread(5, 4095) == b"hello"
            h.shutdown()
            """)
    }

    @Test func `sizes and flags that nobody should ask for`() throws {
        try attack(
            [],
            """
            expect(lambda: h.pread(64 * 1024 * 1024 + 1, 0), errno.EINVAL, errno.ERANGE, errno.EOVERFLOW)
            expect(lambda: h.pread(512, 0, 0xFFFF), 0, errno.EINVAL)
            expect(lambda: h.block_status(2**32 - 1, 1, lambda *a: 0), errno.EINVAL)
            expect(lambda: h.block_status(0, 0, lambda *a: 0), errno.EINVAL)
            expect(lambda: h.block_status(size, 0, lambda *a: 0, 0xFFFF), 0, errno.EINVAL)
            g = connect(sys.argv[1], False)
            expect(lambda: g.block_status(512, 0, lambda *a: 0), errno.EINVAL, errno.ENOTSUP)
            g.shutdown()
            h.shutdown()
            """)
    }

    @Test func `CVE-2025-47711: block status of 2^32-1 on an 8 GiB disk`() throws {
        let folder = try Folder()
        try serving(["pattern:8G?seed=1&allocated=100%"], in: folder) { (gateway) throws in
            _ = try python(
                Self.prelude + """
                    for offset in [0, 1, 511, 4095, 2**32 - 1, 2**32, 2**32 + 1]:
                        for length in [2**32 - 1, 2**32 - 2, 2**31, 2**31 + 1]:
                            if offset + length > size: continue
                            seen = []
                            h.block_status(length, offset, lambda name, at, extents, error: seen.extend(extents) or 0)
                            assert seen == [length, 0], (offset, length, seen)
                    h.shutdown()

                    """, gateway.uri())
        }
    }

    @Test func `clients that queue reads and vanish, again and again`() throws {
        try attack(
            ["--delay-read", "5"],
            """
            for round in range(40):
                g = connect(sys.argv[1])
                buffers = [nbd.Buffer(262144) for _ in range(32)]
                for index, buffer in enumerate(buffers): g.aio_pread(buffer, index * 4096 if index % 8 else 2**62)
                if round % 2: g.poll(0)
                os.close(os.dup(g.aio_get_fd()))
                del g
            h.pread(512, 0)
            h.shutdown()
            """)
    }
}
