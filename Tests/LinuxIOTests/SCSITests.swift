// What logical units answer: facts, sense data, and answers to GET LBA STATUS that cannot be right.
import Block
import LinuxIO
import Support
import Synchronization
import Testing

private func bigEndian(_ value: some FixedWidthInteger) -> [UInt8] {
    withUnsafeBytes(of: value.bigEndian) { Array($0) }
}

/// A unit that answers what a test wants it to.
private final class FakeUnit: SCSICommandPath {
    let unitName = "fake"
    let blocks: UInt64
    let flags: UInt8
    let page: UInt8
    let asked = Atomic<Int>(0)
    /// The answer to GET LBA STATUS from a block on.
    let answer: @Sendable (UInt64) -> [UInt8]
    let refusals: [UInt8: SCSIOutcome]
    /// What becomes of INQUIRY for the page of pages; nil for its answer.
    let pages: Result<SCSIOutcome, BlockError>?

    init(
        blocks: UInt64 = 1 << 20, flags: UInt8 = 0xC0, page: UInt8 = 0xE4, refusals: [UInt8: SCSIOutcome] = [:],
        pages: Result<SCSIOutcome, BlockError>? = nil,
        _ answer: @escaping @Sendable (UInt64) -> [UInt8] = { _ in [] }
    ) {
        self.blocks = blocks
        self.flags = flags
        self.page = page
        self.refusals = refusals
        self.pages = pages
        self.answer = answer
    }

    func execute(_ command: SCSICommand, into buffer: UnsafeMutableRawBufferPointer) throws(BlockError) -> SCSIOutcome {
        if let refusal = refusals[command.block[0]] { return refusal }
        if let pages, command.block[0...2] == [0x12, 1, 0] { return try pages.get() }
        var data: [UInt8] = []
        switch (command.block[0], command.block[1], command.block[2]) {
        case (0x12, 0, _):
            data =
                [0, 0, 6, 2, 91, 0, 0, 2] + Array("VENDOR  MODEL           1   ".utf8)
                + [UInt8](repeating: 0, count: 60)
        case (0x12, 1, 0): data = [0, 0, 0, 4, 0, 0x80, 0xB0, 0xB2]
        case (0x12, 1, 0x80): data = [0, 0x80, 0, 4] + Array(" S1 ".utf8)
        case (0x12, 1, 0xB0):
            data = [0, 0xB0, 0, 60] + [UInt8](repeating: 0, count: 4) + bigEndian(UInt32(2048))
            data += [UInt8](repeating: 0, count: 52)
        case (0x12, 1, 0xB2): data = [0, 0xB2, 0, 4, 0, page, 2, 0]
        case (0x9E, 0x10, _):
            data = bigEndian(blocks &- 1) + bigEndian(UInt32(512)) + [0, 3, flags] + [UInt8](repeating: 0, count: 17)
        case (0x25, _, _): data = bigEndian(UInt32(999)) + bigEndian(UInt32(4096))
        case (0x9E, 0x12, _):
            asked.add(1, ordering: .relaxed)
            data = answer(command.block[2..<10].reduce(UInt64(0)) { $0 << 8 | UInt64($1) })
        default: break
        }
        let count = min(data.count, buffer.count)
        if count > 0 { buffer.copyBytes(from: data[..<count]) }
        return SCSIOutcome(status: 0, transferred: count)
    }
}

/// An answer with runs of (first block, blocks, state).
private func answer(_ runs: [(UInt64, UInt32, UInt8)], claims: UInt32? = nil) -> [UInt8] {
    var bytes = bigEndian(claims ?? UInt32(4 + runs.count * 16)) + [0, 0, 0, 0]
    for (first, count, state) in runs { bytes += bigEndian(first) + bigEndian(count) + [state, 0, 0, 0] }
    return bytes
}

private func allocation(_ unit: FakeUnit, _ range: Range<UInt64>, capacity: Int = 64) throws -> [[UInt64]] {
    let map = ProvisioningMap(unit, try LogicalUnitFacts(of: unit))
    var list = StatusList(capacity: capacity)
    let end = try map.status(of: range, into: &list)
    try require(end == range.lowerBound + list.length, "the end is \(end)")
    return list.extents.map { [$0.length, UInt64($0.value)] }
}

private let hole = UInt64(AllocationFlags.hole | AllocationFlags.zero)
private let reserved = UInt64(AllocationFlags.zero)

@Suite struct SCSITests {
    @Test func factsAreRead() throws {
        let facts = try LogicalUnitFacts(of: FakeUnit())
        #expect(facts.vendor == "VENDOR" && facts.model == "MODEL" && facts.serial == "S1" && facts.names == [])
        #expect(facts.size == 512 << 20 && facts.physicalBlock == 4096 && facts.transferMax == 2048)
        #expect(facts.provisioning.isThin && facts.provisioning.readsZeros && facts.hasIdentity)
        let small = SCSIOutcome(status: 2, sense: SCSISense(key: 5, code: 0x20, qualifier: 0), transferred: 0)
        let old = try LogicalUnitFacts(of: FakeUnit(refusals: [0x9E: small]))
        #expect(old.size == 1000 * 4096 && !old.provisioning.isThin)
        try requireError(.tooLarge, "2^64 blocks") { _ = try LogicalUnitFacts(of: FakeUnit(blocks: 0)) }
        let absent = SCSIOutcome(status: 2, sense: SCSISense(key: 5, code: 0x25, qualifier: 0), transferred: 0)
        try requireError(.notFound, "no unit") { _ = try LogicalUnitFacts(of: FakeUnit(refusals: [0: absent])) }
    }

