// Replies of a server as a state machine without I/O: every chunk is checked against its request before it counts.
import Block

/// Takes the server's bytes of the transmission phase.
///
/// Headers and small payloads go through a small buffer; what a read asked for goes straight to where it was asked for.
/// The first chunk that cannot be right is an error, after which nothing of the connection can be trusted.
struct ReplyParser: ~Copyable {
    /// Bytes of the buffer.
    static let bufferSize = 16384
    /// The longest payload of an error chunk: two numbers, a text, an offset, and room.
    static let errorLengthMax: UInt64 = 8192
    /// The most errors in one answer.
    static let errorCountMax = 4096
    /// The longest block status chunk, in bytes: what servers send for a million extents.
    static let statusLengthMax: UInt64 = 32 << 20

    private enum State {
        case header
        /// The rest of a data chunk is received straight to its destination.
        case data(PendingRequest, isLast: Bool)
        /// Extents follow, so many bytes of them, from a position in the request on.
        case extents(PendingRequest, left: UInt64, position: UInt64, isWanted: Bool, isLast: Bool)
    }

    private enum Step {
        case needsMore
        case taken
        case finished(PendingRequest)
    }

    private let mode: HeaderMode
    private let size: UInt64
    private let contextIDs: [UInt32]
    private let buffer = Buffer(count: bufferSize)
    private var start = 0
    private var end = 0
    private var state = State.header
    /// Where the next bytes go before any go to the buffer.
    private(set) var direct = UnsafeMutableRawBufferPointer(start: nil, count: 0)

    /// A parser for a connection on which this was agreed.
    init(_ agreement: ClientAgreement) {
        mode = agreement.mode
        size = agreement.size
        contextIDs = agreement.contexts.map(\.id)
    }

    /// Where bytes go that come behind those for `direct`; never empty.
    var space: UnsafeMutableRawBufferPointer {
        mutating get {
            if start == end {
                start = 0
                end = 0
            } else if start > Self.bufferSize / 2 || end == Self.bufferSize {
                let rest = UnsafeRawBufferPointer(rebasing: buffer.readable[start..<end])
                buffer.bytes.copyMemory(from: rest)
                (start, end) = (0, rest.count)
            }
            return UnsafeMutableRawBufferPointer(rebasing: buffer.bytes[end...])
        }
    }

    /// Tells that so many bytes were put into `direct` first, then into `space`.
    mutating func received(_ count: Int) {
        let first = min(count, direct.count)
        direct = UnsafeMutableRawBufferPointer(rebasing: direct[first...])
        end += count - first
    }

    /// Forgets where bytes were to go: whoever wanted them has stopped waiting. Nothing can be parsed from then on.
    mutating func abandon() {
        direct = UnsafeMutableRawBufferPointer(start: nil, count: 0)
        state = .header
    }

    /// Goes on with what has come.
    ///
    /// - Returns: the next request whose answer is complete; nil when more bytes are needed.
    /// - Throws: `.corrupt` that says what the server did.
    mutating func next(_ requests: some PendingRequests) throws(BlockError) -> PendingRequest? {
        while true {
            switch state {
            case .header:
                switch try takeHeader(requests) {
                case .needsMore: return nil
                case .taken: continue
                case .finished(let request): return request
                }
            case .data(let request, let isLast):
                if !direct.isEmpty { return nil }
                state = .header
                if isLast {
                    try checkComplete(request)
                    return request
                }
            case .extents(let request, let left, let position, let isWanted, let isLast):
                let (left, position) = try takeExtents(request, left, position, isWanted: isWanted)
                if left > 0 {
                    state = .extents(request, left: left, position: position, isWanted: isWanted, isLast: isLast)
                    return nil
                }
                state = .header
                if isLast {
                    try checkComplete(request)
                    return request
                }
            }
        }
    }

    /// What has come and is not taken.
    private var rest: UnsafeRawBufferPointer { UnsafeRawBufferPointer(rebasing: buffer.readable[start..<end]) }

    private func bad(_ what: String) -> BlockError { BlockError(.corrupt, what) }

    /// Takes one header with the start of its payload, and the whole payload where it is small.
    private mutating func takeHeader(_ requests: some PendingRequests) throws(BlockError) -> Step {
        let input = rest
        guard input.count >= 4 else { return .needsMore }
        let magic = input.bigEndian(0, as: UInt32.self)
        guard let headerSize = ReplyHeader.size(magic: magic), isAllowed(magic) else {
            throw bad("it sent something that is no reply (magic number \(magic))")
        }
        guard input.count >= headerSize, let header = ReplyHeader(input) else { return .needsMore }
        guard let request = requests.find(cookie: header.cookie) else {
            throw bad("it answered a request that nobody sent, or that was answered before (cookie \(header.cookie))")
        }
        if magic == NBD.simpleReplyMagic {
            start += headerSize
            return try takeSimple(header, request)
        }
        if mode == .extended && header.offset != request.request.offset {
            throw bad("its reply to \(request.doing) is about the offset \(header.offset)")
        }
        let isLast = header.flags & NBD.Chunk.flagDone != 0
        let payload = UnsafeRawBufferPointer(rebasing: input[headerSize...])
        guard let taken = try takeChunk(header, request, payload, isLast: isLast) else {
            return .needsMore
        }
        start += headerSize + taken
        // Data and extents that are not here yet end the chunk later.
        guard case .header = state else {
            startData()
            return .taken
        }
        if !isLast { return .taken }
        try checkComplete(request)
        return .finished(request)
    }

