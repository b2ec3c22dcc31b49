// Lies about what has changed: planted at random, found as often as promised, and blamed on the right points.
import Block
import LinuxIO
import Support
import Testing

@testable import Backup

@Suite struct ChangeSampleTests {
    private let chunk = 65536
    private let count = 256

    /// A disk like the newest point of a machine, in memory, on which something may be changed unseen.
    private func withDisk(_ body: (ModelMachine, RestorePoint, RawFileDevice) throws -> Void) throws {
        try withTemporaryDirectory { directory in
            let repository = try Repository.create(at: directory.file("repository"))
            var disk = ModelDisk("vda", size: count * chunk)
            disk.bytes = patternBytes(count * chunk, seed: 5)
            var machine = try ModelMachine(repository, disks: [disk], seed: 1)
            let point = try machine.makePoint()
            let device = try NamelessFile.memory(size: UInt64(count * chunk))
            try machine.disks[0].bytes.withUnsafeBytes { try device.write($0, at: 0, durable: false) }
            try body(machine, point, device)
        }
    }

    private func sample(_ machine: ModelMachine, _ point: RestorePoint, _ device: RawFileDevice, dirty: [Int] = [])
        throws -> ChangeSample
    {
        let bitmap = try DirtyBitmap(size: device.info.size, granularity: UInt64(chunk))
        for index in dirty { bitmap.set(UInt64(index * chunk)..<UInt64((index + 1) * chunk)) }
        return try ChangeSample(
            device: device, dirty: bitmap, disk: "vda", point: point, repository: machine.repository)
    }

    /// Changes one byte of a chunk, or changes it back.
    private func flip(_ index: Int, _ device: RawFileDevice) throws {
        var byte: [UInt8] = [0]
        try byte.withUnsafeMutableBytes { try device.read(into: $0, at: UInt64(index * chunk + 77)) }
        byte[0] ^= 0x40
        try byte.withUnsafeBytes { try device.write($0, at: UInt64(index * chunk + 77), durable: false) }
    }

    @Test func liesAreFoundAsOftenAsPromised() throws {
        try withDisk { machine, point, device in
            let seed = runSeed
            var generator = SeededGenerator(seed: seed)
            let check = try sample(machine, point, device)
            // 32 of 256 chunks are looked at; 8 have changed: found with 1 - (1 - 8/256)^32 = 0.64 at least.
            let (looked, lies, rounds) = (32, 8, 200)
            var found = 0
            for _ in 0..<rounds {
                var planted: Set<Int> = []
                while planted.count < lies { planted.insert(Int(generator.next() % UInt64(count))) }
                for index in planted { try flip(index, device) }
                let result = try check.take(budget: UInt64(looked * chunk), Cancellation())
                #expect(result.chunks == UInt64(looked))
                for wrong in result.mismatches { #expect(planted.contains(Int(wrong)), "SEED=\(seed)") }
                if !result.mismatches.isEmpty { found += 1 }
                for index in planted { try flip(index, device) }
            }
            // 128 are expected; with 103 or fewer of 200 something is wrong (one chance in ten thousand).
            #expect(found > 103, "\(found) of \(rounds), SEED=\(seed)")
            // Everything is looked at, and everything is found.
            try flip(200, device)
            let all = try check.take(budget: .max, Cancellation())
            #expect(all.mismatches == [200] && all.chunks == UInt64(count))
        }
    }

    @Test func runAfterRunLooksAtEverything() throws {
        try withDisk { machine, _, device in
            var machine = machine
            var point = try #require(try machine.repository.points(of: machine.machine).last)
            try flip(131, device)
            var runs = 0
            while runs < 8 {
                let result = try sample(machine, point, device).take(budget: UInt64(32 * chunk), Cancellation())
                runs += 1
                if !result.mismatches.isEmpty { break }
                point = try machine.makePoint { facts in
                    var disk = PointFacts.Disk()
                    disk.checked = result.places
                    facts.disks["vda"] = disk
                }
            }
            let last = try sample(machine, point, device).take(budget: .max, Cancellation())
            #expect(runs <= 8 && last.mismatches == [131])
        }
    }

    @Test func neighboursOfChangesAreLookedAt() throws {
        try withDisk { machine, point, device in
            for index in [99, 101] { try flip(index, device) }
            let check = try sample(machine, point, device, dirty: [100])
            let result = try check.take(budget: UInt64(8 * chunk), Cancellation())
            #expect(result.mismatches == [99, 101] && result.clean == UInt64(count - 1))
        }
    }

    @Test func pointsSinceTheChunkWasRightAreSuspect() throws {
        try withDisk { machine, first, device in
            var machine = machine
            let second = try machine.makePoint()
            machine.disks[0].bytes[40 * chunk] ^= 1
            machine.disks[0].changed = [40]
            let third = try machine.makePoint()
            let check = try sample(machine, third, device)
            // 40 was stored by the third point, so that its loss came later; 50 by the first one only.
            try flip(50, device)
            let result = try check.take(budget: .max, Cancellation())
            #expect(result.mismatches == [40, 50])
            #expect(try check.suspects(of: result).map(\.point.sequence) == [second.sequence, third.sequence])
            #expect(first.sequence == 1)
        }
    }
}
