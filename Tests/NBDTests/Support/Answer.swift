// Replies of the transmission phase, put together and checked against the request they answer.
import Block
import NBD

/// The complete answer to one request.
struct Answer {
    /// One chunk as it came.
    struct Chunk: Equatable {
        var type: UInt16
        var offset: UInt64 = 0
        var length: UInt64 = 0
    }

    /// The first error; nil when all went well.
    var error: UInt32?
    /// Offsets of NBD_REPLY_TYPE_ERROR_OFFSET chunks.
    var errorOffsets: [UInt64] = []
    /// Texts of errors.
    var texts: [String] = []
    /// The bytes of a read; where an error left some out, they are 0xFA.
    var data: [UInt8] = []
    /// Chunks in the order they came; one of type none for a simple reply.
    var chunks: [Chunk] = []
    /// Status extents by context id.
    var status: [UInt32: [StatusExtent]] = [:]
}

/// What has come for a request so far.
struct Partial {
    let request: Request
    var answer = Answer()
    /// Ranges that data and hole chunks have covered.
    private var covered: [Range<UInt64>] = []

    init(_ request: Request) {
        self.request = request
        if request.command == NBD.Command.read, request.length <= 128 << 20 {
            answer.data = [UInt8](repeating: 0xFA, count: Int(request.length))
        }
    }

    private var end: UInt64 { request.offset &+ request.length }

    /// Marks a range as answered: it must lie in the request and not have been answered before.
    mutating func cover(_ offset: UInt64, _ length: UInt64, with content: [UInt8]?) throws {
        guard length > 0, offset >= request.offset, offset <= end, length <= end - offset else {
            throw Violation("a chunk of \(length) bytes at \(offset) lies outside its read \(request)")
        }
        let range = offset..<(offset + length)
        if covered.contains(where: { $0.overlaps(range) }) { throw Violation("\(range) was answered twice") }
        covered.append(range)
        let start = Int(offset - request.offset)
        answer.data.withUnsafeMutableBytes { data in
            let part = UnsafeMutableRawBufferPointer(rebasing: data[start..<(start + Int(length))])
            if let content {
                part.copyBytes(from: content)
            } else {
                part.initializeMemory(as: UInt8.self, repeating: 0)
            }
        }
    }

    /// Ends the answer: without an error every byte must have been answered.
    func finished() throws -> Answer {
        let sum = covered.reduce(0) { $0 + $1.count64 }
        if request.command == NBD.Command.read, answer.error == nil, sum != request.length {
            throw Violation("a read of \(request.length) bytes was answered with \(sum)")
        }
        return answer
    }
}

extension TestClient {
    /// Receives reply messages until one request is answered completely.
    func receiveAnswer() throws -> (cookie: UInt64, answer: Answer) {
        while true {
            let magic = try receive(4)
            guard let size = ReplyHeader.size(magic: magic.number(0)) else {
                throw Violation("no reply begins with \(magic)")
            }
            guard let header = (magic + (try receive(size - 4))).withUnsafeBytes({ ReplyHeader($0) }) else {
                throw Violation("a reply's header is malformed")
            }
            // Taken out, so that its bytes are changed in place.
            guard var partial = pending.removeValue(forKey: header.cookie) else {
                throw Violation("a reply to \(header.cookie), which nobody asked or which was answered before")
            }
            let isDone: Bool
            if size == 16 {
                try receiveSimple(header, &partial)
                isDone = true
            } else {
                guard size == mode.replySize else { throw Violation("a chunk of \(size) bytes in \(mode) mode") }
                try receiveChunk(header, &partial)
                isDone = header.flags == NBD.Chunk.flagDone
            }
            if isDone { return (header.cookie, try partial.finished()) }
            pending[header.cookie] = partial
        }
    }

    private func receiveSimple(_ header: ReplyHeader, _ partial: inout Partial) throws {
        let request = partial.request
        if mode == .extended { throw Violation("a simple reply in extended mode") }
        if mode == .structured, request.command == NBD.Command.read || request.command == NBD.Command.blockStatus {
            throw Violation("a simple reply to \(request) in structured mode")
        }
        partial.answer.chunks.append(Answer.Chunk(type: NBD.Chunk.none))
        if header.error != 0 {
            partial.answer.error = header.error
        } else if request.command == NBD.Command.read {
            let data = try receive(Int(request.length))
            try partial.cover(request.offset, request.length, with: data)
        }
    }

