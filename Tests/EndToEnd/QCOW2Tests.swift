// qcow2 images and partitions through `serve`: what qemu-img made compares equal over NBD, map and bitmaps included.
import Testing

@Suite struct QCOW2Tests {
    @Test(arguments: [
        ["-o", "cluster_size=512"], ["-o", "cluster_size=2M"], ["-o", "compat=0.10"], ["-c"],
        ["-c", "-o", "compression_type=zstd"], ["-o", "extended_l2=on,cluster_size=128k"],
        ["-o", "preallocation=metadata"], ["-o", "lazy_refcounts=on"],
    ])
    func `an image of every kind compares equal`(_ options: [String]) throws {
        let folder = try Folder()
        let raw = try folder.image("disk")
        let image = folder.file("disk.qcow2")
        let made = try Tool("qemu-img").run(["convert", "-f", "raw", "-O", "qcow2"] + options + [raw, image])
        #expect(made.status == 0, "\(made.errors)")
        try serving([image], in: folder) { (gateway) throws in
            try run("qemu-img", "compare", "-f", "raw", "-F", "raw", gateway.uri(), raw)
            try run("nbdcopy", gateway.uri(), try folder.filled("copy"))
            #expect(try isSame(raw, folder.file("copy")))
        }
        #expect(try run("diskgate", "checksum", image).text.prefix(64) == run("sha256sum", raw).text.prefix(64))
    }

    @Test func `a chain with zeros and discards over data compares equal, with the depths qemu-nbd tells`() throws {
        let folder = try Folder()
        let base = try folder.image("base")
        let (middle, top) = (folder.file("middle.qcow2"), folder.file("top.qcow2"))
        try run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", middle)
        try run(
            "qemu-io", "-f", "qcow2", "-c", "write -P 1 1M 2M", "-c", "write -z 5M 1M", "-c", "discard 7M 1M", middle)
        try run("qemu-img", "create", "-q", "-f", "qcow2", "-b", middle, "-F", "qcow2", top)
        try run("qemu-io", "-f", "qcow2", "-c", "write -P 2 2M 2M", "-c", "write -z 0 512k", top)
        let expected = folder.file("expected")
        try run("qemu-img", "convert", "-O", "raw", top, expected)
        try serving([top], in: folder) { (gateway) throws in
            try run("qemu-img", "compare", "-f", "raw", "-F", "raw", gateway.uri(), expected)
            let ours = try run("nbdinfo", "--map=qemu:allocation-depth", gateway.uri()).lines
            let theirs = try run(
                "nbdinfo", "--map=qemu:allocation-depth", "--", "[", "qemu-nbd", "-r", "-A", "-f", "qcow2", top, "]"
            ).lines
            #expect(ours == theirs)
        }
    }

    @Test func `a dirty bitmap is served under the name QEMU gives it`() throws {
        let folder = try Folder()
        let image = folder.file("disk.qcow2")
        try run("qemu-img", "create", "-q", "-f", "qcow2", image, "16M")
        try run("qemu-img", "bitmap", "--add", "-g", "64k", image, "since")
        try run("qemu-io", "-f", "qcow2", "-c", "write 1M 192k", "-c", "write 8M 1", image)
        try serving([image], in: folder) { (gateway) throws in
            let map = try run("nbdinfo", "--map=qemu:dirty-bitmap:since", gateway.uri()).lines
            let fields = map.map { $0.split(separator: " ").map(String.init) }
            #expect(
                fields.filter { $0.count > 2 && $0[2] == "1" }.map { Array($0[..<2]) }
                    == [["1048576", "196608"], ["8388608", "65536"]])
        }
    }

    @Test func `an image over a partitioned disk gives its partition`() throws {
        let folder = try Folder()
        let raw = try folder.image("disk")
        try run(
            "sh", "-c",
            "printf 'label: gpt\\nstart=2048, size=8192\\nstart=10240, size=4096\\n' | "
                + "PATH=$PATH:/sbin sfdisk -q '\(raw)'"
        )
        let image = folder.file("disk.qcow2")
        try run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image)
        try run("sh", "-c", "dd if='\(raw)' of='\(folder.file("part"))' bs=512 skip=10240 count=4096 status=none")
        try serving([image, "--partition", "2", "--overlay"], in: folder) { (gateway) throws in
            try run("qemu-img", "compare", "-f", "raw", "-F", "raw", gateway.uri(), folder.file("part"))
            try run("qemu-io", "-f", "raw", "-c", "write -P 5 1M 64k", "-c", "read -P 5 1M 64k", gateway.uri())
        }
        try run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", image, raw)
    }

    @Test func `a qcow2 header that a guest wrote into its raw disk opens no other file`() throws {
        let folder = try Folder()
        let secret = folder.file("secret")
        try run("sh", "-c", "printf 'top secret' > '\(secret)'; truncate -s 1M '\(secret)'")
        for name in ["disk.img", "disk.raw", "disk"] {
            let disk = folder.file(name)
            try run("qemu-img", "create", "-q", "-f", "qcow2", "-b", secret, "-F", "raw", disk)
            let info = try attempt("diskgate", "info", disk)
            if name == "disk" {
                #expect(info.status == 1 && info.errors.contains("format="))
            } else {
                #expect(info.status == 0 && info.text.contains("raw"))
            }
            let content = try attempt("diskgate", "cat", disk)
            #expect(!content.text.contains("top secret"))
        }
    }
}