    private func isAllowed(_ magic: UInt32) -> Bool {
        switch mode {
        case .simple: magic == NBD.simpleReplyMagic
        case .structured: magic == NBD.simpleReplyMagic || magic == NBD.structuredReplyMagic
        case .extended: magic == NBD.extendedReplyMagic
        }
    }

    private mutating func takeSimple(_ header: ReplyHeader, _ request: PendingRequest) throws(BlockError) -> Step {
        let command = request.request.command
        if header.error != 0 {
            request.error = request.error ?? serverError(header.error, "")
            return .finished(request)
        }
        if command == NBD.Command.blockStatus || command == NBD.Command.read && mode != .simple {
            throw bad("it answered \(request.doing) with a simple reply, which cannot carry that")
        }
        guard command == NBD.Command.read else { return .finished(request) }
        direct = request.destination
        _ = request.coverage.add(0..<request.request.length)
        state = .data(request, isLast: true)
        startData()
        return .taken
    }

    /// Copies what the buffer has of a data chunk's bytes; the rest is received in its place.
    private mutating func startData() {
        let input = rest
        let count = min(direct.count, input.count)
        if count == 0 { return }
        direct.copyMemory(from: UnsafeRawBufferPointer(rebasing: input[..<count]))
        direct = UnsafeMutableRawBufferPointer(rebasing: direct[count...])
        start += count
    }

    /// Takes a chunk's payload, or its fixed part where data or extents follow.
    ///
    /// - Returns: the bytes taken; nil when more are needed.
    private mutating func takeChunk(
        _ header: ReplyHeader, _ request: PendingRequest, _ payload: UnsafeRawBufferPointer, isLast: Bool
    ) throws(BlockError) -> Int? {
        let command = request.request.command
        switch header.type {
        case NBD.Chunk.none:
            guard header.length == 0, isLast else { throw bad("an empty chunk has a payload, or is not the last one") }
            return 0
        case NBD.Chunk.offsetData where command == NBD.Command.read:
            guard header.length > 8 else { throw bad("a data chunk has no data") }
            guard payload.count >= 8 else { return nil }
            let offset = payload.bigEndian(0, as: UInt64.self)
            let part = try cover(request, offset, header.length - 8)
            direct = UnsafeMutableRawBufferPointer(rebasing: request.destination[part])
            state = .data(request, isLast: isLast)
            return 8
        case NBD.Chunk.offsetHole where command == NBD.Command.read:
            guard header.length == 12 else { throw bad("a hole has a payload of \(header.length) bytes") }
            guard payload.count >= 12 else { return nil }
            let length = UInt64(payload.bigEndian(8, as: UInt32.self))
            if length == 0 { throw bad("a hole has no length") }
            let part = try cover(request, payload.bigEndian(0), length)
            UnsafeMutableRawBufferPointer(rebasing: request.destination[part])
                .initializeMemory(as: UInt8.self, repeating: 0)
            return 12
        case NBD.Chunk.blockStatus, NBD.Chunk.blockStatusExtended:
            guard command == NBD.Command.blockStatus else { break }
            return try startExtents(header, request, payload, isLast: isLast)
        case let type where type & 0x8000 != 0:
            return try takeError(header, request, payload)
        default: break
        }
        throw bad("it answered \(request.doing) with a chunk of type \(header.type), which makes no sense")
    }

    /// Where a part of a read goes in its destination.
    private func cover(_ request: PendingRequest, _ offset: UInt64, _ length: UInt64) throws(BlockError) -> Range<Int> {
        let asked = request.request
        guard offset >= asked.offset, offset - asked.offset < asked.length,
            length <= asked.length - (offset - asked.offset)
        else { throw bad("it answered \(request.doing) with \(length) bytes at \(offset), which lie outside") }
        let from = offset - asked.offset
        guard request.coverage.add(from..<(from + length)), from + length <= UInt64(request.destination.count) else {
            throw bad("it answered \(request.doing) with the bytes at \(offset) twice, or in too many pieces")
        }
        return Int(from)..<Int(from + length)
    }

