// What a server's block sizes and flags mean for reading and writing: splitting, aligning, and doing without.
import Block
import Glibc
import LinuxIO

/// An export on its connections, with requests of any size and alignment.
final class RemoteExport: ByteSource {
    let isPrompt = false
    let agreement: ClientAgreement
    let pool: ChannelPool
    private let name: String
    private let block: UInt64
    private let pieceMax: UInt64
    // Keeps parts of blocks that are read, changed and written back from losing what others wrote meanwhile.
    private let blockLock = SharedLock()

    /// Pieces of one long read or write on their way at once.
    private static let windowMax = 8

    init(_ pool: ChannelPool, _ agreement: ClientAgreement, name: String) {
        self.pool = pool
        self.agreement = agreement
        self.name = name
        block = UInt64(agreement.blockSizes.minimum)
        let limit = min(UInt64(agreement.blockSizes.maximum), NBDDevice.pieceMax)
        pieceMax = max(limit / block, 1) * block
    }

    private func has(_ flag: NBD.TransmissionFlags) -> Bool { agreement.flags.contains(flag) }

    // MARK: - Alignment

    /// The blocks that a range touches. The last block of an export may be a part of one.
    func outwards(_ range: Range<UInt64>) -> Range<UInt64> {
        let start = range.lowerBound / block * block
        let (end, overflow) = range.upperBound.addingReportingOverflow(block - 1)
        return start..<(overflow ? agreement.size : min(end / block * block, agreement.size))
    }

    /// The whole blocks in a range; empty where there are none.
    private func inwards(_ range: Range<UInt64>) -> Range<UInt64> {
        let start = min((range.lowerBound + (block - 1)) / block * block, agreement.size)
        let end = range.upperBound == agreement.size ? agreement.size : range.upperBound / block * block
        return start..<max(start, end)
    }

    // MARK: - Pieces

    /// Sends a range's requests, several at once where they are several, and waits for all of them. If the connection
    /// breaks, all are sent again.
    private func transfer(
        _ channel: ClientChannel, _ range: Range<UInt64>, pieceMax: UInt64, window: Int = windowMax,
        _ begin: (_ piece: Range<UInt64>, _ mayWait: Bool, _ isLast: Bool) throws(ChannelError) -> PendingRequest?
    ) throws(ChannelError) {
        if range.count64 <= pieceMax {
            if let request = try begin(range, true, true) { try channel.finish(request) }
            return
        }
        var flying: [PendingRequest] = []
        var failure: ChannelError?
        var position = range.lowerBound
        while failure == nil && (position < range.upperBound || !flying.isEmpty) {
            do throws(ChannelError) {
                if position < range.upperBound && flying.count < window {
                    let end = position + min(pieceMax, range.upperBound - position)
                    if let request = try begin(position..<end, flying.isEmpty, end == range.upperBound) {
                        flying.append(request)
                        position = end
                        continue
                    }
                }
                try channel.finish(flying.removeFirst())
            } catch { failure = error }
        }
        // Buffers are the caller's again only when nothing is on its way any more.
        for request in flying {
            do throws(ChannelError) {
                try channel.finish(request)
            } catch {
                // One piece that the server may still carry out decides about the whole.
                if failure == nil || error.isLate { failure = error }
            }
        }
        if let failure { throw failure }
    }

    // MARK: - Reading

