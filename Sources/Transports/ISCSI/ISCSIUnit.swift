// Reading a logical unit over iSCSI: ranges of any size and alignment as commands for whole blocks.
import Block
import LinuxIO

/// A logical unit on its session.
final class ISCSIUnit: ByteSource, SCSICommandPath {
    let isPrompt = false
    let facts: LogicalUnitFacts
    private let worker: ISCSIWorker
    private let block: UInt64
    private let pieceMax: UInt64

    /// The most bytes of one command, so that several are on their way; and how many of one long read.
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

    // MARK: - Reading

    /// Reads whole blocks by commands for pieces of them, several at once, and waits for all of those.
    private func readBlocks(_ range: Range<UInt64>, into data: UnsafeMutableRawBufferPointer) throws(BlockError) {
        var flying: [ISCSIRequest] = []
        var next = 0
        var failure: BlockError?
        var position = range.lowerBound
        while next < flying.count || failure == nil && position < range.upperBound {
            if failure == nil && position < range.upperBound && flying.count - next < Self.windowMax {
                let end = position + min(pieceMax, range.upperBound - position)
                let part = Int(position - range.lowerBound)..<Int(end - range.lowerBound)
                let request = ISCSIRequest(
                    .read(at: position / block, count: UInt32((end - position) / block)),
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

    private func readBounced(
        _ blocks: Range<UInt64>, _ wanted: Range<UInt64>, into buffer: UnsafeMutableRawBufferPointer
    ) throws(BlockError) {
        let bounce = Buffer(count: Int(blocks.count64))
        try readBlocks(blocks, into: bounce.bytes)
        let from = Int(wanted.lowerBound - blocks.lowerBound)
        buffer.copyMemory(
            from: UnsafeRawBufferPointer(rebasing: bounce.readable[from..<(from + Int(wanted.count64))]))
    }

}

/// The way to the unit for any thread.
private struct WorkerPath: SCSICommandPath {
    let worker: ISCSIWorker

    var unitName: String { worker.reference.description }

    func execute(_ command: SCSICommand, into buffer: UnsafeMutableRawBufferPointer) throws(BlockError) -> SCSIOutcome {
        let request = ISCSIRequest(command, buffer, worker)
        worker.submit(request)
        return try worker.wait(for: request)
    }
}

extension ISCSIWorker {
    /// Waits for a command's end; sends it again where that is worth it.
    ///
    /// - Throws: why it failed, or another number of bytes came than was asked for.
    fileprivate func finish(_ request: ISCSIRequest, on name: String) throws(BlockError) {
        var request = request
        var patience = SCSIPatience()
        while true {
            let outcome = try wait(for: request)
            guard let failure = outcome.failure(of: request.command, on: name) else {
                if outcome.transferred == request.data.count { return }
                throw BlockError(
                    .inputOutput,
                    "\(request.command.name) on \(name): \(outcome.transferred) bytes came where "
                        + "\(request.data.count) were asked for")
            }
            if outcome.isAboutIdentity { lookAgain() }
            if !patience.allowsAnother(outcome) { throw failure }
            let again = ISCSIRequest(request.command, request.data, self)
            submit(again)
            request = again
        }
    }
}
