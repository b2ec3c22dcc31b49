// The commands of a channel: what waits for the answer, and what is submitted with a token.
public import Block

extension ClientChannel {
    /// The most bytes of one read or write.
    public var payloadMax: UInt64 { UInt64(agreement.blockSizes.maximum) }

    // MARK: - With a token, for one thread with many requests in flight

    /// Submits a read. The range keeps to the agreed block sizes; the buffer stays until the completion is taken.
    ///
    /// - Throws: the connection has ended, or the range is outside of the export.
    public func submitRead(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64, token: UInt64)
        throws(ChannelError)
    {
        _ = try begin(
            Request(NBD.Command.read, cookie: 0, offset: offset, length: UInt64(buffer.count)), into: buffer,
            disposition: .queued(token: token), isLast: false)
    }

    /// Submits a write. The range keeps to the agreed block sizes; the buffer stays until the completion is taken.
    ///
    /// - Parameter durable: only where the server has NBD_FLAG_SEND_FUA.
    /// - Throws: the connection has ended, or the range is outside of the export.
    public func submitWrite(_ bytes: UnsafeRawBufferPointer, at offset: UInt64, durable: Bool, token: UInt64)
        throws(ChannelError)
    {
        _ = try begin(
            writeRequest(offset, bytes.count, durable ? .fua : []), payload: bytes,
            disposition: .queued(token: token), isLast: false)
    }

    /// Submits zeroing, where the server has NBD_FLAG_SEND_WRITE_ZEROES.
    ///
    /// - Throws: the connection has ended, or the range is outside of the export.
    public func submitZero(_ range: Range<UInt64>, flags: NBD.CommandFlags, token: UInt64) throws(ChannelError) {
        _ = try begin(
            Request(
                NBD.Command.writeZeroes, flags: flags, cookie: 0, offset: range.lowerBound, length: range.count64),
            disposition: .queued(token: token), isLast: false)
    }

    // MARK: - For any number of threads

    /// A write's header.
    func writeRequest(_ offset: UInt64, _ count: Int, _ flags: NBD.CommandFlags) -> Request {
        // With 64-bit headers, the flag tells that the length is that of a payload.
        Request(
            NBD.Command.write, flags: agreement.mode == .extended ? flags.union(.payloadLength) : flags, cookie: 0,
            offset: offset, length: UInt64(count))
    }

    /// Sends a request without data and waits for its end.
    func perform(_ request: Request) throws(ChannelError) {
        guard let pending = try begin(request) else { return }
        try finish(pending)
    }

    /// Asks what a context says of a range.
    ///
    /// - Parameters:
    ///   - mask: the bits of the values that mean something.
    ///   - capacity: the most extents that are kept.
    /// - Returns: extents from the range's start on, at least one.
    /// - Throws: what the server answered, or that the connection has ended.
    public func status(_ contextID: UInt32, of range: Range<UInt64>, mask: UInt64, capacity: Int) throws(ChannelError)
        -> [StatusExtent]
    {
        var request = Request(
            NBD.Command.blockStatus, cookie: 0, offset: range.lowerBound, length: range.count64)
        let question = StatusQuestion(contextID: contextID, mask: mask, capacity: capacity)
        let filter = Buffer(count: 12)
        var payload = UnsafeRawBufferPointer(start: nil, count: 0)
        let isChoosing = agreement.flags.contains(.blockStatusPayload) && agreement.contexts.count > 1
        if agreement.mode == .extended && isChoosing {
            // Without it, the server would tell about every context that was agreed on.
            filter.bytes.storeBigEndian(range.count64, at: 0)
            filter.bytes.storeBigEndian(contextID, at: 8)
            payload = UnsafeRawBufferPointer(rebasing: filter.readable[..<12])
            request.flags = .payloadLength
            request.length = UInt64(payload.count)
        }
        let begun = try begin(request, payload: payload, status: question, effect: range.count64)
        guard let pending = begun else { return [] }
        var extents: [StatusExtent] = []
        try finish(pending) { extents = $0.status?.extents ?? [] }
        return extents
    }
}
