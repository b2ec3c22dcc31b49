// The journal of a copy: what it says after a crash at any byte, and to whom.
import Block
import Glibc
import LinuxIO
import Support
import Testing

@testable import Backup

private let identity = CopyIdentity(source: "disk a", scope: "everything", target: "file 1:2, 3 bytes")

/// A journal with three ranges noted.
private func makeJournal(_ directory: TemporaryDirectory) throws -> String {
    let journal = try CopyJournal.begin(directory.file("journal"), identity)
    for end in [10, 25, 70] as [UInt64] { try journal.note(settledEnd: end) }
    return journal.path
}

@Suite struct CopyJournalTests {
    @Test func `what was noted is found again and goes on`() throws {
        try withTemporaryDirectory { directory in
            let path = try makeJournal(directory)
            let (journal, finished) = try CopyJournal.resume(path, identity)
            #expect(finished.ranges == [0..<70])
            try journal.note(settledEnd: 60)
            try journal.note(settledEnd: 90)
            #expect(try CopyJournal.resume(path, identity).1.ranges == [0..<90])
            try journal.remove()
            #expect(access(path, F_OK) != 0)
        }
    }

    @Test func `cut off anywhere, it says what is whole`() throws {
        try withTemporaryDirectory { directory in
            let bytes = try contentOfFile(try makeJournal(directory))
            for count in 0..<bytes.count {
                let path = try directory.makeFile("cut", Array(bytes[..<count]))
                guard let (journal, finished) = try? CopyJournal.resume(path, identity) else { continue }
                #expect([0, 10, 25].contains(finished.byteCount))
                // Goes on behind the last whole line.
                try journal.note(settledEnd: 80)
                #expect(try CopyJournal.resume(path, identity).1.ranges == [0..<80])
            }
        }
    }

    @Test func `a changed byte is found`() throws {
        try withTemporaryDirectory { directory in
            let bytes = try contentOfFile(try makeJournal(directory))
            for index in bytes.indices {
                var changed = bytes
                changed[index] ^= 1
                let path = try directory.makeFile("changed", changed)
                // Only of the end may something be lost, because a crash may do that.
                if let (_, finished) = try? CopyJournal.resume(path, identity) {
                    #expect(finished.ranges == [0..<25] || finished.ranges == [0..<10])
                }
            }
        }
    }

    @Test(arguments: [
        CopyIdentity(source: "disk b", scope: "everything", target: "file 1:2, 3 bytes"),
        CopyIdentity(source: "disk a", scope: "changes", target: "file 1:2, 3 bytes"),
        CopyIdentity(source: "disk a", scope: "everything", target: "file 1:3, 3 bytes"),
    ])
    func `another copy is refused`(other: CopyIdentity) throws {
        try withTemporaryDirectory { directory in
            let path = try makeJournal(directory)
            try requireError(.denied, "resuming") { _ = try CopyJournal.resume(path, other) }
        }
    }
}
