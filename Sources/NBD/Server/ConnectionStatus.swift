// BLOCK_STATUS: what the chosen meta contexts know of a range.
import Block
import LinuxIO

extension Connection where Link: ~Copyable {
    /// The most extents in one reply, all contexts together: it may be shorter than was asked, and memory is bounded.
    static var statusExtentsMax: Int { 8192 }
    /// Bytes that such a reply takes while it is made: the extents, and their form on the wire.
    static var statusReplyMax: Int { statusExtentsMax * 32 }

    mutating func blockStatus(_ request: Request) {
        var request = request
        var wanted = contexts
        do throws(BlockError) {
            if mode == .extended && request.flags.contains(.payloadLength) {
                let filter = try receiveFilter(request)
                request.length = filter.length
                wanted = filter.contexts
            }
            if wanted.isEmpty {
                throw BlockError(.invalid, "block status: no meta context was negotiated")
            }
            let range = try export.check(offset: request.offset, length: request.length)
            submitStatus(request, range, wanted)
        } catch { replyError(request, error) }
    }

    /// The payload of a filtered request: the effect length, then the ids of the wanted contexts (NBD protocol,
    /// extension-ext-header, NBD_CMD_BLOCK_STATUS).
    private mutating func receiveFilter(_ request: Request) throws(BlockError) -> (length: UInt64, contexts: [UInt32]) {
        let longest = 8 + 4 * UInt64(contexts.count)
        guard request.length >= 8, request.length <= longest, request.length % 4 == 0 else {
            skipPayload(request.length)
            throw BlockError(.invalid, "block status: a filter of \(request.length) bytes is malformed")
        }
        let payload = Buffer(count: Int(request.length))
        let bytes = UnsafeMutableRawBufferPointer(rebasing: payload.bytes[..<Int(request.length)])
        guard receivePayload(into: bytes) else { throw BlockError(.shutdown, "the client is gone") }
        let raw = UnsafeRawBufferPointer(bytes)
        let ids = stride(from: 8, to: raw.count, by: 4).map { raw.bigEndian($0, as: UInt32.self) }
        guard Set(ids).count == ids.count, ids.allSatisfy({ contexts.contains($0) }) else {
            throw BlockError(.invalid, "block status: the filter names a context twice, or one not negotiated")
        }
        return (raw.bigEndian(0), ids)
    }

    /// Has a lane ask the device and make the whole reply.
    private mutating func submitStatus(_ request: Request, _ range: Range<UInt64>, _ wanted: [UInt32]) {
        let slot = takeSlot(bytes: 1, extra: Self.statusReplyMax)
        let arrival = arrival
        withSlot(slot) {
            $0.kind = .plain
            $0.operation = .status
            $0.arrival = arrival
            $0.cookie = request.cookie
            $0.requestOffset = request.offset
        }
        let reply = StatusReply(
            device: device, mode: mode, cookie: request.cookie, requestOffset: request.offset,
            extentsMax: request.flags.contains(.requestOne) ? 1 : max(Self.statusExtentsMax / wanted.count, 1))
        let chosen = wanted.compactMap { id in
            Int(id) < export.contexts.count ? (id, export.contexts[Int(id)].context) : nil
        }
        runOnLane(slot) { () throws(BlockError) -> [UInt8] in try reply.make(range, chosen) }
    }
}

/// Makes the chunks that answer one BLOCK_STATUS.
private struct StatusReply: Sendable {
    let device: any BlockDevice
    let mode: HeaderMode
    let cookie: UInt64
    let requestOffset: UInt64
    let extentsMax: Int

    func make(_ range: Range<UInt64>, _ contexts: [(id: UInt32, context: StatusContext)]) throws(BlockError) -> [UInt8]
    {
        var reply: [UInt8] = []
        var list = StatusList(capacity: extentsMax)
        for (index, (id, context)) in contexts.enumerated() {
            list.removeAll()
            try fill(&list, context, range)
            if list.extents.isEmpty {
                throw BlockError(.inputOutput, "block status at \(range.lowerBound) of \(device.info.name): no answer")
            }
            append(list.extents, id, done: index == contexts.count - 1, to: &reply)
        }
        return reply
    }

    /// Asks in steps that grow while answers come fast, and leaves the rest to the client's next request when they do
    /// not: a map of 2^63 bytes must not keep a lane for minutes.
    private func fill(_ list: inout StatusList, _ context: StatusContext, _ range: Range<UInt64>) throws(BlockError) {
        let deadline = monotonicSeconds() + 0.25
        var step: UInt64 = 1 << 36
        var position = range.lowerBound
        var now = monotonicSeconds()
        while position < range.upperBound && now < deadline {
            let wanted = position + min(step, range.upperBound - position)
            let end = try device.status(context, of: position..<wanted, into: &list)
            if end < wanted { return }
            position = end
            let before = now
            now = monotonicSeconds()
            if now - before < 0.01 && step < 1 << 60 { step *= 4 }
        }
    }

    private func append(_ extents: [StatusExtent], _ id: UInt32, done: Bool, to reply: inout [UInt8]) {
        let isExtended = mode == .extended
        let length = isExtended ? 8 + 16 * extents.count : 4 + 8 * extents.count
        let header = ReplyHeader(
            flags: done ? NBD.Chunk.flagDone : 0,
            type: isExtended ? NBD.Chunk.blockStatusExtended : NBD.Chunk.blockStatus, cookie: cookie,
            offset: requestOffset, length: UInt64(length))
        reply.append(contentsOf: repeatElement(0, count: mode.replySize))
        reply.withUnsafeMutableBytes {
            header.store(mode, into: UnsafeMutableRawBufferPointer(rebasing: $0[($0.count - mode.replySize)...]))
        }
        reply.appendBigEndian(id)
        if isExtended { reply.appendBigEndian(UInt32(extents.count)) }
        for extent in extents {
            if isExtended {
                reply.appendBigEndian(extent.length)
                reply.appendBigEndian(UInt64(extent.value))
            } else {
                // No extent is longer than the request, whose length has 32 bits in this mode.
                reply.appendBigEndian(UInt32(truncatingIfNeeded: extent.length))
                reply.appendBigEndian(extent.value)
            }
        }
    }
}
