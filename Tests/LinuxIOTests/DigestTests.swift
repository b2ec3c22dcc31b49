// Digests against the system's own tools, and small files.
import Block
import LinuxIO
import Support
import Testing

@Suite struct DigestTests {
    @Test(
        .enabled(if: Tool.exists("sha256sum") && Tool.exists("sha512sum") && Tool.exists("md5sum")),
        arguments: ["md5", "sha256", "sha512"], [0, 1, 63, 64, 65, 1_000_003])
    func agreesWithTheSystemsTool(algorithm: String, count: Int) throws {
        try withTemporaryDirectory { directory in
            let content = patternBytes(count, seed: 1)
            let path = try directory.makeFile("data", content)
            var digest = try Digest(algorithm)
            // In pieces that fit no block.
            var done = 0
            while done < count {
                let part = min(1001, count - done)
                try content[done..<(done + part)].withUnsafeBytes { try digest.update($0) }
                done += part
            }
            let tool = try Tool.output("\(algorithm)sum", [path])
            #expect(try digest.finish() == tool.split(separator: " ").first.map(String.init))
        }
    }

    @Test func refusesWhatItDoesNotKnow() throws {
        for name in ["", "sha257", "no such digest"] {
            try requireError(.unsupported, name) { _ = try Digest(name) }
        }
    }
}

@Suite struct SmallFileTests {
    @Test func readsUpTo64KiB() throws {
        try withTemporaryDirectory { directory in
            for count in [0, 1, 65535, 65536] {
                let content = patternBytes(count, seed: 2)
                #expect(try readSmallFile(try directory.makeFile("file", content)) == content)
            }
            let large = try directory.makeFile("file", patternBytes(70_000, seed: 2))
            try requireError(.tooLarge, "a larger file") { _ = try readSmallFile(large) }
            #expect(try readSmallFile(large, limit: 70_000).count == 70_000)
            try requireError(.notFound, "no file") { _ = try readSmallFile(directory.file("nothing")) }
        }
    }
}
