// nbdcopy from diskgate, in all its ways, into files that are full of something else before.
import Testing

@Suite struct CopyOutTests {
    @Test(arguments: [
        [], ["--synchronous"], ["-C", "1"], ["-C", "8"], ["--no-extents"], ["--requests=1"], ["--requests=128"],
        ["--request-size=4096"], ["--request-size=33554432"], ["--allocated"], ["--sparse=0"],
    ])
    func `nbdcopy gets the same bytes`(_ options: [String]) throws {
        let folder = try Folder()
        let image = try folder.image("disk", size: (24 << 20) + 512)
        let copy = try folder.filled("copy", size: (24 << 20) + 512)
        try serving([image], in: folder) { (gateway) throws in
            let outcome = try Tool("nbdcopy").run(options + [gateway.uri(), copy])
            #expect(outcome.status == 0, "\(outcome.errors)")
        }
        #expect(try isSame(image, copy))
    }

    @Test func `nbdcopy to a pipe gets the same bytes`() throws {
        let folder = try Folder()
        let image = try folder.image("disk", seed: 5)
        try serving([image], in: folder) { (gateway) throws in
            try run("sh", "-c", "nbdcopy '\(gateway.uri())' - | cmp - '\(image)'")
        }
    }

    @Test func `nbdcopy from a pattern with holes crosses every limit`() throws {
        let folder = try Folder()
        let copy = try folder.filled("copy", size: 200 << 20)
        let source = "pattern:200M?seed=3&allocated=40%"
        try serving([source], in: folder) { (gateway) throws in try run("nbdcopy", gateway.uri(), copy) }
        let theirs = try checksum(copy)
        #expect(try run("diskgate", "checksum", source).text.prefix(64) == theirs)
    }

    @Test func `several copies at once get the same bytes`() throws {
        let folder = try Folder()
        let image = try folder.image("disk", seed: 6)
        try serving([image], in: folder) { (gateway) throws in
            let jobs = (0..<4).map { "nbdcopy '\(gateway.uri())' '\(folder.file("copy\($0)"))' & " }.joined()
            try run("sh", "-c", jobs + "wait")
        }
        for index in 0..<4 { #expect(try isSame(image, folder.file("copy\(index)"))) }
    }
}
