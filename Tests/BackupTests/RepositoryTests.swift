// A repository itself: where one may be made, what of it is refused.
import Backup
import Block
import Glibc
import LinuxIO
import Support
import Testing

@Suite struct RepositoryTests {
    @Test func aRepositoryIsMadeInAnEmptyDirectoryOnly() throws {
        try withTemporaryDirectory { directory in
            _ = try directory.makeFile("file", [1])
            try requireError(.invalid, "not empty") { _ = try Repository.create(at: directory.path) }
            let path = directory.file("one")
            _ = try Repository.create(at: path)
            #expect(try Repository.open(at: path).driver == .qcow2)
            try requireError(.invalid, "twice") { _ = try Repository.create(at: path) }
            try requireError(.invalid, "one in another") { _ = try Repository.create(at: "\(path)/vms/two/three") }
            try requireError(.notFound, "none") { _ = try Repository.open(at: directory.path) }
        }
    }

    @Test(arguments: [
        (#""features" : []"#, #""features" : ["dedup"]"#, "dedup"), (#""format" : 1"#, #""format" : 2"#, "2"),
        (#""driver" : "qcow2""#, #""driver" : "tape""#, "tape"),
    ])
    func whatIsNotKnownIsRefused(_ change: (old: String, new: String, word: String)) throws {
        try withTemporaryDirectory { directory in
            let path = directory.file("repository")
            _ = try Repository.create(at: path)
            let file = "\(path)/diskgate-repository.json"
            let text = String(decoding: try contentOfFile(file), as: UTF8.self)
                .replacing(#""features" : [\#n\#n  ]"#, with: #""features" : []"#)
            try require(text.contains(change.old), text)
            unlink(file)
            _ = try directory.makeFile(
                "repository/diskgate-repository.json", Array(text.replacing(change.old, with: change.new).utf8))
            do {
                _ = try Repository.open(at: path)
                Issue.record("it was opened")
            } catch let error as BlockError {
                #expect(error.kind == .unsupported)
                #expect(error.message.contains(change.word))
            }
        }
    }

    @Test func spaceIsAskedForBeforeARun() throws {
        try withTemporaryDirectory { directory in
            let repository = try Repository.create(at: directory.file("repository"))
            try repository.checkSpace(1 << 20)
            let free = try repository.freeSpace()
            try requireError(.noSpace, "too much") { try repository.checkSpace(free) }
            try requireError(.noSpace, "far too much") { try repository.checkSpace(.max) }
        }
    }
}