    private func receiveChunk(_ header: ReplyHeader, _ partial: inout Partial) throws {
        let request = partial.request
        if header.flags & ~NBD.Chunk.flagDone != 0 { throw Violation("unknown flags \(header.flags)") }
        if mode == .extended, header.offset != request.offset {
            throw Violation("offset \(header.offset) for \(request)")
        }
        guard header.length <= 65 << 20 else { throw Violation("a chunk of \(header.length) bytes") }
        let payload = try receive(Int(header.length))
        partial.answer.chunks.append(Answer.Chunk(type: header.type, length: header.length))
        let last = partial.answer.chunks.count - 1
        switch header.type {
        case NBD.Chunk.none:
            if !payload.isEmpty || header.flags == 0 {
                throw Violation("a chunk of no type with data, or not the last")
            }
        case NBD.Chunk.offsetData where request.command == NBD.Command.read && payload.count > 8:
            partial.answer.chunks[last] = .init(type: header.type, offset: payload.number(0), length: header.length - 8)
            try partial.cover(payload.number(0), header.length - 8, with: Array(payload[8...]))
        case NBD.Chunk.offsetHole where request.command == NBD.Command.read && payload.count == 12:
            let length = UInt64(payload.number(8, as: UInt32.self))
            partial.answer.chunks[last] = .init(type: header.type, offset: payload.number(0), length: length)
            try partial.cover(payload.number(0), length, with: nil)
        case NBD.Chunk.blockStatus where mode == .structured && request.command == NBD.Command.blockStatus:
            try takeStatus(payload, wide: false, &partial)
        case NBD.Chunk.blockStatusExtended where mode == .extended && request.command == NBD.Command.blockStatus:
            try takeStatus(payload, wide: true, &partial)
        case NBD.Chunk.error, NBD.Chunk.errorOffset: try takeError(header.type, payload, &partial)
        default: throw Violation("a chunk of type \(header.type) and \(payload.count) bytes for \(request)")
        }
    }

    private func takeStatus(_ payload: [UInt8], wide: Bool, _ partial: inout Partial) throws {
        let id: UInt32 = payload.number(0)
        let head = wide ? 8 : 4
        let size = wide ? 16 : 8
        guard contexts.values.contains(id), partial.answer.status[id] == nil else {
            throw Violation("status of context \(id), which was not negotiated or came before")
        }
        guard payload.count >= head + size, (payload.count - head) % size == 0 else {
            throw Violation("a status chunk of \(payload.count) bytes")
        }
        if wide, Int(payload.number(4, as: UInt32.self)) != (payload.count - head) / size {
            throw Violation("extent count")
        }
        partial.answer.status[id] = stride(from: head, to: payload.count, by: size).map { index in
            wide
                ? StatusExtent(
                    length: payload.number(index),
                    value: UInt32(truncatingIfNeeded: payload.number(index + 8, as: UInt64.self)))
                : StatusExtent(length: UInt64(payload.number(index, as: UInt32.self)), value: payload.number(index + 4))
        }
        let extents = partial.answer.status[id] ?? []
        if extents.contains(where: { $0.length == 0 }) { throw Violation("an extent of no bytes") }
    }

    private func takeError(_ type: UInt16, _ payload: [UInt8], _ partial: inout Partial) throws {
        let hasOffset = type == NBD.Chunk.errorOffset
        let length = Int(payload.number(4, as: UInt16.self))
        let value: UInt32 = payload.number(0)
        guard payload.count == 6 + length + (hasOffset ? 8 : 0), value != 0, length <= NBD.stringLengthMax else {
            throw Violation("an error chunk of \(payload.count) bytes with a text of \(length)")
        }
        guard let text = String(validating: payload[6..<(6 + length)], as: UTF8.self) else {
            throw Violation("an error's text is no UTF-8")
        }
        partial.answer.error = partial.answer.error ?? value
        partial.answer.texts.append(text)
        if hasOffset {
            let offset: UInt64 = payload.number(6 + length)
            let request = partial.request
            guard offset >= request.offset, offset - request.offset < request.length else {
                throw Violation("an error at \(offset), outside \(request)")
            }
            partial.answer.errorOffsets.append(offset)
        }
    }
}
