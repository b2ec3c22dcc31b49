// Small files that are written in one step: by several at once, and after somebody who did not come to the end.
import Block
import Glibc
import LinuxIO
import Support
import Testing

@Suite struct DurableFileTests {
    @Test func writersAtOnceDoNotMix() throws {
        try withTemporaryDirectory { directory in
            let path = directory.file("small")
            let contents = (1...4).map { [UInt8](repeating: UInt8($0), count: 50_000 * $0) }
            let failures = Locked<[BlockError]>([])
            let running = Locked(contents.count)
            for content in contents {
                try startThread(name: "writer") {
                    for _ in 0..<20 {
                        do throws(BlockError) { try writeDurably(path, content) } catch {
                            failures.withLock { $0.append(error) }
                        }
                    }
                    running.withLock { $0 -= 1 }
                }
            }
            var seen = 0
            while running.withLock({ $0 }) > 0 {
                if access(path, F_OK) == 0 {
                    let found = try contentOfFile(path)
                    try require(contents.contains(found), "\(found.count) bytes that nobody has written")
                    seen += 1
                }
                usleep(1000)
            }
            #expect(failures.withLock { $0 }.isEmpty && seen > 0)
            #expect(contents.contains(try contentOfFile(path)))
            #expect(try namesInDirectory(directory.path) == ["small"])
        }
    }

    @Test func whatSomebodyHasLeftIsRemovedAndWhatSomebodyWritesIsNot() throws {
        try withTemporaryDirectory { directory in
            let path = directory.file("small")
            _ = try directory.makeFile("small.0123456789abcdef.partial", [1])
            let others = ["other.0123456789abcdef.partial", "small.partial", "small.0123456789abcdeg.partial"]
            for name in others { _ = try directory.makeFile(name, [1]) }
            let going = try directory.makeFile("small.fedcba9876543210.partial", [1])
            let lock = try FileLock.take(going)
            try writeDurably(path, [7])
            withExtendedLifetime(lock) {}
            #expect(try contentOfFile(path) == [7])
            #expect(
                try namesInDirectory(directory.path)
                    == (others + ["small", "small.fedcba9876543210.partial"]).sorted())
        }
    }

    @Test func aSlashEndsANameWhateverFollows() {
        #expect(directoryName("/a/\u{301}b") == "/a")
        #expect(directoryName("/a/b//") == "/a" && directoryName("/a") == "/" && directoryName("a") == ".")
    }
}
