// diskgate's commands on a local disk, against what standard tools say of it.
import Testing

@Suite struct LocalCommandTests {
    @Test func `cat gives the bytes of the whole and of parts`() throws {
        let folder = try Folder()
        let image = try folder.image("disk", size: (9 << 20) + 77)
        let binary = Tool.diskgate.path
        try run("sh", "-c", "'\(binary)' cat '\(image)' | cmp - '\(image)'")
        for (offset, length) in [(0, 1), (1_048_575, 2), (3_000_001, 4_194_304), ((9 << 20) + 76, 1)] {
            let part = "tail -c +\(offset + 1) '\(image)' | head -c \(length)"
            try run("sh", "-c", "\(part) > '\(folder.file("part"))'")
            try run(
                "sh", "-c",
                "'\(binary)' cat --offset \(offset) --length \(length) '\(image)' | cmp - '\(folder.file("part"))'")
        }
        let beyond = try attempt("diskgate", "cat", "--offset", "9M", "--length", "78", image)
        #expect(beyond.status == 1 && beyond.output.isEmpty)
    }

    @Test func `cat to a reader that goes away fails, and says why`() throws {
        let outcome = try attempt(
            "sh", "-c", "{ '\(Tool.diskgate.path)' cat pattern:1G; echo $? >&2; } | head -c 1000 > /dev/null")
        #expect(outcome.errors.contains("standard output") && outcome.errors.hasSuffix("1\n"))
    }

    @Test(arguments: ["sha256", "sha1", "md5", "sha512"]) func `checksum agrees with the system's tool`(_ name: String)
        throws
    {
        let folder = try Folder()
        let image = try folder.image("disk")
        let theirs = try run("sh", "-c", "\(name)sum '\(image)'").text
        #expect(try run("diskgate", "checksum", "--algorithm", name, image).text == theirs)
        let json = try run("diskgate", "checksum", "--algorithm", name, "--json", image).text
        #expect(json.contains("\"\(theirs.prefix { $0 != " " })\"") && json.contains("\"size\" : \(24 << 20)"))
        #expect(try attempt("diskgate", "checksum", "--algorithm", "nonsense", image).status == 1)
    }

    @Test func `info tells size and format`() throws {
        let folder = try Folder()
        let image = try folder.image("disk", size: 3 << 19)
        let text = try run("diskgate", "info", image).lines
        #expect(text.contains("size:            1572864 bytes (1.5 MiB)") && text.contains("format:          raw"))
        let json = try run("diskgate", "info", "--json", image).text
        #expect(json.contains("\"size\" : 1572864") && json.contains("\"format\" : \"raw\""))
    }

    @Test func `map agrees with itself in every form`() throws {
        let folder = try Folder()
        let image = try folder.image("disk")
        let runs = try run("diskgate", "map", image).lines.map { $0.split(separator: " ").map(String.init) }
        #expect(runs.reduce(0) { $0 + (Int($1[1]) ?? 0) } == 24 << 20)
        let json = try run("diskgate", "map", "--json", image).text
        #expect(json.split(separator: "\"offset\"").count - 1 == runs.count)
        let data = runs.filter { $0[2] == "0" }.reduce(0) { $0 + (Int($1[1]) ?? 0) }
        #expect(try run("diskgate", "map", "--totals", image).lines.first == "\(data)      0  data")
        #expect(try attempt("diskgate", "map", "--context", "qemu:dirty-bitmap:x", image).status == 1)
    }
}
