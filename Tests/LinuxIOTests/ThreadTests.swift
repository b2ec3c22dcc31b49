// Lanes, rings and threads: every job runs, every read completes, idle threads end.
import Block
import Glibc
import LinuxIO
import Support
import Synchronization
import Testing

/// Threads of this process with a name.
private func threadCount(_ name: String) -> Int {
    guard let folder = opendir("/proc/self/task") else { return 0 }
    defer { closedir(folder) }
    var count = 0
    while let entry = readdir(folder) {
        let id = withUnsafeBytes(of: &entry.pointee.d_name) { String(decoding: $0.prefix { $0 != 0 }, as: UTF8.self) }
        if let text = try? readSmallFile("/proc/self/task/\(id)/comm"),
            String(decoding: text, as: UTF8.self) == "\(name)\n"
        {
            count += 1
        }
    }
    return count
}

@Suite struct LaneTests {
    /// More jobs than threads, and more than the queue compacts at.
    @Test func everyJobRunsOnce() throws {
        let count = 5000
        let ran = Locked([Int](repeating: 0, count: count))
        let left = Locked(count)
        let done = try Gate()
        let lanes = Lanes()
        for job in 0..<count {
            lanes.submit {
                ran.withLock { $0[job] += 1 }
                if left.withLock({
                    $0 -= 1; return $0
                }) == 0 {
                    done.open()
                }
            }
        }
        done.wait()
        #expect(ran.withLock { $0.allSatisfy { $0 == 1 } })
    }

    /// Jobs that block do not keep others waiting as long as there are fewer of them than threads; and there are never
    /// more threads than the most.
    @Test func blockedJobsTakeAThreadEach() throws {
        let lanes = Lanes()
        let (arrived, gate, finished) = (try Gate(), try Gate(), try Gate())
        let running = Locked((now: 0, most: 0))
        let count = Lanes.threadsMax + 5
        let left = Locked(count)
        for _ in 0..<count {
            lanes.submit {
                running.withLock {
                    $0.now += 1
                    $0.most = max($0.most, $0.now)
                }
                arrived.open()
                gate.wait()
                running.withLock { $0.now -= 1 }
                if left.withLock({
                    $0 -= 1; return $0
                }) == 0 {
                    finished.open()
                }
            }
        }
        for _ in 0..<Lanes.threadsMax { arrived.wait() }
        #expect(running.withLock { $0.now } == Lanes.threadsMax)
        for _ in 0..<count { gate.open() }
        finished.wait()
        #expect(running.withLock { $0.most } == Lanes.threadsMax)
    }

    /// The threads keep their lanes; so lanes that are gone have none. Idle threads end some seconds after their last
    /// job, those of retired lanes at once.
    @Test(.timeLimit(.minutes(1)), arguments: [false, true])
    func idleThreadsEnd(retired: Bool) throws {
        weak var ended: Lanes?
        do {
            let lanes = Lanes()
            ended = lanes
            let done = try Gate()
            let left = Locked(3)
            for _ in 0..<3 {
                lanes.submit {
                    if left.withLock({
                        $0 -= 1; return $0
                    }) == 0 {
                        done.open()
                    }
                }
            }
            done.wait()
            if retired {
                lanes.retire()
                // What is submitted now still runs.
                lanes.submit { done.open() }
                done.wait()
            }
        }
        while ended != nil { usleep(10_000) }
    }

    @Test func threadsCarryTheirName() throws {
        let name = Locked("")
        let done = try Gate()
        try startThread(name: "a-name-that-is-too-long") {
            // The name is set by the thread that started this one.
            while threadCount("a-name-that-is-") == 0 { sched_yield() }
            name.withLock { $0 = "found" }
            done.open()
        }
        done.wait()
        #expect(name.withLock { $0 } == "found")
    }
}

@Suite struct RingTests {
    @Test func readsComplete() throws {
        try withTemporaryDirectory { directory in
            let content = patternBytes(1 << 20, seed: 1)
            let file = try Descriptor.open(try directory.makeFile("disk", content), O_RDONLY)
            guard let ring = Ring(entries: 8) else { return }
            let buffer = Buffer(count: 8 * 4096)
            for index in 0..<8 {
                let part = UnsafeMutableRawBufferPointer(rebasing: buffer.bytes[index * 4096..<(index + 1) * 4096])
                try require(ring.read(file.number, into: part, at: UInt64(7 - index) * 65536, tag: UInt64(100 + index)))
            }
            try require(!ring.read(file.number, into: buffer.bytes, at: 0, tag: 1), "a full queue took a ninth read")
            var results: [UInt64: Int32] = [:]
            while results.count < 8 {
                ring.submit(waitingFor: 1)
                _ = ring.reap { results[$0.tag] = $0.result }
            }
            #expect(results == Dictionary(uniqueKeysWithValues: (0..<8).map { (UInt64(100 + $0), 4096) }))
            for index in 0..<8 {
                let from = (7 - index) * 65536
                try requireEqual(
                    Array(buffer.readable[index * 4096..<(index + 1) * 4096]), content[from..<(from + 4096)],
                    "read \(index)")
            }
        }
    }

    @Test func failuresAreNegativeErrno() throws {
        guard let ring = Ring(entries: 2) else { return }
        let buffer = Buffer(count: 4096)
        try require(ring.read(-1, into: buffer.bytes, at: 0, tag: 9))
        var result: Int32 = 0
        ring.submit(waitingFor: 1)
        let count = ring.reap { result = $0.result }
        #expect(count == 1)
        #expect(result == -EBADF)
    }

    @Test func pollsOnce() throws {
        guard let ring = Ring(entries: 4) else { return }
        let event = try Gate()
        let never = try Gate()
        try require(ring.pollReadable(event.reading.number, tag: 1))
        try require(ring.pollReadable(never.reading.number, tag: 2))
        ring.submit(waitingFor: 0)
        event.open()
        var tags: [UInt64: Int32] = [:]
        while tags[1] == nil {
            ring.submit(waitingFor: 1)
            _ = ring.reap { tags[$0.tag] = $0.result }
        }
        #expect(tags.keys.sorted() == [1])
    }

    @Test func isNilWhereNoneCanBeHad() throws {
        for entries: UInt32 in [0, .max] {
            let ring = Ring(entries: entries)
            try require(ring == nil, "a ring of \(entries) entries")
        }
    }
}

/// A gate between threads: `wait` returns once for each `open`, and its descriptor is readable while it is open.
private final class Gate: Sendable {
    let reading: Descriptor
    private let writing: Descriptor

    init() throws {
        var ends: [Int32] = [-1, -1]
        try require(pipe(&ends) == 0, "making a pipe")
        (reading, writing) = (Descriptor(owning: ends[0]), Descriptor(owning: ends[1]))
    }

    func open() {
        var byte: UInt8 = 1
        _ = write(writing.number, &byte, 1)
    }

    func wait() {
        var byte: UInt8 = 0
        _ = read(reading.number, &byte, 1)
    }
}
