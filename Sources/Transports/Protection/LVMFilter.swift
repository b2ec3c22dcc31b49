// LVM's device filter: which SCSI disks its commands look at, whoever runs them.
import Block
import Glibc
import LinuxIO

/// LVM's filter (lvm.conf: devices/global_filter), and the block of lvmlocal.conf that sets it.
struct LVMFilter {
    /// Where LVM reads what holds for one machine; it comes after lvm.conf.
    static let path = "/etc/lvm/lvmlocal.conf"
    /// What LVM is not to look at, unless an earlier pattern lets it.
    static let reject = "r|^/dev/sd|"
    /// What LVM says it goes by.
    enum Effective: Equatable {
        /// It uses no other disks than those in its devices file.
        case devicesFile
        /// Its patterns, in order; empty where it has no filter.
        case filter([String])
    }

    let own: [OwnDisk]

    /// The patterns: the proxy's own disks by links that say who they are, and no other SCSI disk.
    var patterns: [String] {
        let links = own.flatMap(\.links).compactMap { link -> String? in
            guard let text = Self.expression(link) else { return nil }
            return "a|^/dev/\(text)(-part[0-9]+)?$|"
        }
        return ["a|^/dev/\(UdevRules.ownLinks)/|"] + links + [Self.reject]
    }

    /// A link's name as an expression that matches it; nil where it has characters that mean too much.
    private static func expression(_ link: String) -> String? {
        var text = ""
        for character in link {
            guard character.isASCII else { return nil }
            if character.isLetter || character.isNumber || "/:-_,=@".contains(character) {
                text.append(character)
            } else if ".+".contains(character) {
                text += "[\(character)]"
            } else {
                return nil
            }
        }
        return text
    }

    /// The block of lvmlocal.conf.
    var block: String {
        let list = patterns.map { "\"\($0)\"" }.joined(separator: ", ")
        return ManagedText.sealed("\(ManagedText.begin)devices/global_filter = [ \(list) ]\n")
    }

    /// Whether what LVM goes by keeps it from disks that are not the proxy's own.
    ///
    /// - Returns: what keeps it away, for people; nil where nothing does.
    func protection(by effective: Effective) -> String? {
        switch effective {
        case .devicesFile: return "LVM uses only the disks in its devices file"
        case .filter(let found):
            if found.starts(with: patterns) { return "devices/global_filter lets only this machine's own SCSI disks" }
            if Self.rejects("/dev/sdzz", found) && Self.rejects("/dev/sdzz1", found) {
                return "devices/global_filter is the administrator's own, and refuses SCSI disks it does not know"
            }
            return nil
        }
    }

    /// Whether patterns refuse a node: the first that matches decides, and none lets it pass (lvm.conf(5)).
    static func rejects(_ node: String, _ patterns: [String]) -> Bool {
        for pattern in patterns {
            var text = pattern[...]
            guard let verdict = text.popFirst(), let delimiter = text.popFirst() else { continue }
            let close: [Character: Character] = ["(": ")", "[": "]", "{": "}"]
            guard let end = text.lastIndex(of: close[delimiter] ?? delimiter) else { continue }
            if matches(String(text[..<end]), node) { return verdict == "r" }
        }
        return false
    }

    private static func matches(_ expression: String, _ text: String) -> Bool {
        var compiled = regex_t()
        guard regcomp(&compiled, expression, REG_EXTENDED | REG_NOSUB) == 0 else { return false }
        defer { regfree(&compiled) }
        return regexec(&compiled, text, 0, nil, 0) == 0
    }

    /// Takes `key=value` lines of lvmconfig apart.
    static func effective(_ text: String, hasDevicesFile: Bool) -> Effective {
        var filter: [String] = []
        for line in text.split(separator: "\n") {
            if line.hasPrefix("use_devicesfile=1") && hasDevicesFile { return .devicesFile }
            if let list = line.after("global_filter=") { filter = strings(in: list) }
        }
        return .filter(filter)
    }

    /// The quoted strings of a list; a backslash quotes the next character.
    private static func strings(in list: Substring) -> [String] {
        var found: [String] = []
        var current: String?
        var isQuoted = false
        for character in list {
            if isQuoted {
                current?.append(character)
                isQuoted = false
            } else if character == "\\" && current != nil {
                isQuoted = true
            } else if character == "\"" {
                if let text = current { found.append(text) }
                current = current == nil ? "" : nil
            } else {
                current?.append(character)
            }
        }
        return found
    }

    /// What lvmlocal.conf has to become: with our block, instead of an earlier one, at its end.
    ///
    /// - Throws: `.denied` when somebody has changed the block, or sets a filter behind or instead of it.
    func placed(in text: String) throws(BlockError) -> String {
        let rest = try Self.withoutBlock(text)
        if Self.setsFilter(rest[...]) {
            throw BlockError(
                .denied,
                "setting LVM's filter in \(Self.path): it sets a global_filter of its own; put these patterns first "
                    + "there: \(patterns.map { "\"\($0)\"" }.joined(separator: ", "))")
        }
        return rest + (rest.isEmpty || rest.hasSuffix("\n") ? "" : "\n") + block
    }

    /// Text without our block.
    ///
    /// - Throws: `.denied` when somebody has changed the block.
    static func withoutBlock(_ text: String) throws(BlockError) -> String {
        guard let block = ManagedText.block(in: text) else { return text }
        guard ManagedText.isSealed(String(block)) else {
            throw BlockError(
                .denied,
                "changing \(path): somebody has changed what diskgate has written between its two comment lines; move "
                    + "what is yours out of them, remove them and what is between, and run this again")
        }
        return String(text[..<block.startIndex]) + text[block.endIndex...]
    }

    /// Whether our block is in a text as it should be, and nothing after it sets another filter.
    func isPlaced(in text: String) -> Bool {
        guard let found = ManagedText.block(in: text), found == block else { return false }
        return !Self.setsFilter(text[found.endIndex...])
    }

    private static func setsFilter(_ text: Substring) -> Bool {
        text.split(separator: "\n").contains { line in
            let code = line.prefix { $0 != "#" }
            return code.contains("global_filter") && code.contains("=")
        }
    }
}
