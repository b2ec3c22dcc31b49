// Pre-shared keys, in the file format that nbdkit, QEMU and libnbd share (psktool of GnuTLS makes such files).
public import Block

/// A key that both sides have, and the identity it goes by.
public struct PreSharedKey: Sendable {
    /// The identity, 1 to 128 bytes.
    public let identity: [UInt8]
    /// The key, 16 to 64 bytes.
    public let key: [UInt8]

    /// The shortest key that is taken, in bytes: below 128 bits it could be guessed.
    public static let keyLengthMin = 16
    /// The longest key that is taken, in bytes.
    public static let keyLengthMax = 64
    /// The longest identity that is taken, in bytes; TLS 1.2 implementations need only take 128 (RFC 4279, 5.3).
    public static let identityLengthMax = 128

    /// Parses lines of IDENTITY:KEY, the key in hexadecimal; IDENTITY as #HEX may be any bytes. Empty lines and lines
    /// that begin with # and have no colon are passed over.
    ///
    /// - Parameter name: what the text is to people, a file's path.
    /// - Throws: `.invalid` with the number of the line that is malformed; the line itself is a secret.
    public static func parse(_ text: [UInt8], name: String) throws(BlockError) -> [PreSharedKey] {
        var keys: [PreSharedKey] = []
        let lines = text.split(separator: UInt8(ascii: "\n"), omittingEmptySubsequences: false)
        for (number, line) in lines.enumerated() {
            var line = line[...]
            while let last = line.last, last == UInt8(ascii: "\r") || last == UInt8(ascii: " ") { line.removeLast() }
            let isComment = line.first == UInt8(ascii: "#") && !line.contains(UInt8(ascii: ":"))
            if line.isEmpty || isComment { continue }
            func bad(_ why: String) -> BlockError {
                BlockError(.invalid, "reading pre-shared keys from \(name): line \(number + 1) \(why)")
            }
            guard let colon = line.lastIndex(of: UInt8(ascii: ":")) else { throw bad("is not IDENTITY:HEXKEY") }
            let before = line[..<colon]
            let identity = before.first == UInt8(ascii: "#") ? bytes(hex: before.dropFirst()) : Array(before)
            guard let identity, (1...identityLengthMax).contains(identity.count), !identity.contains(0) else {
                throw bad("has no identity of 1 to \(identityLengthMax) bytes")
            }
            guard let key = bytes(hex: line[(colon + 1)...]) else { throw bad("has a key that is not hexadecimal") }
            guard (keyLengthMin...keyLengthMax).contains(key.count) else {
                throw bad("has a key of \(key.count) bytes: \(keyLengthMin) to \(keyLengthMax) are wanted")
            }
            if keys.contains(where: { $0.identity == identity }) { throw bad("names an identity a second time") }
            keys.append(PreSharedKey(identity: identity, key: key))
        }
        if keys.isEmpty { throw BlockError(.invalid, "reading pre-shared keys from \(name): it has none") }
        return keys
    }

    /// The bytes that pairs of hexadecimal digits stand for; nil if they are none.
    static func bytes(hex: ArraySlice<UInt8>) -> [UInt8]? {
        guard hex.count % 2 == 0, !hex.isEmpty else { return nil }
        var bytes: [UInt8] = []
        var high: UInt8?
        for digit in hex {
            let value: UInt8
            switch digit {
            case UInt8(ascii: "0")...UInt8(ascii: "9"): value = digit - UInt8(ascii: "0")
            case UInt8(ascii: "a")...UInt8(ascii: "f"): value = digit - UInt8(ascii: "a") + 10
            case UInt8(ascii: "A")...UInt8(ascii: "F"): value = digit - UInt8(ascii: "A") + 10
            default: return nil
            }
            if let first = high {
                bytes.append(first << 4 | value)
                high = nil
            } else {
                high = value
            }
        }
        return bytes
    }
}
