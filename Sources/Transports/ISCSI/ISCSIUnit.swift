// Reading and writing a logical unit over iSCSI: ranges of any size and alignment as commands for whole blocks.
import Block
import CISCSI
import LinuxIO
import Synchronization

/// A logical unit on its session.
final class ISCSIUnit: ByteSource, SCSICommandPath {
    let isPrompt = false
    let facts: LogicalUnitFacts
    private let worker: ISCSIWorker
    private let block: UInt64
    private let pieceMax: UInt64
    // Keeps parts of blocks that are read, changed and written back from losing what others wrote meanwhile.
    private let blockLock = SharedLock()
    /// Whether the unit keeps what was written in memory that it may lose.
    private let hasVolatileCache: Bool
    /// The unit has refused to write the same many times.
    private let refusesWriteSame = Atomic<Bool>(false)
    /// Whether the unit takes no writes.
    let isWriteProtected: Bool

    /// The most bytes of one command, so that several are on their way; and how many of one long read or write.
    private static let pieceBytes: UInt64 = 1 << 20
    private static let windowMax = 8

    /// Reaches a unit.
    ///
    /// - Throws: why it cannot be reached.
    init(_ reference: ISCSIReference) throws(BlockError) {
        worker = try ISCSIWorker(reference)
        facts = try worker.start()
        let block = UInt64(facts.blockSize)
        self.block = block
        let most = min(facts.transferMax.map { UInt64($0) * block } ?? .max, Self.pieceBytes)
        pieceMax = max(most / block, 1) * block
        let probe = WorkerPath(worker: worker)
        // Not all units have it; one that says nothing is taken to have a cache, and to take writes.
        let mode = try? probe.modePage(8)
        isWriteProtected = mode?.isWriteProtected ?? false
        hasVolatileCache = mode?.page.map { $0.count < 3 || $0[2] & 4 != 0 } ?? true
    }

    deinit { worker.stop() }

    var unitName: String { worker.reference.description }

    func execute(_ command: SCSICommand, into buffer: UnsafeMutableRawBufferPointer) throws(BlockError) -> SCSIOutcome {
        try WorkerPath(worker: worker).execute(command, into: buffer)
    }

    // MARK: - Alignment

    /// The blocks that a range touches.
    private func outwards(_ range: Range<UInt64>) -> Range<UInt64> {
        range.lowerBound / block * block..<(range.upperBound + (block - 1)) / block * block
    }

    /// The whole blocks in a range; empty where there are none.
    private func inwards(_ range: Range<UInt64>) -> Range<UInt64> {
        let start = (range.lowerBound + (block - 1)) / block * block
        return start..<max(start, range.upperBound / block * block)
    }

    // MARK: - Commands

    /// Carries out a command for each piece of a range, several at once, and waits for all of them.
    private func transfer(
        _ range: Range<UInt64>, _ direction: dg_iscsi_direction, _ data: UnsafeMutableRawBufferPointer,
        _ command: (_ block: UInt64, _ count: UInt32) -> SCSICommand
    ) throws(BlockError) {
        var flying: [ISCSIRequest] = []
        var next = 0
        var failure: BlockError?
        var position = range.lowerBound
        while next < flying.count || failure == nil && position < range.upperBound {
            if failure == nil && position < range.upperBound && flying.count - next < Self.windowMax {
                let end = position + min(pieceMax, range.upperBound - position)
                let part = Int(position - range.lowerBound)..<Int(end - range.lowerBound)
                let request = ISCSIRequest(
                    command(position / block, UInt32((end - position) / block)), direction,
                    UnsafeMutableRawBufferPointer(rebasing: data[part]), worker)
                worker.submit(request)
                flying.append(request)
                position = end
                continue
            }
            // The buffer is the caller's again only when nothing is on its way any more.
            do throws(BlockError) {
                try worker.finish(flying[next], on: unitName)
            } catch { failure = failure ?? error }
            next += 1
        }
        if let failure { throw failure }
    }

    // MARK: - Reading