    private func takeError(_ header: ReplyHeader, _ request: PendingRequest, _ payload: UnsafeRawBufferPointer)
        throws(BlockError) -> Int?
    {
        guard header.length >= 6, header.length <= Self.errorLengthMax else {
            throw bad("an error has a payload of \(header.length) bytes")
        }
        let length = Int(header.length)
        guard payload.count >= length else { return nil }
        let value = payload.bigEndian(0, as: UInt32.self)
        let textEnd = 6 + Int(payload.bigEndian(4, as: UInt16.self))
        let isOffset = header.type == NBD.Chunk.errorOffset
        // Types that are not known may have something behind the text.
        let isKnown = isOffset || header.type == NBD.Chunk.error
        guard value != 0, textEnd <= length, !isKnown || textEnd + (isOffset ? 8 : 0) == length else {
            throw bad("it answered \(request.doing) with a malformed error")
        }
        var text = cleaned(payload[6..<textEnd])
        if isOffset {
            let offset = payload.bigEndian(textEnd, as: UInt64.self)
            let asked = request.request
            guard offset >= asked.offset, offset - asked.offset < asked.length else {
                throw bad("it answered \(request.doing) with an error at \(offset), which lies outside")
            }
            text = text.isEmpty ? "at \(offset)" : "at \(offset): \(text)"
        }
        request.errorCount += 1
        if request.errorCount > Self.errorCountMax {
            throw bad("it answered \(request.doing) with more than \(Self.errorCountMax) errors")
        }
        if request.error == nil { request.error = serverError(value, text) }
        return length
    }

    // MARK: - Block status

    private mutating func startExtents(
        _ header: ReplyHeader, _ request: PendingRequest, _ payload: UnsafeRawBufferPointer, isLast: Bool
    ) throws(BlockError) -> Int? {
        let isExtended = mode == .extended
        let (fixed, each): (UInt64, UInt64) = isExtended ? (8, 16) : (4, 8)
        guard (header.type == NBD.Chunk.blockStatusExtended) == isExtended,
            header.length >= fixed + each, (header.length - fixed) % each == 0, header.length <= Self.statusLengthMax
        else { throw bad("it answered \(request.doing) with a malformed block status") }
        guard payload.count >= Int(fixed) else { return nil }
        let id = payload.bigEndian(0, as: UInt32.self)
        guard contextIDs.contains(id), var question = request.status, !question.answered.contains(id) else {
            throw bad("it answered \(request.doing) for the context \(id), which is unknown or was answered before")
        }
        if isExtended, UInt64(payload.bigEndian(4, as: UInt32.self)) != (header.length - fixed) / each {
            throw bad("it answered \(request.doing) with a wrong number of extents")
        }
        question.answered.append(id)
        request.status = question
        state = .extents(
            request, left: header.length - fixed, position: 0, isWanted: question.contextID == id, isLast: isLast)
        return Int(fixed)
    }

    /// Takes the extents that have come whole.
    private mutating func takeExtents(
        _ request: PendingRequest, _ left: UInt64, _ position: UInt64, isWanted: Bool
    ) throws(BlockError) -> (left: UInt64, position: UInt64) {
        let each = mode == .extended ? 16 : 8
        let input = rest
        var (left, position) = (left, position)
        var taken = 0
        let asked = request.request
        while left > 0 && input.count - taken >= each {
            let length =
                each == 16 ? input.bigEndian(taken) : UInt64(input.bigEndian(taken, as: UInt32.self))
            let value =
                each == 16 ? input.bigEndian(taken + 8) : UInt64(input.bigEndian(taken + 4, as: UInt32.self))
            // Only the last extent may tell more than was asked, and none of what lies behind the export.
            guard length > 0, position < asked.length, length <= size - asked.offset - position else {
                throw bad(
                    "it answered \(request.doing) with an extent of \(length) bytes at \(asked.offset + position)")
            }
            if isWanted { request.status?.keep(min(length, asked.length - position), value) }
            position += min(length, asked.length - position)
            taken += each
            left -= UInt64(each)
        }
        start += taken
        return (left, position)
    }

    // MARK: - The end of an answer

    /// Checks that a request without an error got everything that it asked for.
    private func checkComplete(_ request: PendingRequest) throws(BlockError) {
        if request.error != nil { return }
        switch request.request.command {
        case NBD.Command.read where request.coverage.end != request.request.length || !request.coverage.islands.isEmpty:
            throw bad("it ended its answer to \(request.doing) before all bytes had come")
        case NBD.Command.blockStatus:
            guard let status = request.status, status.answered.contains(status.contextID) else {
                throw bad("it ended its answer to \(request.doing) without telling it")
            }
        default: break
        }
    }

    private func serverError(_ value: UInt32, _ text: String) -> BlockError {
        let name = errorName(value)
        return BlockError(
            BlockError.Kind(errorValue: value), "the server answered \(name)\(text.isEmpty ? "" : ": \(text)")")
    }

    private func errorName(_ value: UInt32) -> String {
        switch value {
        case NBD.ErrorValue.notPermitted: "EPERM"
        case NBD.ErrorValue.inputOutput: "EIO"
        case NBD.ErrorValue.noMemory: "ENOMEM"
        case NBD.ErrorValue.invalid: "EINVAL"
        case NBD.ErrorValue.noSpace: "ENOSPC"
        case NBD.ErrorValue.overflow: "EOVERFLOW"
        case NBD.ErrorValue.notSupported: "ENOTSUP"
        case NBD.ErrorValue.shutdown: "ESHUTDOWN"
        default: "error \(value)"
        }
    }
}
