// nbdinfo: what clients are told an export can do, and its maps.
import Testing

@Suite struct NBDInfoTests {
    static let always = ["connect", "read", "flush", "fua", "cache", "df", "multi-conn", "structured-reply"]
    static let changing = ["write", "zero", "trim"]

    @Test(
        arguments: [
            ("", [], ["write", "zero", "trim", "fast-zero", "tls"]), ("--writable", changing + ["fast-zero"], ["tls"]),
            ("--overlay", changing, ["fast-zero", "tls"]),
        ] as [(String, [String], [String])])
    func `every ability is told as it is`(_ access: String, _ can: [String], _ cannot: [String]) throws {
        let folder = try Folder()
        let image = try folder.image("disk")
        try serving((access.isEmpty ? [] : [access]) + [image], in: folder) { (gateway) throws in
            for ability in Self.always + can {
                #expect(try attempt("nbdinfo", "--can", ability, gateway.uri()).status == 0, "\(ability)")
            }
            for ability in cannot {
                #expect(try attempt("nbdinfo", "--can", ability, gateway.uri()).status == 2, "\(ability)")
            }
            let isReadOnly = try attempt("nbdinfo", "--is", "read-only", gateway.uri()).status == 0
            #expect(isReadOnly == access.isEmpty)
            #expect(try attempt("nbdinfo", "--is", "rotational", gateway.uri()).status == 2)
        }
    }

    @Test func `the list names exports, sizes and descriptions`() throws {
        let folder = try Folder()
        let one = try folder.image("one", size: 5 << 20)
        let two = try folder.image("two", size: 6 << 20)
        let arguments = [one, two, "--name", "alpha", "--description", "the first", "--name", "beta"]
        try serving(arguments, in: folder) { (gateway) throws in
            let list = try run("nbdinfo", "--list", gateway.uri()).lines
            #expect(
                list.contains { $0.hasPrefix("export=\"alpha\"") } && list.contains { $0.hasPrefix("export=\"beta\"") })
            #expect(list.contains { $0.contains("the first") })
            let json = try run("nbdinfo", "--json", gateway.uri("beta")).text
            #expect(json.contains("\"export-size\": \(6 << 20)") && json.contains("\"base:allocation\""))
            #expect(json.contains("\"block_size_minimum\": 1,") && json.contains("\"block_size_maximum\": 33554432"))
            // The default export is the first one.
            #expect(try run("nbdinfo", "--size", gateway.uri()).lines == ["\(5 << 20)"])
        }
    }

    @Test func `the map is that of the file, and diskgate's own`() throws {
        let folder = try Folder()
        let image = try folder.image("disk")
        try serving([image], in: folder) { (gateway) throws in
            let map = try run("nbdinfo", "--map", gateway.uri()).lines
            #expect(map.count > 4)
            func columns(_ lines: [String]) -> [[Substring]] { lines.map { $0.split(separator: " ") } }
            let own = try run("diskgate", "map", image).lines
            #expect(columns(own) == columns(map))
            let totals = try run("nbdinfo", "--map", "--totals", gateway.uri()).lines
            #expect(totals.count == 2 && totals[0].hasSuffix("0 data") && totals[1].hasSuffix("3 hole,zero"))
            let depth = try run("nbdinfo", "--map=qemu:allocation-depth", gateway.uri()).lines
            #expect(depth == ["0    \(24 << 20)    1  local"])
            #expect(try attempt("nbdinfo", "--map=qemu:dirty-bitmap:none", gateway.uri()).status != 0)
        }
    }

    @Test func `the depth of an overlay tells what was written`() throws {
        let folder = try Folder()
        let image = try folder.filled("disk", size: 1 << 20)
        try serving(["--overlay", image], in: folder) { (gateway) throws in
            try run("qemu-io", "-f", "raw", "-c", "write -P 1 64k 1", gateway.uri())
            let depth = try run("nbdinfo", "--map=qemu:allocation-depth", gateway.uri()).lines
                .map { $0.split(separator: " ").map(String.init) }
            #expect(
                depth.map { $0[..<3] } == [["0", "65536", "2"], ["65536", "65536", "1"], ["131072", "917504", "2"]])
        }
    }
}