    func read(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(BlockError) {
        if buffer.isEmpty { return }
        let range = offset..<(offset + UInt64(buffer.count))
        let outer = outwards(range)
        if outer == range { return try readBlocks(range, into: buffer) }
        // What is not whole blocks goes through memory of our own.
        let inner = inwards(range)
        if inner.isEmpty || outer.count64 <= Self.pieceBytes / 4 { return try readBounced(outer, range, into: buffer) }
        func part(_ part: Range<UInt64>) -> UnsafeMutableRawBufferPointer {
            UnsafeMutableRawBufferPointer(
                rebasing: buffer[Int(part.lowerBound - offset)..<Int(part.upperBound - offset)])
        }
        let head = range.lowerBound..<inner.lowerBound
        let tail = inner.upperBound..<range.upperBound
        if !head.isEmpty { try readBounced(outer.lowerBound..<inner.lowerBound, head, into: part(head)) }
        try readBlocks(inner, into: part(inner))
        if !tail.isEmpty { try readBounced(inner.upperBound..<outer.upperBound, tail, into: part(tail)) }
    }

    private func readBlocks(_ range: Range<UInt64>, into buffer: UnsafeMutableRawBufferPointer) throws(BlockError) {
        try transfer(range, DG_ISCSI_IN, buffer) { .read(at: $0, count: $1) }
    }

    private func readBounced(
        _ blocks: Range<UInt64>, _ wanted: Range<UInt64>, into buffer: UnsafeMutableRawBufferPointer
    ) throws(BlockError) {
        let bounce = Buffer(count: Int(blocks.count64))
        try readBlocks(blocks, into: bounce.bytes)
        let from = Int(wanted.lowerBound - blocks.lowerBound)
        buffer.copyMemory(
            from: UnsafeRawBufferPointer(rebasing: bounce.readable[from..<(from + Int(wanted.count64))]))
    }

    // MARK: - Writing

    func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws(BlockError) {
        let range = offset..<(offset + UInt64(bytes.count))
        let outer = outwards(range)
        try changing { () throws(BlockError) in
            try blockLock.withLock(alone: outer != range) { () throws(BlockError) in
                if outer == range { return try writeBlocks(range, bytes) }
                let bounce = Buffer(count: Int(outer.count64))
                let first = outer.lowerBound..<(outer.lowerBound + block)
                let last = (outer.upperBound - block)..<outer.upperBound
                for edge in first == last ? [first] : [first, last] {
                    let from = Int(edge.lowerBound - outer.lowerBound)
                    try readBlocks(
                        edge, into: UnsafeMutableRawBufferPointer(rebasing: bounce.bytes[from..<(from + Int(block))]))
                }
                let from = Int(range.lowerBound - outer.lowerBound)
                UnsafeMutableRawBufferPointer(rebasing: bounce.bytes[from..<(from + bytes.count)])
                    .copyMemory(from: bytes)
                try writeBlocks(outer, bounce.readable)
            }
        }
    }

    private func writeBlocks(_ range: Range<UInt64>, _ bytes: UnsafeRawBufferPointer) throws(BlockError) {
        try transfer(range, DG_ISCSI_OUT, UnsafeMutableRawBufferPointer(mutating: bytes)) { .write(at: $0, count: $1) }
    }

    /// Runs a body that changes the unit, and remembers that this is not stored yet.
    private func changing(_ body: () throws(BlockError) -> Void) throws(BlockError) {
        if hasVolatileCache { worker.noteChanges(true) }
        try body()
    }

    /// Puts everything that was written on stable storage.
    ///
    /// - Throws: `.inputOutput` when a session was lost before: the target may have lost what it had not stored.
    func flush() throws(BlockError) {
        guard hasVolatileCache else { return }
        if worker.hasLostChanges {
            throw BlockError(
                .inputOutput,
                "flushing \(unitName): the session was lost before what was written was stored; it may be gone, "
                    + "and has to be written again")
        }
        worker.noteChanges(false)
        do throws(BlockError) {
            let request = ISCSIRequest(
                .synchronizeCache, DG_ISCSI_NOTHING, UnsafeMutableRawBufferPointer(start: nil, count: 0), worker)
            worker.submit(request)
            try worker.finish(request, on: unitName)
        } catch {
            worker.noteChanges(true)
            throw error
        }
    }

    /// Makes whole blocks of a range read as zeros without sending them, as far as the unit can.
    ///
    /// - Returns: the blocks that are zeros now; empty where the unit cannot.
    func zeroBlocks(_ range: Range<UInt64>, unmaps: Bool) throws(BlockError) -> Range<UInt64> {
        let inner = inwards(range)
        if inner.isEmpty || refusesWriteSame.load(ordering: .relaxed) { return inner.lowerBound..<inner.lowerBound }
        let zeros = Buffer(count: Int(block))
        zeros.bytes.initializeMemory(as: UInt8.self, repeating: 0)
        let provisioning = facts.provisioning
        let mayUnmap = unmaps && provisioning.isThin && provisioning.readsZeros && provisioning.writeSameUnmaps
        let most = min(facts.writeSameMax ?? 1 << 20, 1 << 20) * block
        do throws(BlockError) {
            try changing { () throws(BlockError) in
                var position = inner.lowerBound
                while position < inner.upperBound {
                    let end = position + min(most, inner.upperBound - position)
                    let request = ISCSIRequest(
                        .writeSame(
                            at: position / block, count: UInt32((end - position) / block), unmaps: mayUnmap),
                        DG_ISCSI_OUT, zeros.bytes, worker)
                    worker.submit(request)
                    try worker.finish(request, on: unitName)
                    position = end
                }
            }
        } catch  where error.kind == .unsupported {
            refusesWriteSame.store(true, ordering: .relaxed)
            return inner.lowerBound..<inner.lowerBound
        }
        return inner
    }

    /// Gives storage of whole blocks back, where the unit takes that.
    func discardBlocks(_ range: Range<UInt64>) throws(BlockError) {
        let inner = inwards(range)
        guard facts.provisioning.isThin, facts.provisioning.unmaps else { return }
        let most = UInt64(facts.unmapMax ?? 1 << 20) * block
        try changing { () throws(BlockError) in
            var position = inner.lowerBound
            while position < inner.upperBound {
                let end = position + min(most, inner.upperBound - position)
                var data = SCSICommand.unmapData(at: position / block, count: UInt32((end - position) / block))
                let count = data.count
                let buffer = Buffer(count: count)
                data.withUnsafeMutableBytes { buffer.bytes.copyMemory(from: UnsafeRawBufferPointer($0)) }
                let request = ISCSIRequest(
                    .unmap(dataLength: UInt16(count)), DG_ISCSI_OUT,
                    UnsafeMutableRawBufferPointer(rebasing: buffer.bytes[..<count]), worker)
                worker.submit(request)
                try worker.finish(request, on: unitName)
                position = end
            }
        }
    }
}

/// The way to the unit for any thread.
private struct WorkerPath: SCSICommandPath {
    let worker: ISCSIWorker

