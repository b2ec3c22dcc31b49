// The text of a descriptor taken apart. A line that is not understood is an error: it may have been an extent.
import Block

/// Reads a descriptor line by line.
struct VMDKDescriptorParser {
    private let file: String
    private var descriptor = VMDKDescriptor()
    /// Keys that were met, besides those of the disk database.
    private var values: [String: String] = [:]
    private var sectors: UInt64 = 0

    private init(file: String) { self.file = file }

    /// Takes a descriptor apart.
    ///
    /// - Parameters:
    ///   - bytes: the text, which ends at the first zero byte.
    ///   - file: what it is from, for errors.
    /// - Throws: `.corrupt` when it is not one, `.unsupported` for a version or encoding that is not known.
    static func parse(_ bytes: UnsafeRawBufferPointer, file: String) throws(BlockError) -> VMDKDescriptor {
        var parser = VMDKDescriptorParser(file: file)
        let text = try decoded(bytes, file: file)
        // Unicode scalars, since a line break of Windows is one character.
        for line in text.unicodeScalars.split(whereSeparator: { $0 == "\n" || $0 == "\r" }) {
            let line = trimmed(Substring(line))
            if line.isEmpty || line.hasPrefix("#") { continue }
            try parser.parse(line)
        }
        return try parser.finished()
    }

    /// Reads the descriptor that is a whole file, or a part of one.
    ///
    /// - Throws: what `parse` throws, `.tooLarge`, or what reading throws.
    static func read(from device: any BlockDevice, _ range: Range<UInt64>) throws(BlockError) -> VMDKDescriptor {
        let name = device.info.name
        if range.isEmpty { throw VMDK.corrupt(name, "its descriptor is empty") }
        guard range.count64 <= VMDKDescriptor.bytesMax else {
            throw BlockError(
                .tooLarge,
                "opening \(name) as VMDK: a descriptor of \(range.count64) bytes is too large (1 MiB at most)")
        }
        let buffer = Buffer(count: Int(range.count64))
        try device.read(into: buffer.bytes, at: range.lowerBound)
        return try parse(buffer.readable, file: name)
    }

    // MARK: - Text

    /// The text, in UTF-8 or, where the descriptor says so, in one of the two encodings whose bytes are characters.
    private static func decoded(_ bytes: UnsafeRawBufferPointer, file: String) throws(BlockError) -> String {
        let text = bytes.prefix { $0 != 0 }
        if let whole = String(validating: text, as: UTF8.self) { return whole }
        // Every line but those with names is ASCII.
        let rough = String(decoding: text, as: UTF8.self)
        let line = rough.split(whereSeparator: \.isNewline).first { $0.lowercased().hasPrefix("encoding") }
        let encoding = line.flatMap { keyAndValue($0)?.value.lowercased() } ?? "UTF-8"
        guard ["windows-1252", "iso-8859-1"].contains(encoding) else {
            throw VMDK.unsupported(
                file, "its descriptor is not in UTF-8, and names in the encoding \(encoding) are not understood")
        }
        var scalars = String.UnicodeScalarView()
        for byte in text {
            let isSpecial = (0x80..<0xA0).contains(byte) && encoding == "windows-1252"
            scalars.append(isSpecial ? windows1252[Int(byte) - 0x80] : UnicodeScalar(byte))
        }
        return String(scalars)
    }

    /// The characters of windows-1252 that ISO 8859-1 does not have, from 0x80.
    private static let windows1252 = Array("€\u{81}‚ƒ„…†‡ˆ‰Š‹Œ\u{8D}Ž\u{8F}\u{90}‘’“”•–—˜™š›œ\u{9D}žŸ".unicodeScalars)

    private static func isBlank(_ character: Character) -> Bool { character == " " || character == "\t" }

    private static func trimmed(_ text: Substring) -> Substring {
        var text = text.drop(while: isBlank)
        while let last = text.last, isBlank(last) { text.removeLast() }
        return text
    }

    private static func keyAndValue(_ line: Substring) -> (key: String, value: String)? {
        guard let equals = line.firstIndex(of: "=") else { return nil }
        let key = trimmed(line[..<equals]).lowercased()
        var value = trimmed(line[line.index(after: equals)...])
        if value.count >= 2, value.first == "\"", value.last == "\"" { value = value.dropFirst().dropLast() }
        let isName = key.utf8.allSatisfy { (97...122).contains($0) || (48...57).contains($0) || $0 == 46 || $0 == 95 }
        return key.isEmpty || !isName ? nil : (key, String(value))
    }

