// qemu-img as a client: info, map, compare, check, convert to qcow2 and back.
import Testing

@Suite struct QEMUImgTests {
    @Test func `info, map and check speak of the same disk`() throws {
        let folder = try Folder()
        let image = try folder.image("disk")
        try serving([image], in: folder) { (gateway) throws in
            let info = try run("qemu-img", "info", "--output=json", "-f", "raw", gateway.uri()).text
            #expect(info.contains("\"virtual-size\": \(24 << 20)"))
            func map(_ source: String) throws -> [String] {
                try run("qemu-img", "map", "--output=json", "-f", "raw", source).lines
                    .map { line in
                        line.split(separator: ",").filter { !$0.contains("offset") && !$0.contains("present") }.joined()
                    }
            }
            let theirs = try map(image)
            #expect(try map(gateway.uri()) == theirs)
            // A raw disk has nothing to check, which qemu-img tells with its own status.
            #expect(try attempt("qemu-img", "check", "-f", "raw", gateway.uri()).status == 63)
        }
    }

    @Test func `compare sees equal disks and a single other byte`() throws {
        let folder = try Folder()
        let image = try folder.image("disk")
        let other = try folder.image("other")
        try run("sh", "-c", "printf x | dd of='\(other)' bs=1 seek=20000001 conv=notrunc status=none")
        try serving([image], in: folder) { (gateway) throws in
            try run("qemu-img", "compare", "-f", "raw", "-F", "raw", gateway.uri(), image)
            let outcome = try attempt("qemu-img", "compare", "-f", "raw", "-F", "raw", gateway.uri(), other)
            #expect(outcome.status == 1)
            #expect(outcome.text.contains("offset 1999") || outcome.text.contains("offset 2000"))
        }
    }

    @Test(arguments: [["-m", "1"], ["-m", "16", "-W"]])
    func `convert to qcow2 keeps every byte`(_ options: [String]) throws {
        let folder = try Folder()
        let image = try folder.image("disk")
        let copy = folder.file("copy.qcow2")
        try serving([image], in: folder) { (gateway) throws in
            let outcome = try Tool("qemu-img").run(
                ["convert"] + options + ["-f", "raw", "-O", "qcow2", gateway.uri(), copy])
            #expect(outcome.status == 0, "\(outcome.errors)")
        }
        try run("qemu-img", "check", copy)
        try run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", image, copy)
    }

    @Test func `a qcow2 image lives on a writable export`() throws {
        let folder = try Folder()
        let target = try folder.filled("target", size: 32 << 20)
        try serving(["--writable", target], in: folder) { (gateway) throws in
            try run("qemu-img", "create", "-f", "qcow2", gateway.uri(), "16M")
            try run("qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 3M", "-c", "flush", gateway.uri())
            try run("qemu-io", "-f", "qcow2", "-c", "read -P 7 1M 3M", "-c", "read -P 0 4M 12M", gateway.uri())
            try run("qemu-img", "check", "-f", "qcow2", gateway.uri())
        }
    }
}