    var unitName: String { worker.reference.description }

    func execute(_ command: SCSICommand, into buffer: UnsafeMutableRawBufferPointer) throws(BlockError) -> SCSIOutcome {
        let request = ISCSIRequest(command, buffer.isEmpty ? DG_ISCSI_NOTHING : DG_ISCSI_IN, buffer, worker)
        worker.submit(request)
        return try worker.wait(for: request)
    }
}

extension ISCSIWorker {
    /// Waits for a command's end; sends it again where that is worth it.
    ///
    /// - Throws: why it failed, or fewer bytes were transferred than asked for.
    fileprivate func finish(_ request: ISCSIRequest, on name: String) throws(BlockError) {
        var request = request
        var patience = SCSIPatience()
        while true {
            let outcome = try wait(for: request)
            guard let failure = outcome.failure(of: request.command, on: name) else {
                // Of other commands not all targets count the data.
                if !request.command.movesBlocks || outcome.transferred == request.data.count { return }
                throw BlockError(
                    .inputOutput,
                    "\(request.command.name) on \(name): \(outcome.transferred) of \(request.data.count) bytes")
            }
            if outcome.isAboutIdentity { lookAgain() }
            if !patience.allowsAnother(outcome) { throw failure }
            let again = ISCSIRequest(request.command, request.direction, request.data, self)
            submit(again)
            request = again
        }
    }
}
