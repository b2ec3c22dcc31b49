// /etc/fstab and /etc/crypttab: disks that the machine uses at its next boot, or when somebody says mount.
import Block
import Glibc
import LinuxIO

/// What a machine's tables of mounts and encrypted devices say of its disks.
struct BootTables {
    private var nodes: [(name: String, reason: String)] = []

    /// Reads both.
    ///
    /// - Parameter mounted: directories where something is mounted already: who that is, the kernel knows better than
    ///   links that a clone of the disk may have taken over.
    /// - Throws: `BlockError` when one is there and cannot be read.
    init(_ machine: Machine, mounted: Set<String>) throws(BlockError) {
        for (path, column, other) in [("/etc/fstab", 0, 1), ("/etc/crypttab", 1, 0)] {
            for line in (try textIfThere(machine.path(path)) ?? "").split(separator: "\n") {
                let fields = line.split(whereSeparator: \.isWhitespace)
                guard fields.count > 1, !fields[0].hasPrefix("#") else { continue }
                let purpose = Self.plain(fields[other])
                if column == 0 && mounted.contains(purpose) { continue }
                guard let name = Self.path(fields[column]).flatMap({ machine.nodeName($0) }) else { continue }
                nodes.append((name, "in \(path): \(purpose)"))
            }
        }
    }

    /// Why a disk is the machine's own; nil where neither names it.
    func reason(_ disk: AttachedDisk, _ all: [AttachedDisk]) -> String? {
        let names = disk.stackNames(all)
        return nodes.first { names.contains($0.name) }?.reason
    }

    /// The node or link that a field means; nil for what is no device.
    static func path(_ field: Substring) -> String? {
        let tags = [
            "UUID": "by-uuid", "LABEL": "by-label", "PARTUUID": "by-partuuid", "PARTLABEL": "by-partlabel",
            "ID": "by-id",
        ]
        if let sign = field.firstIndex(of: "="), let folder = tags[String(field[..<sign])] {
            let value = field[field.index(after: sign)...].drop { $0 == "\"" }.prefix { $0 != "\"" }
            return value.isEmpty ? nil : "/dev/disk/\(folder)/\(linkName(plain(value)))"
        }
        return field.hasPrefix("/dev/") ? plain(field) : nil
    }

    /// A field without fstab's escapes: three octal digits behind a backslash (getmntent(3)).
    static func plain(_ field: Substring) -> String {
        var bytes: [UInt8] = []
        var rest = Array(field.utf8)[...]
        while let byte = rest.popFirst() {
            let digits = rest.prefix(3)
            let value = digits.reduce(into: 0) { value, digit in value = value &* 8 &+ Int(digit) &- 48 }
            if byte == UInt8(ascii: "\\"), digits.count == 3, digits.allSatisfy({ (48...55).contains($0) }), value < 256
            {
                bytes.append(UInt8(value))
                rest = rest.dropFirst(3)
            } else {
                bytes.append(byte)
            }
        }
        return String(decoding: bytes, as: UTF8.self)
    }

    /// A label as udev writes it in a link: all but letters, digits and some signs as \xNN.
    private static func linkName(_ label: String) -> String {
        label.reduce(into: "") { text, character in
            guard let byte = character.asciiValue, !character.isLetter, !character.isNumber,
                !"#+-.:=@_".contains(character)
            else { return text.append(character) }
            text += "\\x" + (byte < 16 ? "0" : "") + String(byte, radix: 16)
        }
    }
}
