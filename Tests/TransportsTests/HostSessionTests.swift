// Sessions with hosts, counted over processes, and free again when their holder is gone, however it went.
import Block
import Glibc
import LinuxIO
import Support
import Testing
import Transports

private func limit(_ count: Int, _ key: String = "host esx1") -> SessionLimit {
    SessionLimit(key: key, limit: count, origin: "a test")
}

@Suite struct HostSessionTests {
    @Test func areCountedAndEndWithTheirHolder() throws {
        try withTemporaryDirectory { directory in
            let sessions = HostSessions(stateDirectory: directory.file("state"))
            #expect(try sessions.holders(of: "host esx1").isEmpty)
            var first = try sessions.take([limit(2)], for: "web\ndisk 1")
            let second = try sessions.take([limit(2)], for: "db")
            #expect(first != nil && second != nil)
            let holders = try sessions.holders(of: "host esx1")
            #expect(Set(holders.map(\.purpose)) == ["web", "db"] && holders.allSatisfy { $0.process == getpid() })
            #expect(try sessions.take([limit(2)], for: "more") == nil)
            // Another host has its own, and another limit is one over the same sessions.
            #expect(try sessions.holders(of: "host esx.1").isEmpty && sessions.take([limit(3)], for: "more") != nil)
            first = nil
            #expect(try sessions.holders(of: "host esx1").map(\.purpose) == ["db"])
            #expect(try sessions.take([limit(2)], for: "again") != nil)
            withExtendedLifetime(second) {}
        }
    }

    @Test func ofAHostAndItsManagerAreTakenTogetherOrNotAtAll() throws {
        try withTemporaryDirectory { directory in
            let sessions = HostSessions(stateDirectory: directory.file("state"))
            let manager = try sessions.take([limit(1, "manager vc")], for: "others")
            #expect(try sessions.take([limit(9), limit(1, "manager vc")], for: "web") == nil)
            #expect(try sessions.holders(of: "host esx1").isEmpty)
            withExtendedLifetime(manager) {}
            try requireError(.unsupported, "no sessions at all") { _ = try sessions.take([limit(0)], for: "web") }
            #expect(try sessions.take([], for: "a host without limits") != nil)
        }
    }

    @Test func someWaitForOthersToEnd() throws {
        try withTemporaryDirectory { directory in
            let sessions = HostSessions(stateDirectory: directory.file("state"))
            let held = Locked(try sessions.take([limit(1)], for: "first"))
            let released = Locked(false)
            try concurrently([
                {
                    usleep(200_000)
                    released.withLock { $0 = true }
                    held.withLock { $0 = nil }
                },
                {
                    let session = try sessions.take([limit(1)], for: "second", seconds: 60)
                    #expect(session != nil && released.withLock { $0 })
                },
            ])
        }
    }

    @Test func areNeverMoreThanTheLimit() throws {
        try withTemporaryDirectory(in: placeInMemory) { directory in
            let sessions = HostSessions(stateDirectory: directory.file("state"))
            let now = Locked((count: 0, most: 0))
            let user: @Sendable () throws -> Void = {
                for _ in 0..<10 {
                    let session = try sessions.take([limit(3)], for: "one of many", seconds: 60)
                    try require(session != nil, "no session within a minute")
                    now.withLock {
                        $0.count += 1
                        $0.most = max($0.most, $0.count)
                    }
                    sched_yield()
                    now.withLock { $0.count -= 1 }
                    withExtendedLifetime(session) {}
                }
            }
            try concurrently(Array(repeating: user, count: 8))
            #expect((1...3).contains(now.withLock { $0.most }))
        }
    }

    @Test(arguments: ["", "host ../../x", "host " + String(repeating: "ä", count: 500), "a/b"])
    func keysAreNoPaths(key: String) throws {
        try withTemporaryDirectory { directory in
            let sessions = HostSessions(stateDirectory: directory.file("state"))
            let held = try sessions.take([limit(1, "x\(key)")], for: "web")
            #expect(try held != nil && sessions.holders(of: "x\(key)").count == 1)
            #expect(try namesInDirectory(directory.path) == ["state"])
            #expect(try sessions.holders(of: "x\(key)ä").isEmpty)
        }
    }
}
