// iscsi: sources taken apart: a logical unit of a target, reached without the kernel's initiator.
import Block
import Glibc
import LinuxIO

/// A logical unit of an iSCSI target.
public struct ISCSIReference: Sendable, Equatable, CustomStringConvertible {
    /// The port of iSCSI portals (RFC 7143, 15).
    public static let defaultPort: UInt16 = 3260

    /// The portal: a host name, an IPv4 address, or an IPv6 address without brackets.
    public var host: String
    public var port = defaultPort
    /// The target's name: iqn., eui. or naa.
    public var target: String
    /// The number of the logical unit, 0 to 16383.
    public var unit: UInt16
    /// The name to prove who we are with, and where the password is (CHAP); nil without.
    public var user: String?
    public var passwordFile: String?
    /// The name that the target is asked to prove in turn, and where its password is; nil without. libiscsi also
    /// goes on with a target that does not prove it.
    public var targetUser: String?
    public var targetPasswordFile: String?
    /// The iSCSI name of this machine; nil for that of the configuration.
    public var initiator: String?
    /// Whether checksums (CRC32C) of headers and data are offered. A target may decline them.
    public var hasHeaderDigest = false
    public var hasDataDigest = false
    /// Seconds that the target has to answer a command, 1 to 3600.
    public var timeoutSeconds = 30
    /// Seconds for which a lost session is tried again, 0 to 86400; 0 is never.
    public var reconnectSeconds = 60

    /// The unit as a URI, without anything secret.
    public var description: String {
        let place = host.contains(":") ? "[\(host)]" : host
        return "iscsi://\(place)\(port == Self.defaultPort ? "" : ":\(port)")/\(target)/\(unit)"
    }

    /// The number as it stands in headers: up to 255 in the first byte alone, above that flat (SAM-5 4.7).
    var addressedUnit: Int32 { Int32(unit < 256 ? unit : unit | 0x4000) }

    static let parameters: Set<String> = [
        "password-file", "target-user", "target-password-file", "initiator", "header-digest", "data-digest", "timeout",
        "reconnect", "format",
    ]

    /// Takes what stands behind `iscsi:` apart: //[USER@]HOST[:PORT]/TARGET/LUN.
    ///
    /// - Parameters:
    ///   - body: up to the query, not decoded.
    ///   - parameters: the query's, decoded.
    /// - Throws: `.invalid`, `.denied` for a password in the reference itself.
    init(_ body: Substring, _ parameters: [(key: String, value: String)], decode: (Substring) -> String?)
        throws(BlockError)
    {
        func bad(_ what: String) -> BlockError {
            BlockError(
                .invalid, "opening an iscsi: source: \(what); write iscsi://[USER@]HOST[:PORT]/TARGET-NAME/LUN")
        }
        guard body.hasPrefix("//") else { throw bad("it is no URI") }
        let parts = body.dropFirst(2).split(separator: "/", omittingEmptySubsequences: false)
        guard parts.count == 3 else { throw bad("behind the host come the target's name and a number") }
        var place = parts[0]
        if let at = place.lastIndex(of: "@") {
            let name = place[..<at]
            // As libiscsi and QEMU write it: USER%PASSWORD. Everybody on this machine can see it in the list of
            // processes.
            if name.contains("%") || name.contains(":") {
                throw BlockError(
                    .denied,
                    "opening an iscsi: source: a password in a URI is seen by everybody on this machine; put it into a "
                        + "file and write iscsi://USER@HOST/...?password-file=PATH")
            }
            guard !name.isEmpty else { throw bad("before the @ stands a user's name") }
            user = String(name)
            place = place[place.index(after: at)...]
        }
        (host, port) = try Self.portal(place, bad)
        guard let name = decode(parts[1]), Self.isName(name) else {
            throw bad("the target's name is no iSCSI name (iqn.2001-04.com.example:disk)")
        }
        guard let number = UInt16(parts[2]), number < 16384, parts[2].allSatisfy(\.isNumber) else {
            throw bad("the logical unit is a number from 0 to 16383")
        }
        (target, unit) = (name, number)
        for (key, value) in parameters { try set(key, value, bad) }
        if (user == nil) != (passwordFile == nil) {
            throw bad("a user and a password belong together: iscsi://USER@HOST/...?password-file=PATH")
        }
        if (targetUser == nil) != (targetPasswordFile == nil) || targetUser != nil && user == nil {
            throw bad("target-user and target-password-file belong together, and to a user")
        }
    }

