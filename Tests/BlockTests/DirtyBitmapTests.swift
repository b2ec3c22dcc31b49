// The dirty bitmap: bits, runs, limits, and threads that change it while others look.
import Block
import Support
import Synchronization
import Testing

private func runs(_ bitmap: DirtyBitmap, _ range: Range<UInt64>, capacity: Int = 1000) -> [StatusExtent] {
    var list = StatusList(capacity: capacity)
    _ = bitmap.status(of: range, into: &list)
    return list.extents
}

@Suite struct DirtyBitmapTests {
    @Test func startsClear() throws {
        let bitmap = try DirtyBitmap(size: 1_000_000, granularity: 65536)
        #expect(bitmap.bitCount == 16)
        #expect(bitmap.setCount == 0)
        #expect(runs(bitmap, 0..<1_000_000).map(\.length) == [1_000_000])
        #expect(runs(bitmap, 0..<1_000_000).map(\.value) == [0])
    }

    @Test(arguments: [0, 1, 511, 513, 768, 1 << 32] as [UInt64])
    func refusesGranularity(granularity: UInt64) {
        #expect(throws: BlockError.self) { _ = try DirtyBitmap(size: 1 << 20, granularity: granularity) }
    }

    @Test func refusesMoreBitsThanItsLimit() throws {
        let most = DirtyBitmap.bitCountMax * 512
        try requireError(.tooLarge, "one bit too many") { _ = try DirtyBitmap(size: most + 1, granularity: 512) }
        try requireError(.tooLarge, "2^64-1 bytes") { _ = try DirtyBitmap(size: .max, granularity: 512) }
    }

    @Test func emptyDiskHasNoBits() throws {
        let bitmap = try DirtyBitmap(size: 0, granularity: 512)
        #expect(bitmap.bitCount == 0)
        #expect(bitmap.setCount == 0)
        #expect(runs(bitmap, 0..<0).isEmpty)
    }

    @Test func rangesTouchWholeChunks() throws {
        let bitmap = try DirtyBitmap(size: 10 * 512 + 1, granularity: 512)
        bitmap.set(511..<513)
        #expect((0..<bitmap.bitCount).filter { bitmap.isSet($0) } == [0, 1])
        bitmap.set(5120..<5121)
        #expect((0..<bitmap.bitCount).filter { bitmap.isSet($0) } == [0, 1, 10])
        bitmap.set(1024..<1024)
        #expect(bitmap.setCount == 3)
        bitmap.clear(512..<513)
        #expect((0..<bitmap.bitCount).filter { bitmap.isSet($0) } == [0, 10])
    }

    /// Random changes against an array of Bool, across the 64 bits of a word.
    @Test func followsAModel() throws {
        try withSeed { generator in
            let granularity: UInt64 = 512
            let size: UInt64 = 512 * 300 - 100
            let bitmap = try DirtyBitmap(size: size, granularity: granularity)
            var model = [Bool](repeating: false, count: bitmap.bitCount)
            for _ in 0..<400 {
                let start = UInt64.random(in: 0..<size, using: &generator)
                let range = start..<UInt64.random(in: (start + 1)...size, using: &generator)
                let chunks = Int(range.lowerBound / granularity)...Int((range.upperBound - 1) / granularity)
                let value = generator.oneIn(2)
                if value { bitmap.set(range) } else { bitmap.clear(range) }
                for chunk in chunks { model[chunk] = value }
                try require(model == (0..<bitmap.bitCount).map { bitmap.isSet($0) }, "bits differ after \(range)")
                try require(bitmap.setCount == model.count { $0 }, "setCount \(bitmap.setCount)")
                var position = start
                for run in runs(bitmap, start..<size) {
                    let last = position + run.length - 1
                    try require(
                        (position / granularity...last / granularity).allSatisfy { model[Int($0)] == (run.value == 1) },
                        "run \(run) at \(position)")
                    position = last + 1
                }
                try require(position == size, "runs end at \(position)")
            }
        }
    }

    @Test func statusStopsWhenTheListIsFull() throws {
        let bitmap = try DirtyBitmap(size: 4 * 512, granularity: 512)
        bitmap.set(1)
        for (capacity, end) in [(1, 512), (2, 1024), (3, 2048)] as [(Int, UInt64)] {
            var list = StatusList(capacity: capacity)
            let reached = bitmap.status(of: 0..<2048, into: &list)
            #expect(reached == end)
            try require(list.extents.count == capacity)
        }
    }

    @Test func mergeAddsBits() throws {
        let first = try DirtyBitmap(size: 1 << 20, granularity: 4096)
        let second = try DirtyBitmap(size: 1 << 20, granularity: 4096)
        first.set(0..<4096)
        second.set(4096..<12288)
        try first.merge(second)
        #expect((0..<first.bitCount).filter { first.isSet($0) } == [0, 1, 2])
        #expect(second.setCount == 2)
        let other = try DirtyBitmap(size: 1 << 20, granularity: 8192)
        try requireError(.invalid, "merging another granularity") { try first.merge(other) }
        let shorter = try DirtyBitmap(size: (1 << 20) - 1, granularity: 4096)
        try requireError(.invalid, "merging another size") { try first.merge(shorter) }
    }

    @Test func concurrentSetsAreNotLost() throws {
        let bitmap = try DirtyBitmap(size: 512 * 4096, granularity: 512)
        try concurrently(
            (0..<4).map { part in
                { @Sendable in for chunk in stride(from: part, to: 4096, by: 4) { bitmap.set(chunk) } }
            })
        #expect(bitmap.setCount == 4096)
    }

    /// Chunk 0 comes and goes, chunk 1 stays set: whatever chunk 0 is taken for, chunk 1 is never said to be clean.
    @Test func statusWhileBitsChangeNeverHidesASetBit() throws {
        let bitmap = try DirtyBitmap(size: 4096, granularity: 512)
        bitmap.set(1)
        let isDone = Atomic<Bool>(false)
        try concurrently([
            {
                defer { isDone.store(true, ordering: .relaxed) }
                for _ in 0..<200_000 {
                    bitmap.set(0)
                    bitmap.clear(0..<512)
                }
            },
            {
                var list = StatusList(capacity: 8)
                while !isDone.load(ordering: .relaxed) {
                    list.removeAll()
                    _ = bitmap.status(of: 100..<1024, into: &list)
                    try require(list.length == 924, "\(list.length) bytes")
                    try require(list.extents.last?.value == 1, "chunk 1 is clean: \(list.extents)")
                }
            },
        ])
    }
}