    func read(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(BlockError) {
        if buffer.isEmpty { return }
        let range = offset..<(offset + UInt64(buffer.count))
        let outer = outwards(range)
        if outer == range { return try readBlocks(into: buffer, at: offset) }
        if outer.count64 <= max(pieceMax / 4, 2 * block) { return try readBounced(outer, range, into: buffer) }
        let inner = inwards(range)
        if outer.lowerBound < range.lowerBound {
            try readBounced(outer.lowerBound..<inner.lowerBound, range.lowerBound..<inner.lowerBound, into: buffer)
        }
        let from = Int(inner.lowerBound - offset)
        let middle = UnsafeMutableRawBufferPointer(rebasing: buffer[from..<(from + Int(inner.count64))])
        try readBlocks(into: middle, at: inner.lowerBound)
        if range.upperBound < outer.upperBound {
            let rest = UnsafeMutableRawBufferPointer(rebasing: buffer[Int(inner.upperBound - offset)...])
            try readBounced(inner.upperBound..<outer.upperBound, inner.upperBound..<range.upperBound, into: rest)
        }
    }

    /// Reads blocks through a buffer of our own and copies the wanted part of them to the buffer's start.
    private func readBounced(
        _ blocks: Range<UInt64>, _ wanted: Range<UInt64>, into buffer: UnsafeMutableRawBufferPointer
    ) throws(BlockError) {
        let bounce = Buffer(count: Int(blocks.count64))
        try readBlocks(into: bounce.bytes, at: blocks.lowerBound)
        let from = Int(wanted.lowerBound - blocks.lowerBound)
        buffer.copyMemory(
            from: UnsafeRawBufferPointer(rebasing: bounce.readable[from..<(from + Int(wanted.count64))]))
    }

    private func readBlocks(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(BlockError) {
        let range = offset..<(offset + UInt64(buffer.count))
        try pool.run { (channel) throws(ChannelError) in
            try transfer(channel, range, pieceMax: pieceMax) {
                (piece, mayWait, isLast) throws(ChannelError) -> PendingRequest? in
                let from = Int(piece.lowerBound - offset)
                let part = UnsafeMutableRawBufferPointer(rebasing: buffer[from..<(from + Int(piece.count64))])
                return try channel.begin(
                    Request(NBD.Command.read, cookie: 0, offset: piece.lowerBound, length: piece.count64), into: part,
                    mayWait: mayWait, isLast: isLast)
            }
        }
    }

    func prefetch(_ range: Range<UInt64>) {
        guard has(.sendCache) else { return }
        let blocks = outwards(range)
        let count = min(blocks.count64, UInt64(agreement.blockSizes.maximum))
        pool.advise(Request(NBD.Command.cache, cookie: 0, offset: blocks.lowerBound, length: count))
    }

    func status(_ context: String, of range: Range<UInt64>, mask: UInt64, capacity: Int) throws(BlockError)
        -> [StatusExtent]
    {
        try pool.run { (channel) throws(ChannelError) in
            guard let id = channel.agreement.contextID(context) else { return [] }
            return try channel.status(id, of: range, mask: mask, capacity: capacity)
        }
    }

    // MARK: - Writing

    func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64, durable: Bool) throws(BlockError) {
        let range = offset..<(offset + UInt64(bytes.count))
        let outer = outwards(range)
        let isWhole = outer == range
        try withBlocks(parts: !isWhole) { () throws(BlockError) in
            if isWhole { return try writeBlocks(bytes, at: offset, durable: durable) }
            let inner = inwards(range)
            func part(_ range: Range<UInt64>) -> UnsafeRawBufferPointer {
                UnsafeRawBufferPointer(
                    rebasing: bytes[Int(range.lowerBound - offset)..<Int(range.upperBound - offset)])
            }
            if inner.isEmpty {
                // Inside of one block, or of two with none between.
                return try changeBlocks(outer, bytes, at: offset, durable: durable)
            }
            if range.lowerBound < inner.lowerBound {
                let head = range.lowerBound..<inner.lowerBound
                try changeBlocks(outer.lowerBound..<inner.lowerBound, part(head), at: offset, durable: durable)
            }
            try writeBlocks(part(inner), at: inner.lowerBound, durable: durable)
            if inner.upperBound < range.upperBound {
                let tail = inner.upperBound..<range.upperBound
                try changeBlocks(
                    inner.upperBound..<outer.upperBound, part(tail), at: inner.upperBound, durable: durable)
            }
        }
    }

    private func withBlocks(parts: Bool, _ body: () throws(BlockError) -> Void) throws(BlockError) {
        if block == 1 { return try body() }
        try blockLock.withLock(alone: parts, body)
    }

    /// Reads blocks, changes a part of them, and writes them back.
    private func changeBlocks(
        _ blocks: Range<UInt64>, _ bytes: UnsafeRawBufferPointer, at offset: UInt64, durable: Bool
    ) throws(BlockError) {
        let bounce = Buffer(count: Int(blocks.count64))
        try readBlocks(into: bounce.bytes, at: blocks.lowerBound)
        let from = Int(offset - blocks.lowerBound)
        UnsafeMutableRawBufferPointer(rebasing: bounce.bytes[from..<(from + bytes.count)]).copyMemory(from: bytes)
        try writeBlocks(bounce.readable, at: blocks.lowerBound, durable: durable)
    }

    private func writeBlocks(_ bytes: UnsafeRawBufferPointer, at offset: UInt64, durable: Bool) throws(BlockError) {
        let range = offset..<(offset + UInt64(bytes.count))
        try change(range, pieceMax: pieceMax, durable: durable) {
            (channel, piece, flags, mayWait, isLast) throws(ChannelError) -> PendingRequest? in
            let from = Int(piece.lowerBound - offset)
            let part = UnsafeRawBufferPointer(rebasing: bytes[from..<(from + Int(piece.count64))])
            return try channel.begin(
                channel.writeRequest(piece.lowerBound, part.count, flags), payload: part, mayWait: mayWait,
                isLast: isLast)
        }
    }

    private typealias Begin = (
        _ channel: ClientChannel, _ piece: Range<UInt64>, _ flags: NBD.CommandFlags, _ mayWait: Bool, _ isLast: Bool
    ) throws(ChannelError) -> PendingRequest?

    /// Changes a range, durably with FUA where the server has that, else with a flush behind it.
    private func change(
        _ range: Range<UInt64>, pieceMax: UInt64, window: Int = windowMax, durable: Bool, _ begin: Begin
    ) throws(BlockError) {
        let body = { (channel: ClientChannel) throws(ChannelError) in
            let flags: NBD.CommandFlags = durable && self.has(.sendFUA) ? .fua : []
            try self.transfer(channel, range, pieceMax: pieceMax, window: window) {
                (piece, mayWait, isLast) throws(ChannelError) -> PendingRequest? in
                try begin(channel, piece, flags, mayWait, isLast)
            }
        }
        if durable && has(.sendFUA) { return try pool.runDurable(body) }
        let losses = pool.losses
        try pool.runChange(body)
        if durable { try flush(since: losses) }
    }

    /// Makes a range read as zeros: with NBD_CMD_WRITE_ZEROES, or by writing them.
    func zero(_ range: Range<UInt64>, _ options: ZeroOptions) throws(BlockError) {
        let durable = options.contains(.durable)
        let inner = has(.sendWriteZeroes) ? inwards(range) : range.lowerBound..<range.lowerBound
        // First what may be refused, so that nothing has changed then.
        if !inner.isEmpty {
            var flags: NBD.CommandFlags = options.contains(.mayPunch) ? [] : .noHole
            if options.contains(.fastOnly) { flags.insert(.fastZero) }
            try withBlocks(parts: false) { () throws(BlockError) in
                try changeWithoutData(NBD.Command.writeZeroes, inner, flags, durable: durable)
            }
        }
        let before = range.lowerBound..<(inner.isEmpty ? range.upperBound : inner.lowerBound)
        let behind = (inner.isEmpty ? range.upperBound : inner.upperBound)..<range.upperBound
        for part in [before, behind] where !part.isEmpty { try writeZeros(part, durable: durable) }
    }

    /// Writes zeros, block-wise but for the parts of blocks at the ends.
    private func writeZeros(_ range: Range<UInt64>, durable: Bool) throws(BlockError) {
        let inner = inwards(range)
        let head = range.lowerBound..<(inner.isEmpty ? range.upperBound : inner.lowerBound)
        let tail = (inner.isEmpty ? range.upperBound : inner.upperBound)..<range.upperBound
        for part in [head, tail] {
            var position = part.lowerBound
            while position < part.upperBound {
                let bytes = zeros(part.upperBound - position)
                try write(bytes, at: position, durable: durable)
                position += UInt64(bytes.count)
            }
        }
        if inner.isEmpty { return }
        // Every block size divides the zeros there are.
        let piece = min(pieceMax, UInt64(ZeroPage.count))
        try withBlocks(parts: false) { () throws(BlockError) in
            try change(inner, pieceMax: piece, durable: durable) {
                (channel, piece, flags, mayWait, isLast) throws(ChannelError) -> PendingRequest? in
                let payload = self.zeros(piece.count64)
                return try channel.begin(
                    channel.writeRequest(piece.lowerBound, payload.count, flags), payload: payload, mayWait: mayWait,
                    isLast: isLast)
            }
        }
    }

    /// So many zeros, or all there are.
    private func zeros(_ count: UInt64) -> UnsafeRawBufferPointer {
        UnsafeRawBufferPointer(rebasing: ZeroPage.bytes.prefix(Int(count)))
    }

    private func changeWithoutData(
        _ command: UInt16, _ range: Range<UInt64>, _ flags: NBD.CommandFlags, durable: Bool
    ) throws(BlockError) {
        // One at a time: a server that does them one after the other would be late with the last of several.
        try change(range, pieceMax: agreement.changeMax, window: 1, durable: durable) {
            (channel, piece, fua, mayWait, isLast) throws(ChannelError) -> PendingRequest? in
            let request = Request(
                command, flags: flags.union(fua), cookie: 0, offset: piece.lowerBound, length: piece.count64)
            return try channel.begin(request, mayWait: mayWait, isLast: isLast)
        }
    }

    /// Tells that a range's content is no longer needed: advice, which parts of blocks do not take.
    func discard(_ range: Range<UInt64>, durable: Bool) throws(BlockError) {
        let inner = inwards(range)
        if has(.sendTrim) && !inner.isEmpty {
            try withBlocks(parts: false) { () throws(BlockError) in
                try changeWithoutData(NBD.Command.trim, inner, [], durable: durable)
            }
        }
    }

    /// Makes what was changed durable, as far as the server can do that.
    ///
    /// - Parameter losses: those before the change that this belongs to; nil where the flush is for all changes.
    func flush(since losses: UInt64? = nil) throws(BlockError) {
        // What was lost is told even where there is no flush.
        guard has(.sendFlush) else { return try pool.flush(since: losses, nil) }
        try pool.flush(since: losses) { (channel) throws(ChannelError) in
            try channel.perform(Request(NBD.Command.flush, cookie: 0))
        }
    }
}
