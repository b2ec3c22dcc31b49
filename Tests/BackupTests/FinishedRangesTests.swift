// Ranges that need no work any more: joined as they come, and taken out of what is planned.
import Backup
import Support
import Testing

@Suite struct FinishedRangesTests {
    @Test func `ranges are joined`() {
        var finished = FinishedRanges()
        for range in [100..<200, 300..<400, 200..<250, 0..<10, 10..<20, 390..<500, 240..<310] as [Range<UInt64>] {
            finished.insert(range)
        }
        #expect(finished.ranges == [0..<20, 100..<500])
        #expect(finished.byteCount == 420)
    }

    @Test func `random ranges are what a set of numbers is`() throws {
        try withSeed { generator in
            var finished = FinishedRanges()
            var model: Set<UInt64> = []
            for _ in 0..<200 {
                let start = UInt64.random(in: 0..<1000, using: &generator)
                let end = start + .random(in: 0..<30, using: &generator)
                finished.insert(start..<end)
                model.formUnion(start..<end)
                #expect(finished.byteCount == UInt64(model.count))
                #expect(finished.ranges.allSatisfy { $0.allSatisfy(model.contains) })
            }
        }
    }
}
