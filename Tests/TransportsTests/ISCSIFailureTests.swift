// iSCSI targets that go away and come back: errors in a limited time, the same unit read on, another one never.
import Block
import Glibc
import LinuxIO
import Support
import Synchronization
import Testing
import Transports

@Suite struct ISCSIFailureTests {
    private func file(_ directory: TemporaryDirectory, _ name: String, seed: UInt64 = 3) throws -> String {
        try directory.makeFile(name, patternBytes(8 << 20, seed: seed))
    }

    @Test func targetThatIsGoneEndsReads() throws {
        try withTemporaryDirectory { directory in
            let target = try ISCSITarget(directory)
            try target.add(try file(directory, "lun"))
            let once = try target.open(1, "reconnect=0&timeout=5")
            let patient = try target.open(1, "reconnect=1&timeout=5")
            _ = try readBytes(once, at: 0, count: 4096)
            _ = try readBytes(patient, at: 0, count: 4096)
            try target.kill()
            for device in [once, patient] {
                for _ in 0..<2 {
                    try requireError(.inputOutput, "nobody is there") {
                        _ = try readBytes(device, at: 0, count: 1 << 20)
                    }
                }
            }
        }
    }

    @Test func targetThatFallsSilentEndsReads() throws {
        try withTemporaryDirectory { directory in
            let target = try ISCSITarget(directory)
            let path = try file(directory, "lun")
            try target.add(path)
            let reader = try target.open(1, "reconnect=1&timeout=1")
            try target.beingSilent {
                try requireError(.inputOutput, "reading") { _ = try readBytes(reader, at: 0, count: 4 << 20) }
            }
            let content = try contentOfFile(path)
            try requireEqual(
                try readBytes(reader, at: 1 << 20, count: 4096), Array(content[(1 << 20)...].prefix(4096)), "")
        }
    }

    @Test func targetThatComesBackIsReadOn() throws {
        try withTemporaryDirectory { directory in
            let target = try ISCSITarget(directory)
            let path = try file(directory, "lun")
            let content = try contentOfFile(path)
            try target.add(path)
            let device = try target.open(1, "reconnect=60&timeout=20")
            _ = try readBytes(device, at: 0, count: 4096)
            try target.kill()
            // Reads wait while it is away.
            let isBack = Atomic<Bool>(false)
            let early = Atomic<Bool>(false)
            try concurrently([
                {
                    let read = try readBytes(device, at: 0, count: 8 << 20)
                    if !isBack.load(ordering: .sequentiallyConsistent) { early.store(true, ordering: .relaxed) }
                    try requireEqual(read, content, "while it was away")
                },
                { try requireEqual(try readBytes(device, at: 5001, count: 9), Array(content[5001..<5010]), "a part") },
                {
                    usleep(300_000)
                    isBack.store(true, ordering: .sequentiallyConsistent)
                    try target.start()
                    try target.add(path)
                },
            ])
            let wasEarly = early.load(ordering: .relaxed)
            #expect(!wasEarly)
        }
    }

    @Test func anotherUnitIsNeverRead() throws {
        try withTemporaryDirectory { directory in
            let target = try ISCSITarget(directory)
            try target.add(try file(directory, "lun"), serial: "FIRST")
            let device = try target.open(1, "reconnect=60&timeout=20")
            _ = try readBytes(device, at: 0, count: 4096)
            try target.kill()
            try target.start()
            try target.add(try file(directory, "other", seed: 9), serial: "SECOND")
            for _ in 0..<2 {
                try requireError(.changed, "another unit") { _ = try readBytes(device, at: 0, count: 4096) }
            }
        }
    }

    @Test func answerWithoutEndIsLeft() throws {
        try withTemporaryDirectory { directory in
            let target = try ISCSITarget(directory)
            let path = try file(directory, "lun")
            let content = try contentOfFile(path)
            try target.add(path)
            let relay = try ISCSIRelay(to: target.port, spoiling: 2048, .floods)
            defer { relay.stop() }
            let uri = target.uri(1, "reconnect=60&timeout=600").replacing(":\(target.port)/", with: ":\(relay.port)/")
            let device = try SourceReference(uri).open()
            let error = #expect(throws: BlockError.self) { _ = try readBytes(device, at: 1 << 20, count: 65536) }
            #expect(error?.message.contains("more than it was asked for") == true, "\(String(describing: error))")
            let other = try readBytes(device, at: 2 << 20, count: 65536)
            try requireEqual(other, Array(content[(2 << 20)...].prefix(65536)), "beside it")
        }
    }

    @Test func namelessUnitIsNotTakenForTheSameAfterALoss() throws {
        try withTemporaryDirectory { directory in
            let target = try ISCSITarget(directory)
            try target.add(try file(directory, "lun"))
            let relay = try ISCSIRelay(to: target.port, spoiling: 2048, .closesNameless)
            defer { relay.stop() }
            let uri = target.uri(1, "reconnect=60&timeout=20").replacing(":\(target.port)/", with: ":\(relay.port)/")
            let device = try SourceReference(uri).open()
            #expect(!device.info.identity.contains { $0.key == "wwn" || $0.key == "serial" })
            _ = try readBytes(device, at: 2 << 20, count: 65536)
            for offset in [1 << 20, 2 << 20] {
                let error = #expect(throws: BlockError.self) {
                    _ = try readBytes(device, at: UInt64(offset), count: 4096)
                }
                #expect(error?.kind == .changed && error?.message.contains("neither a worldwide name nor") == true)
            }
            let spoiled = relay.spoiled.load(ordering: .relaxed)
            #expect(spoiled == 1)
            // Opened anew, it is read.
            _ = try readBytes(try SourceReference(uri).open(), at: 2 << 20, count: 4096)
        }
    }

    @Test(arguments: [ISCSIRelay.Fault.closes, .shortens])
    func readThatTheTargetFailsAtEnds(fault: ISCSIRelay.Fault) throws {
        try withTemporaryDirectory { directory in
            let target = try ISCSITarget(directory)
            let path = try file(directory, "lun")
            let content = try contentOfFile(path)
            try target.add(path)
            let relay = try ISCSIRelay(to: target.port, spoiling: 2048, fault)
            defer { relay.stop() }
            let uri = target.uri(1, "reconnect=60&timeout=20").replacing(":\(target.port)/", with: ":\(relay.port)/")
            let device = try SourceReference(uri).open()
            for round in 1...2 {
                try requireError(.inputOutput, "a read that fails") {
                    _ = try readBytes(device, at: 1 << 20, count: 65536)
                }
                let spoiled = relay.spoiled.load(ordering: .relaxed)
                #expect(spoiled == (fault == .closes ? 3 : 1) * round)
                let other = try readBytes(device, at: 2 << 20, count: 65536)
                try requireEqual(other, Array(content[(2 << 20)...].prefix(65536)), "beside it")
            }
        }
    }
}
