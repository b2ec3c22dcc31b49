// Hashes beside a restore point: found again for every chunk, merged as images are, never believed blindly.
@testable import Backup
import Block
import Glibc
import LinuxIO
import Support
import Testing

@Suite struct ChunkHashTests {
    private let size = ChunkHashes.chunkSize

    /// Records random chunks; returns what each is.
    private func record(
        _ path: String, chunks: UInt64, tail: Int = 65536, _ random: inout SeededGenerator
    ) throws -> [UInt64: ChunkHash] {
        let writer = try ChunkHashWriter(path: path, diskSize: (chunks - 1) * size + UInt64(tail))
        var expected: [UInt64: ChunkHash] = [:]
        let buffer = Buffer(count: 3 * Int(size))
        for first in stride(from: 0, to: chunks, by: 3).shuffled(using: &random) {
            let count = min(UInt64.random(in: 0...3, using: &random), chunks - first)
            if count == 0 { continue }
            if random.oneIn(4) {
                try writer.recordZeros(first..<(first + count))
                for chunk in first..<(first + count) { expected[chunk] = .zero }
                continue
            }
            buffer.bytes.initializeMemory(as: UInt8.self, repeating: 0)
            for index in 0..<Int(count) {
                let chunk = UnsafeMutableRawBufferPointer(
                    rebasing: buffer.bytes[(index * Int(size))..<((index + 1) * Int(size))])
                chunk.storeBytes(of: random.oneIn(5) ? 0 : random.next(), as: UInt64.self)
                expected[first + UInt64(index)] = ChunkHash(of: UnsafeRawBufferPointer(chunk))
            }
            let bytes = first + count == chunks ? Int(count - 1) * Int(size) + tail : Int(count * size)
            try writer.record(first, UnsafeRawBufferPointer(rebasing: buffer.readable[..<bytes]))
        }
        try writer.finish()
        return expected
    }

    private func expect(
        _ path: String, _ expected: [UInt64: ChunkHash], chunks: UInt64, _ random: inout SeededGenerator
    )
        throws
    {
        let hashes = try ChunkHashes.open(path)
        for chunk in Array(0..<(chunks + 2)) + (0..<(chunks + 2)).shuffled(using: &random) {
            let found = try hashes.hash(of: chunk)
            if found != expected[chunk] ?? .absent { throw CheckFailure("chunk \(chunk) of \(path) is \(found)") }
        }
        let data = expected.values.count { if case .data = $0 { true } else { false } }
        try check(hashes.dataChunks == UInt64(data), "\(hashes.dataChunks) chunks of data, not \(data)")
    }

    private func check(_ condition: Bool, _ text: String) throws { if !condition { throw CheckFailure(text) } }

    @Test func everyChunkIsFoundAgain() throws {
        try withTemporaryDirectory { folder in
            try withSeed { random in
                for (index, chunks) in [1, 2, 64, 700].enumerated() {
                    let path = folder.file("\(index).hashes")
                    let expected = try record(path, chunks: UInt64(chunks), tail: index % 2 == 0 ? 65536 : 512, &random)
                    try expect(path, expected, chunks: UInt64(chunks), &random)
                }
            }
        }
    }

    @Test func mergeHasTheChildsChunksAndTheBasesBelow() throws {
        try withTemporaryDirectory { folder in
            try withSeed { random in
                for round in 0..<8 {
                    let (base, child, merged) = (
                        folder.file("\(round)b"), folder.file("\(round)c"), folder.file("\(round)m")
                    )
                    let lower = try record(base, chunks: UInt64.random(in: 1...90, using: &random), tail: 1024, &random)
                    let upper = try record(child, chunks: 100, &random)
                    try ChunkHashes.merge(base: base, child: child, into: merged)
                    try expect(merged, lower.merging(upper) { $1 }, chunks: 100, &random)
                }
            }
        }
    }

    @Test func hugeDiskTakesNoMemory() throws {
        try withTemporaryDirectory { folder in
            let path = folder.file("huge.hashes")
            let last: UInt64 = (64 << 40) / size - 1
            let writer = try ChunkHashWriter(path: path, diskSize: 64 << 40)
            let chunk = Buffer(count: Int(size))
            chunk.bytes.initializeMemory(as: UInt8.self, repeating: 7)
            try writer.record(last, chunk.readable)
            try writer.record(5, chunk.readable)
            #expect(throws: BlockError.self) { try writer.record(last + 1, chunk.readable) }
            #expect(throws: BlockError.self) { try writer.recordZeros(last..<(last + 2)) }
            try writer.finish()
            let hashes = try ChunkHashes.open(path)
            for index in [5, last] { #expect(try hashes.hash(of: index) == ChunkHash(of: chunk.readable)) }
            #expect(try hashes.hash(of: 6) == .absent)
            var status = stat()
            #expect(stat(path, &status) == 0 && status.st_size == 64 + 2 * 24 + 2 * 16)
        }
    }

    @Test func damagedFilesAreErrorsOrWrongHashesNothingElse() throws {
        try withTemporaryDirectory { folder in
            try withSeed { random in
                let path = folder.file("good")
                _ = try record(path, chunks: 40, &random)
                let file = try Descriptor.open(path, O_RDONLY)
                let count = Int(try file.status().st_size)
                var good = [UInt8](repeating: 0, count: count)
                _ = good.withUnsafeMutableBytes { pread(file.number, $0.baseAddress, count, 0) }
                var refused = 0
                for round in 0..<300 {
                    var bytes = good
                    switch round % 3 {
                    case 0: bytes.removeLast(Int.random(in: 1...count, using: &random))
                    case 1:
                        bytes[Int.random(in: 0..<min(count, 400), using: &random)] ^= UInt8.random(
                            in: 1...255, using: &random)
                    default:
                        for _ in 0..<8 { bytes[Int.random(in: 0..<64, using: &random)] = random.oneIn(2) ? 0xFF : 0x7F }
                    }
                    let damaged = folder.file("damaged")
                    try writeDurably(damaged, bytes)
                    guard let hashes = try? ChunkHashes.open(damaged) else {
                        refused += 1
                        continue
                    }
                    for chunk in 0..<50 { _ = try hashes.hash(of: UInt64(chunk)) }
                }
                try check(refused > 200, "only \(refused) damaged files were refused")
            }
        }
    }
}
