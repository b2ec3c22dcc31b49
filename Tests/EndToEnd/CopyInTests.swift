// nbdcopy and qemu-img into a writable export.
import Testing

@Suite struct CopyInTests {
    @Test(arguments: [[], ["--synchronous"], ["-C", "1"], ["--no-extents"], ["--request-size=1048576"], ["--flush"]])
    func `nbdcopy fills a writable export`(_ options: [String]) throws {
        let folder = try Folder()
        let image = try folder.image("disk")
        let target = try folder.filled("target")
        try serving(["--writable", target], in: folder) { (gateway) throws in
            let outcome = try Tool("nbdcopy").run(options + [image, gateway.uri()])
            #expect(outcome.status == 0, "\(outcome.errors)")
        }
        #expect(try isSame(image, target))
    }

    @Test(arguments: [["-n"], ["-n", "-W", "-m", "16"], ["-n", "-S", "0"]])
    func `qemu-img convert fills a writable export`(_ options: [String]) throws {
        let folder = try Folder()
        let image = try folder.image("disk")
        let target = try folder.filled("target")
        try serving(["--writable", target], in: folder) { (gateway) throws in
            let outcome = try Tool("qemu-img").run(
                ["convert"] + options + ["-f", "raw", "-O", "raw", image, gateway.uri()])
            #expect(outcome.status == 0, "\(outcome.errors)")
            try run("qemu-img", "compare", "-f", "raw", "-F", "raw", image, gateway.uri())
        }
        #expect(try isSame(image, target))
    }

    @Test func `a read-only export is not written`() throws {
        let folder = try Folder()
        let image = try folder.image("disk")
        let target = try folder.filled("target")
        try serving([target], in: folder) { (gateway) throws in
            let outcome = try attempt("nbdcopy", image, gateway.uri())
            #expect(outcome.status != 0)
        }
        let untouched = try folder.filled("untouched")
        #expect(try isSame(target, untouched))
    }
}
