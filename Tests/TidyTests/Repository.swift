// The repository's Swift files, read once, with a view of the code without comments and text.
import Glibc

/// A Swift file of the repository.
struct SourceFile: Sendable {
    /// The path from the repository's top.
    let path: String
    let lines: [Substring]

    /// The module for files in Sources/MODULE.
    var module: String? {
        let parts = path.split(separator: "/")
        return parts.first == "Sources" && parts.count > 2 ? String(parts[1]) : nil
    }
}

/// All Swift files below Sources and Tests, and the manifest.
enum Repository {
    /// The top, found from this file's place in Tests/TidyTests.
    static let top = String(#filePath.split(separator: "/").dropLast(3).reduce("") { "\($0)/\($1)" })

    static let files: [SourceFile] =
        (find("Sources") + find("Tests") + ["Package.swift"]).sorted().compactMap { path in
            guard let text = read(path) else { return nil }
            return SourceFile(path: path, lines: text.split(separator: "\n", omittingEmptySubsequences: false))
        }

    static let sources = files.filter { $0.module != nil }

    private static func find(_ folder: String) -> [String] {
        guard let directory = opendir("\(top)/\(folder)") else { return [] }
        defer { closedir(directory) }
        var found: [String] = []
        while let entry = readdir(directory) {
            let name = withUnsafeBytes(of: &entry.pointee.d_name) {
                String(decoding: $0.prefix { $0 != 0 }, as: UTF8.self)
            }
            if name.hasPrefix(".") { continue }
            if entry.pointee.d_type == UInt8(DT_DIR) {
                found += find("\(folder)/\(name)")
            } else if name.hasSuffix(".swift") {
                found.append("\(folder)/\(name)")
            }
        }
        return found
    }

    /// The text of a file by its path from the top; nil when there is none.
    static func read(_ path: String) -> String? {
        guard let file = fopen("\(top)/\(path)", "r") else { return nil }
        defer { fclose(file) }
        var bytes: [UInt8] = []
        var part = [UInt8](repeating: 0, count: 65536)
        while true {
            let count = fread(&part, 1, part.count, file)
            if count == 0 { break }
            bytes += part[..<count]
        }
        return String(validating: bytes, as: UTF8.self)
    }
}

/// Lines of Swift with comments and the insides of text literals taken out, so that what is left is code.
func codeOnly(_ lines: [Substring]) -> [String] {
    var isInText = false
    var commentDepth = 0
    return lines.map { line in
        var code = ""
        var rest = line[...]
        var quoted = false
        while let character = rest.first {
            if isInText {
                if rest.hasPrefix("\"\"\"") {
                    isInText = false
                    rest = rest.dropFirst(3)
                } else {
                    rest = rest.dropFirst()
                }
            } else if commentDepth > 0 || (!quoted && rest.hasPrefix("/*")) {
                if rest.hasPrefix("/*") { commentDepth += 1 } else if rest.hasPrefix("*/") { commentDepth -= 1 }
                rest = rest.dropFirst(rest.hasPrefix("/*") || rest.hasPrefix("*/") ? 2 : 1)
            } else if quoted {
                quoted = character != "\""
                rest = rest.dropFirst(character == "\\" ? 2 : 1)
            } else if rest.hasPrefix("//") {
                break
            } else if rest.hasPrefix("\"\"\"") {
                isInText = true
                rest = rest.dropFirst(3)
            } else {
                quoted = character == "\""
                code.append(character)
                rest = rest.dropFirst()
            }
        }
        return code
    }
}

/// A function with the number of lines it takes, from its first to its closing brace.
struct FunctionLength {
    let name: String
    let firstLine: Int
    let lines: Int
}

/// The functions, initialisers and other bodies that begin with a declaration keyword, in lines of code.
func functionLengths(_ code: [String]) -> [FunctionLength] {
    let keywords: Set<Substring> = ["func", "init", "init?", "deinit", "subscript"]
    var open: [(name: String, line: Int, depth: Int)] = []
    var waiting: (name: String, line: Int, depth: Int)?
    var depth = 0
    var found: [FunctionLength] = []
    for (number, line) in code.enumerated() {
        let words = line.split { " ({<:".contains($0) }
        if let index = words.firstIndex(where: { keywords.contains($0) }), !line.contains(".init"),
            words[..<index].allSatisfy({ $0.first?.isLetter == true || "@_".contains($0.prefix(1)) })
        {
            let name = index + 1 < words.count && words[index] == "func" ? words[index + 1] : words[index]
            waiting = (String(name), number, depth)
        }
        for character in line {
            if character == "{" {
                if let next = waiting, next.depth == depth {
                    open.append(next)
                    waiting = nil
                }
                depth += 1
            } else if character == "}" {
                depth -= 1
                if let last = open.last, last.depth == depth {
                    found.append(
                        FunctionLength(name: last.name, firstLine: last.line + 1, lines: number - last.line + 1))
                    open.removeLast()
                }
            }
        }
    }
    return found
}
