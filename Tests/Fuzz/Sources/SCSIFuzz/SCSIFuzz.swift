// Fuzzes what logical units say: whatever a target or a disk answers, the facts of the unit make sense, and its map
// covers what was asked for.
import Block
import FuzzSupport
import Synchronization

@testable import LinuxIO

@main
struct SCSIFuzz {
    static func main() {
        fuzz { input in
            var choices = Choices(input)
            if choices.byte() & 1 == 0 { return parse(Array(choices.rest())) }
            let unit = AnsweringUnit(Array(choices.rest()))
            guard let facts = try? LogicalUnitFacts(of: unit) else { return }
            check(facts)
            require(facts.difference(from: facts) == nil, "a unit differs from itself")
            let map = ProvisioningMap(unit, facts)
            let middle = facts.size / 2
            let near = min(facts.size, 300 * UInt64(facts.blockSize))
            for range in [0..<near, middle..<facts.size, (facts.size - near)..<facts.size, 0..<facts.size] {
                check(map, range)
            }
        }
    }

    /// Pages and answers as they come from sysfs, where nothing has asked for them.
    private static func parse(_ bytes: [UInt8]) {
        for name in VitalProductData.names(bytes) { requirePlain(name) }
        if let serial = VitalProductData.serial(bytes) { requirePlain(serial) }
        if let sense = SCSISense(bytes) { require(!sense.description.isEmpty, "a sense without words") }
        for (block, count) in [(0, 1), (7, 1 << 20), (UInt64.max - 9, UInt64.max)] as [(UInt64, UInt64)] {
            var next = block
            for run in LBAStatusRun.parse(bytes, from: block, blockCount: count) {
                require(run.count > 0 && run.count <= count - next, "a run of \(run.count) blocks from \(next)")
                next += run.count
            }
        }
    }

    private static func requirePlain(_ text: String) {
        require(!text.isEmpty && text.utf8.allSatisfy { (32...126).contains($0) }, "a name \"\(text)\"")
        require(text.first != " " && text.last != " ", "blanks around \"\(text)\"")
    }

    private static func check(_ facts: LogicalUnitFacts) {
        let block = UInt64(facts.blockSize)
        require((512...65536).contains(block) && block.nonzeroBitCount == 1, "blocks of \(block) bytes")
        require(facts.blockCount > 0 && facts.blockCount <= UInt64(Int64.max) / block, "\(facts.blockCount) blocks")
        require(UInt64(facts.physicalBlock) >= block, "physical blocks of \(facts.physicalBlock) bytes")
        require(facts.physicalBlock.nonzeroBitCount == 1, "physical blocks of \(facts.physicalBlock) bytes")
        require(facts.transferMax != 0, "transfers of no blocks")
        for name in facts.names { requirePlain(name) }
        if let serial = facts.serial { requirePlain(serial) }
        for text in [facts.vendor, facts.model, facts.revision] where !text.isEmpty { requirePlain(text) }
    }

    private static func check(_ map: ProvisioningMap, _ range: Range<UInt64>) {
        if range.isEmpty { return }
        var list = StatusList(capacity: 64)
        guard let end = try? map.status(of: range, into: &list) else { return }
        require(end > range.lowerBound && end <= range.upperBound, "a status of \(range) ends at \(end)")
        let length = list.extents.reduce(0) { $0 + $1.length }
        require(length == end - range.lowerBound, "a status to \(end) of \(range) covers \(length) bytes")
    }
}

/// A unit that answers every command with the next piece of the input: a byte that says how, two of length, the data.
private final class AnsweringUnit: SCSICommandPath {
    let unitName = "unit"
    private let rest: Mutex<ArraySlice<UInt8>>

    init(_ bytes: [UInt8]) { rest = Mutex(bytes[...]) }

    func execute(_ command: SCSICommand, into buffer: UnsafeMutableRawBufferPointer) throws(BlockError) -> SCSIOutcome {
        let (how, data) = rest.withLock { rest -> (UInt8, [UInt8]) in
            guard rest.count >= 3 else { return (1, []) }
            let head = Array(rest.prefix(3))
            let data = Array(rest.dropFirst(3).prefix(Int(head[1]) << 8 | Int(head[2])))
            rest = rest.dropFirst(3 + data.count)
            return (head[0], data)
        }
        if how & 15 == 1 {
            // Nothing that is worth waiting for.
            var sense = SCSISense(data) ?? SCSISense(key: 5, code: 0x20, qualifier: 0)
            if sense.key == 0xB || sense.isBecomingReady { sense.key = 3 }
            return SCSIOutcome(status: 2, sense: how & 16 != 0 ? nil : sense, transferred: 0)
        }
        if how & 15 == 2 { return SCSIOutcome(status: 0x18, transferred: 0) }
        if how & 15 == 3 { throw BlockError(.inputOutput, "the session is lost") }
        let count = min(data.count, buffer.count)
        buffer.copyBytes(from: data.prefix(count))
        // More than there is room for, as a target may say, or less than has come.
        let transferred = how & 32 != 0 ? data.count + 7 : how & 64 != 0 ? count / 2 : data.count
        return SCSIOutcome(status: 0, transferred: transferred)
    }
}
