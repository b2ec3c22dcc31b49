// What a run's ledger remembers, who may take it over, and what a crash in the middle of a line leaves.
import Block
import Glibc
import LinuxIO
import Support
import Testing
import Transports

@Suite struct RunLedgerTests {
    @Test func remembersWhatIsNotSettled() throws {
        try withTemporaryDirectory { directory in
            let state = directory.file("state")
            do {
                let ledger = try RunLedger.begin(stateDirectory: state, machine: "qmp+unix:/x", repository: "/r")
                let bitmap = try ledger.intend("qemu.bitmap", ["node": "disk0"])
                let scratch = try ledger.intend("qemu.scratch", ["path": "/s"])
                try ledger.learn(scratch, ["inode": "17"])
                try ledger.settle(bitmap)
                #expect(ledger.obligations.map(\.kind) == ["qemu.scratch"])
                // While it is going on, nobody takes it, and everybody sees it.
                #expect(try RunLedger.takeAbandoned(stateDirectory: state).ledgers.isEmpty)
                let listed = try RunLedger.list(stateDirectory: state).runs
                #expect(listed.count == 1 && listed[0].isGoingOn && listed[0].run == ledger.run)
            }
            let taken = try RunLedger.takeAbandoned(stateDirectory: state).ledgers
            let ledger = try #require(taken.first)
            #expect(taken.count == 1 && ledger.run.machine == "qmp+unix:/x" && ledger.run.repository == "/r")
            let left = try #require(ledger.obligations.first)
            #expect(left.details == ["path": "/s", "inode": "17"])
            // Once taken it is held again, and numbers go on.
            #expect(try RunLedger.takeAbandoned(stateDirectory: state).ledgers.isEmpty)
            #expect(try ledger.intend("qemu.export", [:]).id > left.id)
            for obligation in ledger.obligations { try ledger.settle(obligation) }
            try ledger.end()
            #expect(try RunLedger.list(stateDirectory: state).runs.isEmpty)
        }
    }

    @Test func severalThingsAreOnesOfTheirOwn() throws {
        try withTemporaryDirectory { directory in
            let state = directory.file("state")
            do {
                let ledger = try RunLedger.begin(stateDirectory: state, machine: "m", repository: nil)
                _ = try ledger.intend("a.first", [:])
                let made = try ledger.intend([("a.second", ["x": "1"]), ("a.third", [:])])
                #expect(made == Array(ledger.obligations.dropFirst()))
                try ledger.settle(made[0])
            }
            let ledger = try #require(try RunLedger.takeAbandoned(stateDirectory: state).ledgers.first)
            #expect(ledger.obligations.map(\.kind) == ["a.first", "a.third"])
            #expect(Set(ledger.obligations.map(\.id)).count == 2)
            let known = ledger.obligations.map(\.id)
            #expect(!known.contains(try ledger.intend("a.fourth", [:]).id))
        }
    }

    @Test func endKeepsWhatIsOpen() throws {
        try withTemporaryDirectory { directory in
            let state = directory.file("state")
            let ledger = try RunLedger.begin(stateDirectory: state, machine: "", repository: nil)
            let one = try ledger.intend("a.b", [:])
            try ledger.end()
            #expect(access(ledger.path, F_OK) == 0)
            try ledger.settle(one)
            try ledger.end()
            #expect(access(ledger.path, F_OK) != 0)
        }
    }

    @Test func halfALineDoesNotCount() throws {
        try withTemporaryDirectory { directory in
            let state = directory.file("state")
            var path = ""
            do {
                let ledger = try RunLedger.begin(stateDirectory: state, machine: "m", repository: nil)
                _ = try ledger.intend("a.first", [:])
                path = ledger.path
            }
            let whole = try readSmallFile(path)
            for cut in 1..<whole.count {
                try writeDurably(path, Array(whole[..<(whole.count - cut)]))
                guard let ledger = try? RunLedger.takeAbandoned(stateDirectory: state).ledgers.first else { continue }
                #expect(ledger.obligations.count <= 1)
                let next = try ledger.intend("a.second", [:])
                let again = try #require(try RunLedger.list(stateDirectory: state).runs.first)
                #expect(again.obligations.contains(next), "cut off \(cut) bytes")
            }
        }
    }

    @Test func durableFilesAreReplacedWhole() throws {
        try withTemporaryDirectory { directory in
            let path = directory.file("file")
            try writeDurably(path, [1, 2, 3])
            try writeDurably(path, [])
            #expect(try readSmallFile(path).isEmpty)
            #expect(try namesInDirectory(directory.path) == ["file"])
            try requireError(.notFound, "no directory") { try writeDurably(directory.file("no/such"), [1]) }
            try makeDirectories(directory.file("a/b/c"))
            try makeDirectories(directory.file("a/b/c"))
            try requireError(.invalid, "a file in the way") { try makeDirectories(path) }
        }
    }

    @Test func locksKeepOthersOut() throws {
        try withTemporaryDirectory { directory in
            let path = directory.file("lock")
            let reader = try #require(try FileLock.take(path, .shared))
            let second = try #require(try FileLock.take(path, .shared))
            #expect(try FileLock.take(path) == nil)
            withExtendedLifetime((reader, second)) {}
        }
    }

    @Test func oneBadFileKeepsNoOther() throws {
        try withTemporaryDirectory { directory in
            let state = directory.file("state")
            do {
                let first = try RunLedger.begin(stateDirectory: state, machine: "a", repository: nil)
                _ = try first.intend("a.b", [:])
                // Half a line that another follows is a line that was cut off; a whole one that makes no sense is not.
                let bytes = try readSmallFile(first.path)
                try writeDurably(first.path, bytes + Array("{\"made\":{\"id\":7}}\n".utf8) + bytes)
            }
            try writeDurably(RunLedger.directory(in: state) + "/bad.run", Array("nothing".utf8))
            let (ledgers, problems) = try RunLedger.takeAbandoned(stateDirectory: state)
            #expect(ledgers.count == 1 && problems.count == 1)
            let ledger = try #require(ledgers.first)
            #expect(ledger.damage != nil)
            for obligation in ledger.obligations { try ledger.settle(obligation) }
            try ledger.end()
            #expect(access(ledger.path, F_OK) == 0)
        }
    }

    @Test(arguments: [Int.max, Int.max - 1, (1 << 53) + 1, 0, -1]) func numbersNoLedgerGetsToAreDamage(
        _ number: Int
    ) throws {
        try withTemporaryDirectory { directory in
            let state = directory.file("state")
            do {
                let ledger = try RunLedger.begin(stateDirectory: state, machine: "a", repository: nil)
                let line = "{\"made\":{\"id\":\(number),\"kind\":\"a.b\",\"details\":{}}}\n"
                try writeDurably(ledger.path, try readSmallFile(ledger.path) + Array(line.utf8))
            }
            let ledger = try #require(try RunLedger.takeAbandoned(stateDirectory: state).ledgers.first)
            #expect(ledger.damage != nil && ledger.obligations.isEmpty)
            let next = try ledger.intend("a.second", [:])
            #expect(ledger.obligations == [next])
        }
    }
}
