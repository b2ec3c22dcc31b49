// The repository's rules as tests: sizes of files, functions and lines, first lines, forbidden words, imports.
import Testing

private let fileLinesMax = 600
private let functionLinesMax = 70
private let columnsMax = 120

@Suite struct TidyTests {
    @Test func repositoryIsFound() {
        #expect(Repository.sources.count > 30)
        #expect(Repository.files.contains { $0.path == "Tests/TidyTests/TidyTests.swift" })
    }

    @Test(arguments: Repository.files.map(\.path))
    func fileIsTidy(path: String) throws {
        let file = try #require(Repository.files.first { $0.path == path })
        for problem in problems(file) { Issue.record("\(path): \(problem)") }
    }

    @Test func modulesImportOnlyDownwards() {
        for file in Repository.sources {
            for problem in importProblems(file) { Issue.record("\(file.path): \(problem)") }
        }
    }
}

/// What breaks a rule in a file.
func problems(_ file: SourceFile) -> [String] {
    var found: [String] = []
    // A text that ends in a line feed has an empty piece behind it.
    let count = file.lines.last == "" ? file.lines.count - 1 : file.lines.count
    if count > fileLinesMax { found.append("\(count) lines are more than \(fileLinesMax)") }
    if file.lines.last != "" { found.append("the last line has no end") }
    let first = file.lines.first ?? ""
    if !first.hasPrefix("// ") || first.count < 20 { found.append("the first line does not say what the file is for") }
    for (index, line) in file.lines.enumerated() {
        if line.count > columnsMax { found.append("line \(index + 1) has \(line.count) columns") }
        if line.last?.isWhitespace == true { found.append("line \(index + 1) ends in white space") }
        if line.contains("\t") { found.append("line \(index + 1) has a tab") }
    }
    let code = codeOnly(file.lines)
    for function in functionLengths(code) where function.lines > functionLinesMax {
        found.append("\(function.name) in line \(function.firstLine) has \(function.lines) lines")
    }
    if file.module != nil { found += forbiddenWords(file, code) }
    return found
}

private func forbiddenWords(_ file: SourceFile, _ code: [String]) -> [String] {
    var found: [String] = []
    for (index, line) in code.enumerated() {
        for word in ["try!", "fatalError", "as!", "print(\"DEBUG"] where line.contains(word) {
            found.append("\(word) in line \(index + 1)")
        }
    }
    for (index, line) in file.lines.enumerated() {
        for word in ["TODO", "FIXME"] where line.contains(word) { found.append("\(word) in line \(index + 1)") }
    }
    return found
}

/// The modules that each module may use besides the system's, as in the architecture: arrows point down only.
private let mayUse: [String: Set<String>] = {
    let toC: Set<String> = [
        "CISCSI", "CLinux", "COpenSSL", "CNBD", "CZstd", "CZlib", "CXXHash", "CSQLite", "CCurl", "CXML", "CSystemd",
    ]
    var rules: [String: Set<String>] = ["Block": []]
    rules["LinuxIO"] = ["Block", "CLinux"]
    rules["Formats"] = toC.union(["Block", "LinuxIO"])
    rules["NBD"] = toC.union(["Block", "LinuxIO"])
    rules["Transports"] = toC.union(["Block", "LinuxIO", "Formats", "NBD"])
    rules["Hypervisors"] = rules["Transports"]?.union(["Transports"])
    rules["Backup"] = rules["Hypervisors"]?.union(["Hypervisors"])
    rules["Gateway"] = rules["Backup"]?.union(["Backup"])
    rules["diskgate"] = rules["Gateway"]?.union(["Gateway"])
    return rules
}()

/// What the data plane does without: Foundation costs memory and time at start.
private let withoutFoundation: Set<String> = ["Block", "LinuxIO", "NBD"]
private let system: Set<String> = ["Glibc", "Synchronization", "Dispatch"]

func importProblems(_ file: SourceFile) -> [String] {
    guard let module = file.module else { return [] }
    guard let allowed = mayUse[module] else { return ["module \(module) has no place in the architecture"] }
    var found: [String] = []
    for line in codeOnly(file.lines) {
        let words = line.split(separator: " ")
        guard let index = words.firstIndex(of: "import"), index + 1 < words.count, index <= 2 else { continue }
        let name = String(words[index + 1])
        if name.hasPrefix("Foundation") {
            if withoutFoundation.contains(module) { found.append("\(module) does without \(name)") }
        } else if mayUse[name] != nil || name.hasPrefix("C") && name.dropFirst().first?.isUppercase == true {
            if !allowed.contains(name) { found.append("\(module) must not use \(name)") }
        } else if module == "Block" && !system.contains(name) {
            found.append("Block uses nothing, not even \(name)")
        }
    }
    return found
}
