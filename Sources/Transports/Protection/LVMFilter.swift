// LVM's device filter: which SCSI disks its commands look at, whoever runs them.
import Block
import Glibc
import LinuxIO

/// LVM's filter (lvm.conf: devices/global_filter), and the block of lvmlocal.conf that sets it.
enum LVMFilter {
    /// Where LVM reads what holds for one machine; it comes after lvm.conf.
    static let path = "/etc/lvm/lvmlocal.conf"
    /// What LVM is not to look at. It goes by links that only disks have that are kept out, and not by links of the
    /// proxy's own: when udev has LVM look at a disk for the first time, it has no links yet (pvscan(8)).
    static let pattern = "r|^\(UdevRules.links)|"
    /// What LVM says it goes by.
    enum Effective: Equatable {
        /// It uses no other disks than those in its devices file.
        case devicesFile
        /// Its patterns, in order; empty where it has no filter.
        case filter([String])
    }

    /// The block of lvmlocal.conf.
    static let block = ManagedText.sealed("\(ManagedText.begin)devices/global_filter = [ \"\(pattern)\" ]\n")

    /// Whether what LVM goes by keeps it from disks that are not the proxy's own.
    ///
    /// - Returns: what keeps it away, for people; nil where nothing does.
    static func protection(by effective: Effective) -> String? {
        switch effective {
        case .devicesFile: return "LVM uses only the disks in its devices file"
        case .filter(let patterns):
            if patterns == [pattern] { return "devices/global_filter refuses disks that udev keeps out" }
            for node in ["sdzz", "sdzz1"] where !rejects(["/dev/\(node)", "\(UdevRules.links)\(node)"], patterns) {
                return nil
            }
            return "devices/global_filter is the administrator's own, and refuses disks that udev keeps out"
        }
    }

    /// Whether patterns refuse a disk with these names: for each name the first pattern that matches decides; a disk
    /// passes by any name that is let, or where none of its names is refused (lvm.conf(5)).
    static func rejects(_ names: [String], _ patterns: [String]) -> Bool {
        let verdicts = names.map { name in patterns.compactMap { verdict(of: $0, on: name) }.first }
        return !verdicts.contains("a") && verdicts.contains("r")
    }

    /// What a pattern says of a name: `a` or `r`; nil where it does not match.
    private static func verdict(of pattern: String, on name: String) -> Character? {
        var text = pattern[...]
        guard let verdict = text.popFirst(), let delimiter = text.popFirst() else { return nil }
        let close: [Character: Character] = ["(": ")", "[": "]", "{": "}"]
        guard let end = text.lastIndex(of: close[delimiter] ?? delimiter) else { return nil }
        return matches(String(text[..<end]), name) ? verdict : nil
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

    /// What to do where the administrator has a filter.
    static let advice =
        "LVM has a devices/global_filter that lets disks in that are kept out; put \"\(pattern)\" first in it, and "
        + "take out what lets SCSI disks in by their nodes (a|/dev/sd.*|, a|.*|), since any name that is let is enough"

    /// What lvmlocal.conf has to become: with our block, instead of an earlier one, at its end.
    ///
    /// - Throws: `.denied` when somebody has changed the block, or sets a filter behind or instead of it.
    static func placed(in text: String) throws(BlockError) -> String {
        let rest = try withoutBlock(text)
        if setsFilter(rest[...]) { throw BlockError(.denied, "setting LVM's filter in \(path): \(advice)") }
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
    static func isPlaced(in text: String) -> Bool {
        guard let found = ManagedText.block(in: text), found == block else { return false }
        return !setsFilter(text[found.endIndex...])
    }

    private static func setsFilter(_ text: Substring) -> Bool {
        text.split(separator: "\n").contains { line in
            let code = line.prefix { $0 != "#" }
            return code.contains("global_filter") && code.contains("=")
        }
    }
}
