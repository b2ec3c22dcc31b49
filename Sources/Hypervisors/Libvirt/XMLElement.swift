// As much XML as libvirt writes: elements, attributes, text. No document types, so nothing can be expanded or fetched.
import Block

/// An element of an XML document.
struct XMLElement: Sendable {
    var name = ""
    var attributes: [String: String] = [:]
    var children: [XMLElement] = []
    /// Its text, without that of its children.
    var text = ""

    /// The first child of a name.
    subscript(_ name: String) -> XMLElement? { children.first { $0.name == name } }

    /// The children of a name.
    func all(_ name: String) -> [XMLElement] { children.filter { $0.name == name } }

    /// The most elements that may lie within each other.
    private static let depthMax = 64

    /// Parses a document.
    ///
    /// - Throws: `.corrupt` when it is no XML, or more of it than libvirt writes.
    init(parsing document: String) throws(BlockError) {
        var parser = Parser(rest: Array(document.utf8)[...])
        self = try parser.document()
    }

    fileprivate init() {}

    /// Text with the characters that mean something in XML replaced.
    static func escaped(_ text: String) -> String {
        var result = ""
        // Scalar by scalar: with an accent behind it, < is another character, and still means something in XML.
        for scalar in text.unicodeScalars {
            switch scalar {
            case "&": result += "&amp;"
            case "<": result += "&lt;"
            case ">": result += "&gt;"
            case "'": result += "&apos;"
            case "\"": result += "&quot;"
            default: result.unicodeScalars.append(scalar)
            }
        }
        return result
    }

    private struct Parser {
        var rest: ArraySlice<UInt8>

        func bad(_ what: String) -> BlockError { BlockError(.corrupt, "reading what libvirt says: \(what)") }

        mutating func document() throws(BlockError) -> XMLElement {
            try skipSpaceAndComments()
            let root = try element(depth: 0)
            try skipSpaceAndComments()
            if !rest.isEmpty { throw bad("there is more behind the document's end") }
            return root
        }

        private mutating func skipSpaceAndComments() throws(BlockError) {
            while true {
                rest = rest.drop { Self.isSpace($0) }
                if rest.starts(with: "<!--".utf8) {
                    try skip(behind: "-->")
                } else if rest.starts(with: "<?".utf8) {
                    try skip(behind: "?>")
                } else {
                    return
                }
            }
        }

        private mutating func skip(behind mark: String) throws(BlockError) {
            _ = try take(until: mark)
        }

        /// What stands before a mark, which is skipped.
        private mutating func take(until mark: String) throws(BlockError) -> ArraySlice<UInt8> {
            let bytes = Array(mark.utf8)
            guard let first = bytes.first else { return [] }
            var position = rest.startIndex
            while let next = rest[position...].firstIndex(of: first) {
                if rest[next...].starts(with: bytes) {
                    let taken = rest[..<next]
                    rest = rest[(next + bytes.count)...]
                    return taken
                }
                position = next + 1
            }
            throw bad("\(mark) is missing")
        }

        private static func isSpace(_ byte: UInt8) -> Bool { byte == 32 || (9...13).contains(byte) }

        private mutating func name() throws(BlockError) -> String {
            let end = rest.firstIndex { Self.isSpace($0) || "/>=<'\"".utf8.contains($0) } ?? rest.endIndex
            let name = rest[..<end]
            if name.isEmpty { throw bad("a name is missing") }
            rest = rest[end...]
            return String(decoding: name, as: UTF8.self)
        }

        private mutating func skip(_ byte: Character) throws(BlockError) {
            guard let value = byte.asciiValue, rest.first == value else { throw bad("\(byte) is missing") }
            rest = rest.dropFirst()
        }

        private mutating func element(depth: Int) throws(BlockError) -> XMLElement {
            if depth > XMLElement.depthMax { throw bad("too many elements lie within each other") }
            var element = XMLElement()
            try skip("<")
            element.name = try name()
            while true {
                rest = rest.drop { Self.isSpace($0) }
                if rest.starts(with: "/>".utf8) {
                    rest = rest.dropFirst(2)
                    return element
                }
                if rest.first == UInt8(ascii: ">") { break }
                let key = try name()
                rest = rest.drop { Self.isSpace($0) }
                try skip("=")
                rest = rest.drop { Self.isSpace($0) }
                guard let quote = rest.first, quote == UInt8(ascii: "'") || quote == UInt8(ascii: "\"") else {
                    throw bad("a value of \(key) is missing")
                }
                rest = rest.dropFirst()
                element.attributes[key] = try plain(
                    take(until: String(decoding: [quote], as: UTF8.self)))
            }
            try skip(">")
            try content(of: &element, depth: depth)
            return element
        }

        private mutating func content(of element: inout XMLElement, depth: Int) throws(BlockError) {
            while true {
                let end = rest.firstIndex(of: UInt8(ascii: "<")) ?? rest.endIndex
                element.text += try plain(rest[..<end])
                rest = rest[end...]
                if rest.isEmpty { throw bad("\(element.name) does not end") }
                if rest.starts(with: "</".utf8) {
                    rest = rest.dropFirst(2)
                    if try name() != element.name { throw bad("\(element.name) ends as something else") }
                    rest = rest.drop { Self.isSpace($0) }
                    return try skip(">")
                }
                if rest.starts(with: "<!--".utf8) || rest.starts(with: "<?".utf8) {
                    try skipSpaceAndComments()
                } else {
                    element.children.append(try self.element(depth: depth + 1))
                }
            }
        }

        /// Text with entities replaced.
        private func plain(_ bytes: ArraySlice<UInt8>) throws(BlockError) -> String {
            let parts = bytes.split(separator: UInt8(ascii: "&"), omittingEmptySubsequences: false)
            var result = String(decoding: parts.first ?? [], as: UTF8.self)
            for part in parts.dropFirst() {
                guard let end = part.firstIndex(of: UInt8(ascii: ";")) else { throw bad("an & stands for nothing") }
                let entity = String(decoding: part[..<end], as: UTF8.self)
                switch entity {
                case "amp": result += "&"
                case "lt": result += "<"
                case "gt": result += ">"
                case "quot": result += "\""
                case "apos": result += "'"
                default:
                    let digits = entity.dropFirst()
                    let number = digits.first == "x" ? UInt32(digits.dropFirst(), radix: 16) : UInt32(digits)
                    guard entity.first == "#", let number, let scalar = Unicode.Scalar(number) else {
                        throw bad("&\(entity); stands for nothing")
                    }
                    result.unicodeScalars.append(scalar)
                }
                result += String(decoding: part[part.index(after: end)...], as: UTF8.self)
            }
            return result
        }
    }
}