    @Test func whatOnlyWentWrongIsNoUnitWithoutNames() throws {
        let unknown = SCSIOutcome(status: 2, sense: SCSISense(key: 5, code: 0x24, qualifier: 0), transferred: 0)
        let nameless = try LogicalUnitFacts(of: FakeUnit(pages: .success(unknown)))
        #expect(nameless.serial == nil && !nameless.hasIdentity)
        let broken = BlockError(.inputOutput, "the connection has ended")
        try requireError(.inputOutput, "a connection that breaks") {
            _ = try LogicalUnitFacts(of: FakeUnit(pages: .failure(broken)))
        }
    }

    @Test func unitWhoseHolesAreNoZerosIsData() throws {
        let everything: @Sendable (UInt64) -> [UInt8] = { answer([($0, 1 << 20, 1)]) }
        for (flags, page) in [(UInt8(0x80), UInt8(0xE4)), (0xC0, 0xE0), (0x40, 0xE4), (0, 0)] {
            let unit = FakeUnit(flags: flags, page: page, everything)
            #expect(try allocation(unit, 0..<1 << 20) == [[1 << 20, 0]], "\(flags) \(page)")
            #expect(unit.asked.load(ordering: .relaxed) == 0)
        }
        #expect(try allocation(FakeUnit(everything), 0..<1 << 20) == [[1 << 20, hole]])
    }

    @Test func runsAreCutToTheRange() throws {
        // In runs of 100 blocks, several in an answer, the first of which begins earlier.
        let unit = FakeUnit { block in
            let first = block / 100 * 100
            return answer((0..<3).map { (first + $0 * 100, 100, UInt8((first / 100 + $0) % 3)) })
        }
        let size: UInt64 = 51200
        #expect(
            try allocation(unit, 1000..<(4 * size + 7)) == [
                [size - 1000, 0], [size, hole], [size, reserved], [size, 0], [7, hole],
            ])
        // As much as the list takes.
        #expect(try allocation(unit, 0..<20 * size, capacity: 2) == [[size, 0], [size, hole]])
    }

    @Test(arguments: 0..<9)
    func nonsenseIsData(kind: Int) throws {
        let unit = FakeUnit(blocks: 4000) { block in
            switch kind {
            case 0: []
            case 1: answer([], claims: 4)
            case 2: answer([(block, 0, 1)])
            case 3: answer([(block + 8, 8, 1)])
            case 4: answer([(.max - 3, 8, 1)])
            case 5: answer([(0, 1, 1), (0, 1, 1)])
            case 6: answer([(block, 8, 1)], claims: 2)
            case 7: Array(answer([(block, 8, 1)]).dropLast(1))
            default: answer([(block, 8, 15)], claims: .max)
            }
        }
        let range: Range<UInt64> = 512..<(4000 * 512)
        let found = try allocation(unit, range)
        #expect(found == [[range.count64, 0]], "\(found)")
        #expect(unit.asked.load(ordering: .relaxed) <= (kind == 8 ? 600 : 2))
    }

    @Test func unitThatAnswersInCrumbsIsNotAskedForEver() throws {
        let unit = FakeUnit(blocks: 1 << 40) { answer([($0, 1, 1)]) }
        let found = try allocation(unit, 0..<(1 << 49))
        #expect(found.count == 2 && found[0][1] == hole && found[1][1] == 0)
        #expect(unit.asked.load(ordering: .relaxed) <= 10_000)
        // Past its own end it does not lead anybody.
        let long = FakeUnit(blocks: 100) { answer([($0, .max, 1)]) }
        #expect(try allocation(long, 0..<51200) == [[51200, hole]])
    }

    @Test func refusalIsData() throws {
        let refusal = SCSIOutcome(status: 2, sense: SCSISense(key: 5, code: 0x20, qualifier: 0), transferred: 0)
        let facts = try LogicalUnitFacts(of: FakeUnit())
        let map = ProvisioningMap(FakeUnit(refusals: [0x9E: refusal]), facts)
        var list = StatusList(capacity: 4)
        #expect(try map.status(of: 0..<4096, into: &list) == 4096)
        #expect(list.extents.map(\.value) == [0] && !map.isTelling)
    }

    @Test func senseIsTakenApart() throws {
        let fixed: [UInt8] = [0x70, 0, 3, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x11, 0, 0, 0, 0, 0]
        #expect(SCSISense(fixed) == SCSISense(key: 3, code: 0x11, qualifier: 0))
        #expect(SCSISense([0x72, 5, 0x21, 0]) == SCSISense(key: 5, code: 0x21, qualifier: 0))
        #expect(SCSISense(Array(fixed.prefix(13))) == nil && SCSISense([]) == nil && SCSISense([0x7F, 1, 2, 3]) == nil)
        let kinds: [(UInt8, UInt8, UInt8, BlockError.Kind)] = [
            (3, 0x11, 0, .inputOutput), (5, 0x20, 0, .unsupported), (5, 0x21, 0, .outOfRange), (7, 0x27, 0, .readOnly),
            (7, 0x27, 7, .noSpace), (2, 4, 3, .inputOutput), (15, 0xFF, 0xFF, .inputOutput),
        ]
        for (key, code, qualifier, kind) in kinds {
            let sense = SCSISense(key: key, code: code, qualifier: qualifier)
            let outcome = SCSIOutcome(status: 2, sense: sense, transferred: 0)
            #expect(outcome.failure(of: .testUnitReady, on: "x")?.kind == kind, "\(sense)")
        }
        #expect(SCSIOutcome(status: 0x18, transferred: 0).failure(of: .testUnitReady, on: "x")?.kind == .denied)
    }
}