    // MARK: - Lines

    private mutating func parse(_ line: Substring) throws(BlockError) {
        let word = line.prefix { !Self.isBlank($0) }
        if let access = VMDKDescriptor.Access(rawValue: word.uppercased()) {
            return try parseExtent(access, line.dropFirst(word.count), line)
        }
        guard let (key, value) = Self.keyAndValue(line) else {
            throw VMDK.corrupt(file, "a line of its descriptor is not understood: \(line.prefix(80).debugDescription)")
        }
        if key.hasPrefix("ddb.") {
            descriptor.database[String(key.dropFirst(4))] = value
        } else if values.updateValue(value, forKey: key) != nil {
            throw VMDK.corrupt(file, "its descriptor has \(key) twice")
        }
    }

    /// `ACCESS SECTORS KIND ["FILE" [OFFSET]]`
    private mutating func parseExtent(_ access: VMDKDescriptor.Access, _ rest: Substring, _ line: Substring)
        throws(BlockError)
    {
        func bad(_ why: String) -> BlockError {
            VMDK.corrupt(file, "an extent of its descriptor \(why): \(line.prefix(80).debugDescription)")
        }
        let beforeName = rest.prefix { $0 != "\"" }
        let words = beforeName.split(whereSeparator: Self.isBlank)
        guard words.count == 2, let count = UInt64(words[0]) else { throw bad("is not understood") }
        guard let kind = VMDKDescriptor.Kind(rawValue: words[1].uppercased()) else {
            throw VMDK.unsupported(file, "extents of the kind \(words[1].prefix(40)) are not known")
        }
        guard count > 0, count <= VMDK.sectorsMax - sectors else { throw bad("has an impossible size") }
        sectors += count
        var name: Substring = ""
        var offset: UInt64 = 0
        if beforeName.endIndex < rest.endIndex {
            let quoted = rest[rest.index(after: beforeName.endIndex)...]
            guard let end = quoted.firstIndex(of: "\"") else { throw bad("has a name without an end") }
            name = quoted[..<end]
            let after = Self.trimmed(quoted[quoted.index(after: end)...])
            if !after.isEmpty {
                guard let number = UInt64(after), number <= VMDK.sectorsMax else {
                    throw bad("has something behind its file's name that is no offset")
                }
                offset = number
            }
        }
        if name.isEmpty && kind != .zero { throw bad("names no file") }
        if descriptor.extents.count == VMDKDescriptor.extentsMax {
            throw VMDK.corrupt(file, "its descriptor has more than \(VMDKDescriptor.extentsMax) extents")
        }
        descriptor.extents.append(
            VMDKDescriptor.Extent(access: access, sectors: count, kind: kind, fileName: String(name), offset: offset))
    }

    // MARK: - The whole

    private mutating func finished() throws(BlockError) -> VMDKDescriptor {
        guard let version = UInt32(try required("version")), [1, 2, 3].contains(version) else {
            throw VMDK.unsupported(file, "its descriptor is of version \(values["version"] ?? "?") (1 to 3 are known)")
        }
        descriptor.version = version
        if values.keys.contains(where: { $0.hasPrefix("encryption") }) {
            throw VMDK.unsupported(file, "it is encrypted; decrypt the machine with the host that has its keys")
        }
        descriptor.contentID = try contentID("cid")
        let parent = try contentID("parentcid")
        descriptor.createType = try required("createtype")
        descriptor.parentName = values["parentfilenamehint"]
        descriptor.changeTrackName = values["changetrackpath"]
        if parent != VMDKDescriptor.noParent {
            guard let name = descriptor.parentName, !name.isEmpty else {
                throw VMDK.corrupt(
                    file, "it has a parent (parentCID is \(hexadecimal(parent, 8))), but does not name it")
            }
            descriptor.parentContentID = parent
        }
        if descriptor.extents.isEmpty { throw VMDK.corrupt(file, "its descriptor has no extents") }
        return descriptor
    }

    private func required(_ key: String) throws(BlockError) -> String {
        guard let value = values[key] else { throw VMDK.corrupt(file, "its descriptor has no \(key)") }
        return value
    }

    private func contentID(_ key: String) throws(BlockError) -> UInt32 {
        let text = try required(key)
        guard text.utf8.count <= 8, let number = UInt32(text, radix: 16) else {
            throw VMDK.corrupt(file, "its descriptor has \(text.prefix(20).debugDescription) as \(key)")
        }
        return number
    }
}
