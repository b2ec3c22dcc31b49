// Fuzzes the journals of copies: whatever is left of one, what it says is finished is what its whole lines say.
import Block
import FuzzSupport
import Glibc
import LinuxIO

@testable import Backup

@main
struct JournalFuzz {
    static func main() {
        let folder = FuzzFolder()
        let identity = CopyIdentity(source: "disk a", scope: "everything", target: "file 1:2")
        fuzz { input in
            var choices = Choices(input)
            let shape = choices.byte()
            let rest = choices.rest()
            var content = Array(rest)
            if shape & 1 == 0 {
                // Lines with the hashes that they need; the last one perhaps cut off.
                let lines = rest.split(separator: UInt8(ascii: "\n"), omittingEmptySubsequences: false)
                content = lines.flatMap { CopyJournal.line(String(decoding: $0, as: UTF8.self)) }
                if shape & 2 != 0 { content.removeLast(min(content.count, 1 + Int(shape >> 2))) }
            }
            let path = folder.write("journal", content)
            guard let (journal, finished) = try? CopyJournal.resume(path, identity) else { return }
            var last: UInt64 = 0
            for (index, range) in finished.ranges.enumerated() {
                require(!range.isEmpty && (index == 0 || range.lowerBound > last), "ranges that touch or are empty")
                last = range.upperBound
            }
            require((try? journal.note(settledEnd: 1 << 40)) != nil, "nothing can be noted")
            guard let again = try? CopyJournal.resume(path, identity).1 else {
                return require(false, "what was noted cannot be read")
            }
            var expected = finished
            let settled = finished.ranges.first.map { $0.lowerBound == 0 ? $0.upperBound : 0 } ?? 0
            if settled < 1 << 40 { expected.insert(settled..<(1 << 40)) }
            require(again == expected, "other ranges than were noted")
        }
    }
}
