// The plan of a copy: every changed byte once, in whole blocks, zeros only where the source reads as zeros.
import Block
import Support
import Testing

@testable import Backup

private func items(_ device: any BlockDevice, _ changed: StatusContext?, _ granularity: UInt64) throws -> [CopyItem] {
    var plan = CopyPlan(device, changed: changed, granularity: granularity)
    var all: [CopyItem] = []
    var settled: UInt64 = 0
    while !plan.isDone {
        var some: [CopyItem] = []
        try plan.next(into: &some)
        all += some
        try require(plan.settledEnd >= settled, "what is settled went back from \(settled) to \(plan.settledEnd)")
        settled = plan.settledEnd
        if !plan.isDone, let last = all.last {
            try require(settled >= last.range.upperBound || settled > last.range.lowerBound, "settled at \(settled)")
        }
    }
    try require(settled == device.info.size, "the plan ends at \(settled)")
    return all
}

@Suite struct CopyPlanTests {
    @Test func `random layouts are covered in whole blocks`() throws {
        try withSeed { generator in
            for round in 0..<40 {
                let size = UInt64.random(in: 1...(1 << 20), using: &generator)
                let disk = try randomDisk(size: size, hasDirty: round % 2 == 1, &generator)
                let granularity: UInt64 = [1, 512, 4096, 65536].randomElement(using: &generator) ?? 1
                let planned = try items(disk, round % 2 == 1 ? .dirtyBitmap(0) : nil, granularity)
                let bytes = try content(disk)
                var end: UInt64 = 0
                var kinds = [UInt8](repeating: 0, count: Int(size))
                for item in planned {
                    try require(item.range.lowerBound >= end && !item.range.isEmpty, "\(item) after \(end)")
                    try require(item.range.lowerBound % granularity == 0, "\(item) with \(granularity)")
                    try require(
                        item.range.upperBound % granularity == 0 || item.range.upperBound == size,
                        "\(item) with \(granularity)")
                    end = item.range.upperBound
                    let range = Int(item.range.lowerBound)..<Int(end)
                    if item.kind == .zero { try require(areZeros(bytes[range]), "\(item) is not zero") }
                    for index in range { kinds[index] = item.kind == .data ? 1 : 2 }
                }
                var list = StatusList(capacity: 100_000)
                _ = try disk.status(round % 2 == 1 ? .dirtyBitmap(0) : .allocation, of: 0..<size, into: &list)
                var position = 0
                for extent in list.extents {
                    let range = position..<(position + Int(extent.length))
                    position = range.upperBound
                    if round % 2 == 1 && extent.value == 0 { continue }
                    try require(kinds[range].allSatisfy { $0 != 0 }, "\(range) is not in the plan")
                }
            }
        }
    }

    @Test func `neighbours become one and distant ones do not`() throws {
        func plan(gap: UInt64) throws -> Int {
            let disk = try ToldDevice(
                size: 1 << 20,
                allocation: [
                    StatusExtent(length: 65536, value: 0), StatusExtent(length: gap, value: 3),
                    StatusExtent(length: 65536, value: 0), StatusExtent(length: (1 << 20) - 131072 - gap, value: 3),
                ])
            return try items(disk, nil, 4096).count { $0.kind == .data }
        }
        #expect(try plan(gap: 61440) == 1)
        #expect(try plan(gap: 65536) == 2)
    }

    @Test(arguments: [1, 4096, -4096, -(1 << 21), 1 << 40] as [Int64])
    func `a source that lies about how far it answered is refused`(lie: Int64) throws {
        let disk = try ToldDevice(
            size: 1 << 20, allocation: [StatusExtent(length: 1 << 20, value: 0)], lie: max(lie, -(1 << 20)))
        try requireError(.inputOutput, "planning") { _ = try items(disk, nil, 4096) }
    }

    @Test func `a huge fragmented disk is planned in bounded pieces`() throws {
        let disk = try PatternDeviceOfTest.huge()
        var plan = CopyPlan(disk, changed: nil, granularity: 65536)
        var most = 0
        for _ in 0..<200 {
            var some: [CopyItem] = []
            try plan.next(into: &some)
            most = max(most, some.count)
        }
        #expect(most > 0 && most <= 4096 + 2)
        #expect(plan.settledEnd > 16 << 30)
    }
}

private enum PatternDeviceOfTest {
    static func huge() throws -> any BlockDevice { try openPattern("pattern:1P?allocated=50%") }
}
