// VMDKs through the command: served, mapped, copied from and written, as other programs see them.
import Glibc
import Testing

@Suite struct VMDKTests {
    /// Past what one grain table maps, and no whole number of grains.
    private static let size = (40 << 20) + 1536

    private func makeChain(_ folder: Folder) throws -> (raw: String, top: String) {
        let raw = try folder.image("disk.raw", size: Self.size)
        try run("qemu-img", "convert", "-f", "raw", "-O", "vmdk", raw, folder.file("base.vmdk"))
        for (name, parent, command) in [
            ("middle", "base", "write -P 5 3M 2M"), ("top", "middle", "write -P 6 4M 300k"),
        ] {
            try run(
                "qemu-img", "create", "-q", "-f", "vmdk", "-b", folder.file("\(parent).vmdk"), "-F", "vmdk",
                folder.file("\(name).vmdk"))
            try run("qemu-io", "-f", "vmdk", "-c", command, folder.file("\(name).vmdk"))
        }
        return (raw, folder.file("top.vmdk"))
    }

    @Test(arguments: [
        "monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "streamOptimized",
    ])
    func `a disk of every kind is served as it is`(_ kind: String) throws {
        let folder = try Folder()
        let raw = try folder.image("disk.raw", size: Self.size)
        let disk = folder.file("disk.vmdk")
        try run("qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=\(kind)", raw, disk)
        try serving([disk], in: folder) { (gateway) throws in
            try run("nbdcopy", gateway.uri(), try folder.filled("copy", size: Self.size))
            #expect(try isSame(raw, folder.file("copy")))
            // What is called a hole or zeros is zeros; what has data lies where qemu has it.
            try run("qemu-img", "compare", "-f", "raw", "-F", "raw", gateway.uri(), raw)
            let map = try run("nbdinfo", "--map", gateway.uri()).lines
            #expect(map.count > 3 && map.contains { $0.hasSuffix("hole,zero") })
        }
        #expect(try checksum(raw) == String(run("diskgate", "checksum", disk).text.prefix(64)))
        let told = try run("diskgate", "info", disk).text
        #expect(told.contains("format:          vmdk") && told.contains(kind), "\(told)")
    }

    @Test func `a chain is served as qemu converts it`() throws {
        let folder = try Folder()
        let (_, top) = try makeChain(folder)
        let expected = folder.file("expected")
        try run("qemu-img", "convert", "-f", "vmdk", "-O", "raw", top, expected)
        try serving([top], in: folder) { (gateway) throws in
            try run("nbdcopy", gateway.uri(), try folder.filled("copy", size: Self.size))
            #expect(try isSame(expected, folder.file("copy")))
            let depths = try run("nbdinfo", "--map=qemu:allocation-depth", gateway.uri()).lines
            #expect(depths.contains { $0.contains(" 1 ") } && depths.contains { $0.contains(" 3 ") }, "\(depths)")
        }
        // A change of the base makes another disk of it.
        try run("qemu-io", "-f", "vmdk", "-c", "write -P 9 0 64k", folder.file("base.vmdk"))
        let outcome = try attempt("diskgate", "info", top)
        #expect(outcome.status == 1 && outcome.errors.contains("content id"), "\(outcome)")
    }

    @Test func `parents in other directories are opened where the user allows it`() throws {
        let folder = try Folder()
        mkdir(folder.file("vm"), 0o700)
        mkdir(folder.file("templates"), 0o700)
        let base = folder.file("templates/base.vmdk")
        try run("qemu-img", "create", "-q", "-f", "vmdk", base, "8M")
        try run("qemu-img", "create", "-q", "-f", "vmdk", "-b", base, "-F", "vmdk", folder.file("vm/a.vmdk"))
        let refused = try attempt("diskgate", "info", folder.file("vm/a.vmdk"))
        #expect(refused.status == 1 && refused.errors.contains("--image-directory"), "\(refused)")
        try run("diskgate", "info", folder.file("vm/a.vmdk"), "--image-directory", folder.file("templates"))
    }

    @Test func `a guest that writes a descriptor into its flat disk opens no other file`() throws {
        let folder = try Folder()
        let text =
            "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"x\"\nRW 8 FLAT \"secret\" 0\n"
        for name in ["secret", "disk-flat.vmdk", "disk-f001.vmdk", "disk"] { _ = try folder.filled(name, size: 4096) }
        for name in ["disk-flat.vmdk", "disk-f001.vmdk", "disk"] {
            let path = folder.file(name)
            try run("sh", "-c", "printf '%s' '\(text)' | dd of='\(path)' conv=notrunc status=none")
            let outcome = try attempt("diskgate", "info", path)
            let isRaw = outcome.status == 0 && outcome.text.contains("format:          raw")
            #expect(name == "disk" ? outcome.status == 1 : isRaw, "\(outcome)")
        }
    }