    private static func portal(_ text: Substring, _ bad: (String) -> BlockError) throws(BlockError) -> (String, UInt16)
    {
        var host = text
        var digits: Substring?
        if text.first == "[", let close = text.firstIndex(of: "]") {
            host = text[text.index(after: text.startIndex)..<close]
            let rest = text[text.index(after: close)...]
            guard rest.isEmpty || rest.first == ":", IPAddress(String(host))?.bytes.count == 16 else {
                throw bad("what stands in brackets is no IPv6 address")
            }
            if !rest.isEmpty { digits = rest.dropFirst() }
        } else if let colon = text.lastIndex(of: ":") {
            host = text[..<colon]
            digits = text[text.index(after: colon)...]
        }
        let isPlain = host.utf8.allSatisfy { byte in
            (48...58).contains(byte) || (97...122).contains(byte | 32) || byte == 45 || byte == 46 || byte == 95
        }
        guard !host.isEmpty, isPlain, host.first != "-", !host.contains(":") || text.first == "[" else {
            throw bad("the host is missing, or is no name and no address (IPv6 addresses in brackets)")
        }
        guard let digits else { return (String(host), defaultPort) }
        guard let port = UInt16(digits), port > 0, digits.allSatisfy(\.isNumber) else {
            throw bad("the port is no number from 1 to 65535")
        }
        return (String(host), port)
    }

    /// Whether a text is an iSCSI name (RFC 7143, 4.2.7): at most 223 bytes of letters, digits and `.-:`.
    static func isName(_ text: String) -> Bool {
        let kinds = ["iqn.", "eui.", "naa."]
        return kinds.contains { text.lowercased().hasPrefix($0) } && text.utf8.count <= 223
            && text.unicodeScalars.allSatisfy { scalar in
                scalar.value >= 128 || scalar.properties.isAlphabetic
                    || "0123456789.-:_".unicodeScalars.contains(scalar)
            }
    }

    private mutating func set(_ key: String, _ value: String, _ bad: (String) -> BlockError) throws(BlockError) {
        func number(_ range: ClosedRange<Int>) throws(BlockError) -> Int {
            guard let number = Int(value), range.contains(number) else {
                throw bad("\(key) is a number from \(range.lowerBound) to \(range.upperBound)")
            }
            return number
        }
        func digest() throws(BlockError) -> Bool {
            switch value {
            case "crc32c": return true
            case "none": return false
            default: throw bad("\(key) is crc32c or none")
            }
        }
        if value.isEmpty { throw bad("\(key) is empty") }
        switch key {
        case "password-file": passwordFile = value
        case "target-user": targetUser = value
        case "target-password-file": targetPasswordFile = value
        case "initiator":
            guard Self.isName(value) else { throw bad("the initiator's name is no iSCSI name") }
            initiator = value
        case "header-digest": hasHeaderDigest = try digest()
        case "data-digest": hasDataDigest = try digest()
        case "timeout": timeoutSeconds = try number(1...3600)
        case "reconnect": reconnectSeconds = try number(0...86400)
        case "format": break
        default:
            throw bad(
                "the parameter \(key) means nothing here (known: \(Self.parameters.sorted().joined(separator: ", ")))")
        }
    }
}

extension ISCSIReference {
    /// The name that this machine goes by: what the source says, what /etc/iscsi/initiatorname.iscsi says, or one made
    /// of the machine's id.
    func initiatorName() -> String {
        if let initiator { return initiator }
        let configured = (try? readSmallFile("/etc/iscsi/initiatorname.iscsi")).map {
            String(decoding: $0, as: UTF8.self)
        }
        for line in (configured ?? "").split(separator: "\n") where line.hasPrefix("InitiatorName=") {
            let name = line.dropFirst("InitiatorName=".count).filter { !$0.isWhitespace }
            if Self.isName(name) { return name }
        }
        let machine = (try? readSmallFile("/etc/machine-id")).map { String(decoding: $0, as: UTF8.self) } ?? ""
        let id = machine.prefix { $0.isHexDigit }
        return "iqn.2026-01.invalid.diskgate:\(id.isEmpty ? "initiator" : id.prefix(12))"
    }

    /// Reads a password: the first line of a file that only its owner and group can read.
    ///
    /// - Throws: `.denied` when everybody can read it, `.invalid` when it is empty or too long, or why it cannot be
    ///   read.
    static func password(_ path: String) throws(BlockError) -> String {
        let doing = "reading the password of an iscsi: source from \(path)"
        let status = try Descriptor.open(path, O_RDONLY | O_NONBLOCK).status()
        if status.st_mode & S_IFMT == S_IFREG && status.st_mode & 0o007 != 0 {
            throw BlockError(.denied, "\(doing): everybody on this machine can read it; chmod o= \(path)")
        }
        let bytes = try readSmallFile(path, limit: 4096)
        let line = bytes.prefix { $0 != UInt8(ascii: "\n") && $0 != UInt8(ascii: "\r") }
        guard let text = String(validating: line, as: UTF8.self), (1...255).contains(line.count), !line.contains(0)
        else {
            throw BlockError(.invalid, "\(doing): its first line has to be a password of 1 to 255 bytes")
        }
        return text
    }
}
