// Files of pre-shared keys and fingerprints: what is taken, and what is refused with its line.
import Block
import NBD
import Testing

private let key = String(repeating: "0123456789abcdef", count: 4)

@Suite struct PreSharedKeyTests {
    private func parse(_ text: String) throws -> [PreSharedKey] {
        try PreSharedKey.parse(Array(text.utf8), name: "keys.psk")
    }

    @Test func `lines as psktool writes them`() throws {
        let keys = try parse("# a comment\nalice:\(key)\n\nbob:\(key.uppercased())\r\n#6361726f6c:\(key)  \nd:e:\(key)")
        #expect(keys.map { String(decoding: $0.identity, as: UTF8.self) } == ["alice", "bob", "carol", "d:e"])
        #expect(keys.allSatisfy { $0.key.count == 32 && $0.key[1] == 0x23 })
    }

    @Test(arguments: [
        ("alice:0g", 1), ("alice:012", 1), ("alice", 1), ("\nalice:\(key)\n:\(key)", 3), ("a:00", 1),
        ("a:\(key)\na:\(key)", 2), ("a:" + String(repeating: "00", count: 65), 1), ("#zz:\(key)", 1),
        (String(repeating: "x", count: 129) + ":\(key)", 1), ("#00:\(key)", 1),
    ])
    func `a malformed line is told by its number, not by its secret`(_ text: String, _ line: Int) throws {
        let error = try #require(throws: BlockError.self) { try parse(text) }
        #expect(error.message.contains("keys.psk: line \(line) "))
        #expect(!error.message.contains(key))
    }

    @Test func `a file without keys is an error`() {
        #expect(throws: BlockError.self) { try parse("\n# nobody\n") }
    }

    @Test func `fingerprints with and without colons`() throws {
        let one = try Fingerprint("sha256:" + key)
        let pairs = stride(from: 0, to: 64, by: 2).map { Array(key.utf8)[$0...($0 + 1)] }
        let withColons = pairs.map { String(decoding: $0, as: UTF8.self).uppercased() }.joined(separator: ":")
        #expect(try Fingerprint("SHA-256:" + withColons) == one)
        #expect(one.description == "sha256:" + withColons)
        #expect(try Fingerprint("sha1:" + key.prefix(40)).bytes.count == 20)
    }

    @Test(arguments: [
        "", "sha256", "sha256:", "sha256:00", "sha1:" + key, "md5:" + key, key, "sha256:g" + key.dropFirst(),
    ])
    func `what is no fingerprint is refused`(_ text: String) {
        #expect(throws: BlockError.self) { try Fingerprint(text) }
    }
}
