// The rules themselves, on samples that break them: a rule that finds nothing would be no rule.
import Testing

private func file(_ text: String, path: String = "Sources/Block/Sample.swift") -> SourceFile {
    SourceFile(path: path, lines: text.split(separator: "\n", omittingEmptySubsequences: false))
}

private let header = "// A sample that is long enough.\n"

@Suite struct RuleTests {
    @Test func tidyFileHasNoProblems() {
        #expect(problems(file(header + "func a() {\n    b(\"try! // TODAY\")\n}\n")).isEmpty)
    }

    @Test(arguments: [
        ("import Glibc\n", "first line"), (header + "let a = 1", "no end"), (header + "let a = 1 \n", "white space"),
        (header + "\tlet a = 1\n", "tab"), (header + "let a = try! b()\n", "try!"),
        (header + "// TODO: more\n", "TODO"),
        (header + "let a = b as! C\n", "as!"), (header + "fatalError()\n", "fatalError"),
        (header + "let a = \"" + String(repeating: "x", count: 120) + "\"\n", "columns"),
        (header + String(repeating: "\n", count: 600), "lines are more"),
    ])
    func problemIsFound(text: String, word: String) {
        #expect(problems(file(text)).contains { $0.contains(word) }, "\(problems(file(text)))")
    }

    @Test func sampleOfTheLargestSizeIsAllowed() {
        #expect(problems(file(header + String(repeating: "\n", count: 599))).isEmpty)
    }

    /// A body of `count` lines, its first and last included.
    private func function(_ start: String, _ count: Int) -> String {
        start + " {\n" + String(repeating: "    if a { b() }\n", count: count - 2) + "}\n"
    }

    @Test(arguments: [
        "func a()", "public static func a<T>(b: T) -> Int", "init?(a: Int)", "deinit",
        "    public convenience init(a: B)",
        "func a(\n    b: Int\n)", "subscript(a: Int) -> Int", "@inline(__always) func a()",
    ])
    func longFunctionsAreFound(start: String) {
        let extra = start.split(separator: "\n").count - 1
        #expect(problems(file(header + function(start, functionLines - extra))).isEmpty)
        let found = problems(file(header + function(start, functionLines + 1 - extra)))
        #expect(found.count == 1 && found[0].contains("has 71 lines"), "\(found)")
    }

    private let functionLines = 70

    @Test func bracesInTextAndCommentsDoNotCount() {
        let text =
            header + "func a() {\n    b(\"{{{\") // {{{\n    /* { */\n    c(\"\"\"\n    {{ \" {\n    \"\"\")\n}\n"
        let lengths = functionLengths(codeOnly(file(text).lines))
        #expect(lengths.map(\.lines) == [7])
        #expect(lengths.map(\.name) == ["a"])
    }

    @Test(arguments: [
        ("Block", "LinuxIO"), ("Block", "Foundation"), ("Block", "Logging"), ("Block", "CLinux"), ("LinuxIO", "NBD"),
        ("LinuxIO", "FoundationEssentials"), ("Formats", "NBD"), ("NBD", "Formats"), ("NBD", "Foundation"),
        ("Transports", "Gateway"), ("Gateway", "diskgate"), ("Nowhere", "Glibc"),
    ])
    func upwardImportsAreFound(module: String, imported: String) {
        for prefix in ["", "public ", "internal "] {
            let sample = file(header + "\(prefix)import \(imported)\n", path: "Sources/\(module)/Sample.swift")
            #expect(importProblems(sample).count == 1)
        }
    }

    @Test(arguments: [
        ("Block", "Glibc"), ("LinuxIO", "Block"), ("NBD", "LinuxIO"), ("NBD", "Logging"), ("diskgate", "Block"),
        ("Gateway", "FoundationEssentials"), ("Transports", "Formats"),
    ])
    func downwardImportsAreAllowed(module: String, imported: String) {
        let sample = file(header + "import \(imported)\n", path: "Sources/\(module)/Folder/Sample.swift")
        #expect(importProblems(sample).isEmpty)
    }
}
