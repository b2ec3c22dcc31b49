// Which blocks of a thin logical unit have storage, asked of the unit each time (GET LBA STATUS, SBC-3 5.4).
public import Block
import Synchronization

/// A run of blocks that a unit says the same of.
struct LBAStatusRun: Equatable {
    /// What a unit says of blocks (SBC-3 table 36).
    enum State: Equatable {
        /// They have storage, or it cannot be told.
        case mapped
        /// They have none.
        case deallocated
        /// They have none, but storage is set aside for them.
        case anchored
    }

    var count: UInt64
    var state: State

    /// The runs in an answer, from the block on that was asked for, as far as they follow each other.
    ///
    /// A descriptor that leads back, leaves a gap, has no blocks or goes past the unit's end ends the list.
    static func parse(_ answer: [UInt8], from block: UInt64, blockCount: UInt64) -> [LBAStatusRun] {
        guard answer.count >= 8 else { return [] }
        let claimed = answer[..<4].reduce(0) { $0 << 8 | Int($1) }
        let end = min(answer.count, claimed.addingReportingOverflow(4).partialValue)
        var runs: [LBAStatusRun] = []
        var next = block
        var offset = 8
        while offset + 16 <= end, next < blockCount {
            let first = answer[offset..<(offset + 8)].reduce(UInt64(0)) { $0 << 8 | UInt64($1) }
            let count = answer[(offset + 8)..<(offset + 12)].reduce(UInt64(0)) { $0 << 8 | UInt64($1) }
            let (after, overflow) = first.addingReportingOverflow(count)
            // The first one may begin before the block that was asked for; the others follow.
            guard !overflow, after > next, first == next || runs.isEmpty && first < next else { break }
            let state: State =
                switch answer[offset + 12] & 15 {
                case 1: .deallocated
                case 2: .anchored
                default: .mapped
                }
            let limit = min(after, blockCount)
            runs.append(LBAStatusRun(count: limit - next, state: state))
            next = limit
            offset += 16
        }
        return runs
    }
}

/// What of a unit has storage.
public final class ProvisioningMap: Sendable {
    /// Bytes of an answer: 256 runs.
    private static let answerLength = 8 + 256 * 16
    /// The most commands for one answer to a caller: what is left is called data then. (A unit whose runs are one block
    /// long would otherwise be asked for ever.)
    private static let commandsMax = 10_000

    private let path: any SCSICommandPath
    private let blockSize: UInt64
    private let blockCount: UInt64
    private let isOffered: Bool
    /// The unit has refused, or answered nonsense: everything is data from then on.
    private let isRefused = Atomic<Bool>(false)

    /// What a unit with these facts has to say of its storage.
    public init(_ path: any SCSICommandPath, _ facts: LogicalUnitFacts) {
        self.path = path
        blockSize = UInt64(facts.blockSize)
        blockCount = facts.blockCount
        // Blocks without storage that read as anything else are of no use to anyone.
        isOffered = facts.provisioning.isThin && facts.provisioning.readsZeros
    }

    /// Whether the unit says more than that everything is data, as far as is known.
    public var isTelling: Bool { isOffered && !isRefused.load(ordering: .relaxed) }

    /// Says what of a range has storage, as `BlockDevice.status(.allocation)` does.
    ///
    /// - Throws: when the unit cannot be asked; what it refuses to tell is data.
    public func status(of range: Range<UInt64>, into list: inout StatusList) throws(BlockError) -> UInt64 {
        var position = range.lowerBound
        var commands = 0
        while position < range.upperBound && isTelling && commands < Self.commandsMax {
            let block = position / blockSize
            let runs = LBAStatusRun.parse(try ask(from: block), from: block, blockCount: blockCount)
            if runs.isEmpty { isRefused.store(true, ordering: .relaxed) }
            var first = block
            for run in runs {
                let end = min((first + run.count) * blockSize, range.upperBound)
                if end > position {
                    let flags: UInt32 =
                        switch run.state {
                        case .mapped: AllocationFlags.data
                        case .deallocated: AllocationFlags.hole | AllocationFlags.zero
                        case .anchored: AllocationFlags.zero
                        }
                    if !list.append(end - position, flags) { return position }
                    position = end
                }
                first += run.count
            }
            commands += 1
        }
        if position < range.upperBound && list.append(range.upperBound - position, AllocationFlags.data) {
            return range.upperBound
        }
        return position
    }

    private func ask(from block: UInt64) throws(BlockError) -> [UInt8] {
        do throws(BlockError) {
            return try path.ask(
                .getLBAStatus(at: block, length: UInt32(Self.answerLength)), count: Self.answerLength)
        } catch  where error.kind == .unsupported || error.kind == .outOfRange {
            return []
        }
    }
}
