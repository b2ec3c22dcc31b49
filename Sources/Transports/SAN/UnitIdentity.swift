// Whether a LUN is the one that a host has written down: on the LUN itself, or in a raw device mapping.
import Block
import Formats
import LinuxIO

/// Who a LUN is, by its own word.
struct UnitIdentity: Sendable, Equatable {
    /// Its worldwide names: naa. and eui. with hexadecimal digits, t10. with text.
    var names: [String]
    var serial: String?

    /// A disk of this machine; nil where it says nothing of itself.
    init?(_ disk: AttachedDisk) { self.init(names: disk.names, serial: disk.serial) }

    init?(names: [String], serial: String?) {
        if names.isEmpty && serial == nil { return nil }
        self.names = names
        self.serial = serial
    }

    /// Whether it is the LUN that a host has written down. What the host writes is a name's or the serial number's
    /// bytes, and the beginning of the model behind them.
    ///
    /// - Returns: nil when the host wrote nothing.
    func matches(_ written: VMFSDiskID) -> Bool? {
        var bytes = written.identifier[...]
        while bytes.first == 0x20 { bytes.removeFirst() }
        if bytes.allSatisfy({ $0 == 0 || $0 == 0x20 }) { return nil }
        if names.contains(where: { Self.bytes(of: $0).map { written.identifier.starts(with: $0) } ?? false }) {
            return true
        }
        guard let serial, !serial.isEmpty, bytes.starts(with: serial.utf8) else { return false }
        let rest = bytes.dropFirst(serial.utf8.count)
        let tail = rest.drop { $0 == 0x20 || $0 == 0 }
        // SERIAL1 is no beginning of SERIAL12.
        return rest.count != tail.count || tail.isEmpty || written.model.utf8.starts(with: tail)
    }

    /// The bytes that a name stands for; nil when they are too few to tell units apart.
    private static func bytes(of name: String) -> [UInt8]? {
        let parts = name.split(separator: ".", maxSplits: 1, omittingEmptySubsequences: false)
        guard parts.count == 2 else { return nil }
        if parts[0] == "t10" { return parts[1].utf8.count < 8 ? nil : Array(parts[1].utf8) }
        var bytes: [UInt8] = []
        var digits = parts[1][...]
        while digits.count >= 2, let byte = UInt8(digits.prefix(2), radix: 16) {
            bytes.append(byte)
            digits = digits.dropFirst(2)
        }
        return digits.isEmpty && bytes.count >= 8 ? bytes : nil
    }

    /// Its best name, for people.
    var text: String { names.first ?? serial ?? "without a name" }
}