    @Test func `a disk in one file is read from a server, and none is written`() throws {
        let folder = try Folder()
        let raw = try folder.image("disk.raw", size: Self.size)
        let disk = folder.file("disk.vmdk")
        try run("qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", raw, disk)
        try serving(["file:\(disk)?format=raw"], in: folder) { (gateway) throws in
            let sum = try run("diskgate", "checksum", gateway.uri() + "&format=vmdk").text.prefix(64)
            #expect(try checksum(raw) == String(sum))
        }
        let outcome = try attempt("diskgate", "serve", disk, "--writable", "--run", "true")
        #expect(outcome.status == 1 && outcome.errors.contains("overlay"), "\(outcome)")
        try serving([disk, "--overlay"], in: folder) { (gateway) throws in
            try run("qemu-io", "-f", "raw", "-c", "write -P 5 1M 64k", "-c", "read -P 5 1M 64k", gateway.uri())
        }
    }

    // MARK: - Writing

    @Test(arguments: [[], ["--verify"]])
    func `a copy as stream-optimised VMDK is read by others`(_ options: [String]) throws {
        let folder = try Folder()
        let raw = try folder.image("disk.raw", size: Self.size)
        let image = folder.file("disk.vmdk")
        try run("diskgate", "copy", raw, image, with: ["--to-format", "stream-optimized-vmdk"] + options)
        try run("qemu-img", "check", "-q", "-f", "vmdk", image)
        try run("qemu-img", "compare", "-f", "vmdk", "-F", "raw", image, raw)
        #expect(try run("vmdkinfo", image).text.contains("Stream optimized"))
        #expect(access("\(image).partial", F_OK) != 0)
        // There is no second one by mistake, and the same disk gives the same bytes but for its content id.
        let again = try attempt("diskgate", "copy", raw, image, "--to-format", "stream-optimized-vmdk")
        #expect(again.status == 1 && again.errors.contains("--force"))
        let first = folder.file("first.vmdk")
        try run("mv", image, first)
        let other = try folder.filled("disk.vmdk", size: 4096)
        try run("diskgate", "copy", raw, other, with: ["--to-format", "stream-optimized-vmdk", "--force"])
        let compare = "cmp -l '\(first)' '\(image)' | awk '{ print $1 }'"
        let places = try run("sh", "-c", compare).lines.compactMap { Int($0) }
        let reach = (places.max() ?? 0) - (places.min() ?? 0)
        #expect(!places.isEmpty && reach < 8 && places.allSatisfy { (513...1024).contains($0) }, "\(places)")
    }

    @Test func `a copy of a server as stream-optimised VMDK goes to a pipe`() throws {
        let folder = try Folder()
        let (_, top) = try makeChain(folder)
        let image = try folder.filled("out.vmdk", size: 4096)
        try serving([top], in: folder) { (gateway) throws in
            try run(
                "sh", "-c",
                "\(Tool.diskgate.path) copy '\(gateway.uri())' - --to-format stream-optimized-vmdk | cat > '\(image)'")
        }
        try run("qemu-img", "compare", "-f", "vmdk", "-F", "vmdk", image, top)
    }

    @Test func `a copy that fails leaves no image`() throws {
        let folder = try Folder()
        let raw = try folder.image("disk.raw", size: Self.size)
        let image = folder.file("disk.vmdk")
        let leavesNothing = { access(image, F_OK) != 0 && access("\(image).partial", F_OK) != 0 }
        let format = ["--to-format", "stream-optimized-vmdk"]
        let refused = try Tool.diskgate.run(["copy", raw, image, "--resume"] + format)
        #expect(refused.status == 1 && leavesNothing(), "\(refused)")
        // The source fails when a good part of the image is written.
        try serving(["--fault", "read-error@24M-36M", raw], in: folder) { (gateway) throws in
            let copy = ["copy", gateway.uri(), image, "--retries", "0"] + format
            let failed = try Tool.diskgate.run(copy)
            #expect(failed.status == 1 && failed.errors.contains("injected error"), "\(failed)")
            #expect(leavesNothing())
            // Nor does it harm the image that it was to replace.
            let old = try folder.filled("disk.vmdk", size: 4096)
            let sum = try checksum(old)
            let again = try Tool.diskgate.run(copy + ["--force"])
            #expect(again.status == 1 && access("\(image).partial", F_OK) != 0, "\(again)")
            #expect(try checksum(old) == sum)
        }
    }
}
