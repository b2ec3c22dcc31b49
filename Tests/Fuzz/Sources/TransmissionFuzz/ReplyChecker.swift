// Reads replies as a strict client does: every byte belongs to a reply, every request gets what the protocol allows.
import Block
import FuzzSupport
import NBD

/// What the replies to one request may and must be.
private struct Expected {
    let request: Request
    /// The bytes that it asks for; for a filtered block status not the payload's length.
    let length: UInt64
    /// Whether it was cut off, so that it need not be answered.
    let isCutOff: Bool
    var isAnswered = false
    var hasFailed = false
    /// Parts of a read that were answered, joined where they touch, and how many came.
    var parts: [Range<UInt64>] = []
    var partCount = 0
    /// Contexts that a block status was answered for.
    var contexts: Set<UInt32> = []
}

/// Checks everything that a server sent to one client.
struct ReplyChecker {
    private let shape: Shape
    private var expected: [UInt64: Expected] = [:]
    /// False where two requests have one cookie: who is answered cannot be told.
    private var isExact = true

    init(_ shape: Shape, requests: [UInt8]) {
        self.shape = shape
        requests.withUnsafeBytes { readRequests($0) }
    }

    /// Reads the requests as the protocol says a server must.
    private mutating func readRequests(_ stream: UnsafeRawBufferPointer) {
        let size = shape.mode.requestSize
        var position = 0
        while stream.count - position >= size {
            let header = UnsafeRawBufferPointer(rebasing: stream[position..<(position + size)])
            guard let request = Request(header, shape.mode), request.command != NBD.Command.disconnect else { return }
            position += size
            let payload = request.payloadLength(shape.mode)
            let isCutOff = payload > UInt64(stream.count - position)
            var length = request.length
            if !isCutOff {
                let isFilter = request.command == NBD.Command.blockStatus && payload >= 8
                if isFilter { length = stream.bigEndian(position) }
                position += Int(payload)
            }
            if expected[request.cookie] != nil { isExact = false }
            expected[request.cookie] = Expected(request: request, length: length, isCutOff: isCutOff)
            if isCutOff { return }
        }
    }

    /// Checks the replies of handshake and transmission.
    mutating func check(_ stream: UnsafeRawBufferPointer) {
        var rest = afterHandshake(stream)
        // How many bytes follow a simple reply can be told by its cookie only.
        if shape.mode == .simple && !isExact { return }
        while !rest.isEmpty {
            guard let header = ReplyHeader(rest) else { fatalError("broken promise: no reply begins with \(rest[0])") }
            let isSimple = rest.bigEndian(0, as: UInt32.self) == NBD.simpleReplyMagic
            let size = isSimple ? 16 : shape.mode.replySize
            if isSimple {
                require(shape.mode != .extended, "a simple reply after extended headers")
            } else {
                let magic =
                    shape.mode == .extended ? NBD.extendedReplyMagic : NBD.structuredReplyMagic
                require(shape.mode != .simple && rest.bigEndian(0) == magic, "a chunk of another mode")
            }
            rest = UnsafeRawBufferPointer(rebasing: rest[size...])
            guard var entry = expected[header.cookie] else { fatalError("broken promise: a reply to nobody") }
            require(!isExact || !entry.isAnswered, "a second reply to \(entry.request)")
            let length = isSimple ? simple(header, &entry, rest) : chunk(header, &entry, rest)
            rest = UnsafeRawBufferPointer(rebasing: rest[length...])
            expected[header.cookie] = entry
        }
        for entry in expected.values where isExact && !entry.isCutOff {
            require(entry.isAnswered, "no reply to \(entry.request)")
        }
    }

    /// What follows the greeting and the replies to options.
    private func afterHandshake(_ stream: UnsafeRawBufferPointer) -> UnsafeRawBufferPointer {
        var position = 18
        while true {
            require(stream.count - position >= 20, "the handshake ends early")
            require(stream.bigEndian(position) == NBD.optionReplyMagic, "a reply to an option without its magic")
            let option = stream.bigEndian(position + 8, as: UInt32.self)
            let type = stream.bigEndian(position + 12, as: UInt32.self)
            position += 20 + Int(stream.bigEndian(position + 16, as: UInt32.self))
            require(type >> 31 == 0, "the option \(option) is refused with \(type)")
            if option == NBD.Option.go && type == NBD.OptionReply.ack { break }
        }
        return UnsafeRawBufferPointer(rebasing: stream[position...])
    }

    // MARK: - Replies

    /// Checks a simple reply; the bytes that follow its header.
    private func simple(_ header: ReplyHeader, _ entry: inout Expected, _ rest: UnsafeRawBufferPointer) -> Int {
        let command = entry.request.command
        require(
            shape.mode == .simple || !isExact
                || command != NBD.Command.read && command != NBD.Command.blockStatus,
            "a simple reply to \(entry.request)")
        if header.error != 0 { fail(header.error, &entry) }
        entry.isAnswered = true
        guard header.error == 0, command == NBD.Command.read, isExact else {
            checkEnd(entry)
            return 0
        }
        let count = Int(entry.length)
        require(rest.count >= count, "a read of \(count) bytes is cut off")
        addData(UnsafeRawBufferPointer(rebasing: rest[..<count]), at: entry.request.offset, &entry)
        checkEnd(entry)
        return count
    }

    /// Checks a chunk; the bytes that follow its header.
    private func chunk(_ header: ReplyHeader, _ entry: inout Expected, _ rest: UnsafeRawBufferPointer) -> Int {
        require(header.length <= UInt64(rest.count), "a chunk is cut off")
        let count = Int(header.length)
        let payload = UnsafeRawBufferPointer(rebasing: rest[..<count])
        let isDone = header.flags == NBD.Chunk.flagDone
        require(isDone || header.flags == 0, "a chunk with the flags \(header.flags)")
        require(
            shape.mode != .extended || !isExact || header.offset == entry.request.offset,
            "a chunk repeats the offset \(header.offset) of \(entry.request)")
        let isRead = entry.request.command == NBD.Command.read || !isExact
        let isStatus = entry.request.command == NBD.Command.blockStatus || !isExact
        switch header.type {
        case NBD.Chunk.none: require(isDone && count == 0, "an empty chunk that is not the last, or not empty")
        case NBD.Chunk.offsetData:
            require(isRead && count > 8, "data of \(count) bytes for \(entry.request)")
            addData(UnsafeRawBufferPointer(rebasing: payload[8...]), at: payload.bigEndian(0), &entry)
        case NBD.Chunk.offsetHole:
            require(isRead && count == 12, "a hole of \(count) bytes for \(entry.request)")
            addHole(UInt64(payload.bigEndian(8, as: UInt32.self)), at: payload.bigEndian(0), &entry)
        case NBD.Chunk.blockStatus:
            require(isStatus && shape.mode == .structured && count >= 12 && count % 8 == 4, "a malformed status")
            addStatus(payload, start: 4, stride: 8, &entry)
        case NBD.Chunk.blockStatusExtended:
            require(isStatus && shape.mode == .extended && count >= 24 && count % 16 == 8, "a malformed status")
            require(Int(payload.bigEndian(4, as: UInt32.self)) == count / 16, "a status with a wrong count")
            addStatus(payload, start: 8, stride: 16, &entry)
        case NBD.Chunk.error, NBD.Chunk.errorOffset:
            let more = header.type == NBD.Chunk.errorOffset ? 14 : 6
            require(count >= more, "an error of \(count) bytes")
            require(count == more + Int(payload.bigEndian(4, as: UInt16.self)), "an error with a wrong length of text")
            fail(payload.bigEndian(0), &entry)
        default: fatalError("broken promise: a chunk of type \(header.type)")
        }
        if isDone {
            entry.isAnswered = true
            checkEnd(entry)
        }
        return count
    }

    private func fail(_ error: UInt32, _ entry: inout Expected) {
        require([1, 5, 12, 22, 28, 75, 95, 108].contains(error), "an error value \(error)")
        entry.hasFailed = true
    }

    private func addPart(_ offset: UInt64, _ count: UInt64, _ entry: inout Expected) {
        guard isExact else { return }
        let (end, overflow) = offset.addingReportingOverflow(count)
        require(
            !overflow && count > 0 && offset >= entry.request.offset && end - entry.request.offset <= entry.length,
            "\(count) bytes at \(offset) for \(entry.request)")
        require(!entry.parts.contains { $0.overlaps(offset..<end) }, "\(offset) comes twice for \(entry.request)")
        entry.partCount += 1
        if let last = entry.parts.last, last.upperBound == offset {
            entry.parts[entry.parts.count - 1] = last.lowerBound..<end
        } else {
            entry.parts.append(offset..<end)
        }
    }

    private func addData(_ data: UnsafeRawBufferPointer, at offset: UInt64, _ entry: inout Expected) {
        addPart(offset, UInt64(data.count), &entry)
        guard isExact, SampleExports.constant.contains(shape.export.name) else { return }
        let scratch = Buffer(count: min(data.count, 1 << 16))
        var done = 0
        while done < data.count {
            let count = min(scratch.bytes.count, data.count - done)
            let part = UnsafeMutableRawBufferPointer(rebasing: scratch.bytes[..<count])
            guard (try? shape.export.device.read(into: part, at: offset + UInt64(done))) != nil else {
                fatalError("broken promise: data at \(offset) that cannot be read")
            }
            let sent = UnsafeRawBufferPointer(rebasing: data[done..<(done + count)])
            require(
                areEqual(sent, UnsafeRawBufferPointer(part)),
                "wrong data near \(offset + UInt64(done)) for \(entry.request)")
            done += count
        }
    }

    private func addHole(_ count: UInt64, at offset: UInt64, _ entry: inout Expected) {
        addPart(offset, count, &entry)
    }

    private func addStatus(_ payload: UnsafeRawBufferPointer, start: Int, stride size: Int, _ entry: inout Expected) {
        let context = payload.bigEndian(0, as: UInt32.self)
        require(Int(context) < shape.export.contexts.count && shape.hasContexts, "a status of the context \(context)")
        require(!isExact || entry.contexts.insert(context).inserted, "a second status of the context \(context)")
        var total: UInt64 = 0
        for position in Swift.stride(from: start, to: payload.count, by: size) {
            let length: UInt64 =
                size == 16 ? payload.bigEndian(position) : UInt64(payload.bigEndian(position, as: UInt32.self))
            require(length > 0 && length <= UInt64.max - total, "an extent of \(length) bytes")
            total += length
        }
        let isOne = entry.request.flags.contains(.requestOne) && isExact
        require(!isOne || payload.count == start + size, "several extents where one was asked for")
        require(!isExact || total <= entry.length, "a status of \(total) bytes for \(entry.request)")
    }

    /// Checks what a request got when it has its last reply.
    private func checkEnd(_ entry: Expected) {
        guard isExact, !entry.isCutOff else { return }
        let request = entry.request
        let size = shape.export.info.size
        let isInside = request.offset <= size && entry.length > 0 && entry.length <= size - request.offset
        if request.command == NBD.Command.read {
            let total = entry.parts.reduce(0) { $0 + $1.count64 }
            require(entry.hasFailed || total == entry.length, "\(total) bytes for \(request)")
            let isAlone = request.flags.contains(.dontFragment) && shape.mode != .simple
            require(!isAlone || entry.hasFailed || entry.partCount == 1, "fragments for \(request)")
            let mayFail =
                !isInside || !hasKnownFlags(request) || entry.length > Export.payloadMax
                || request.payloadLength(shape.mode) > 0
                || isAlone && entry.length > 262_144 || SampleExports.failing.contains(shape.export.name)
            require(mayFail || !entry.hasFailed, "an error for \(request)")
        }
        require(hasKnownFlags(request) || entry.hasFailed, "no error for the flags of \(request)")
        let needsRange = [NBD.Command.read, 1, 4, 5, 6, 7].contains(request.command)
        require(!needsRange || isInside || entry.hasFailed, "no error for \(request)")
        if request.command == NBD.Command.blockStatus {
            require(entry.hasFailed || !entry.contexts.isEmpty, "no status for \(request)")
        }
        if request.command > NBD.Command.blockStatus { require(entry.hasFailed, "no error for \(request)") }
    }

    /// Whether the flags of a request mean something for its command.
    private func hasKnownFlags(_ request: Request) -> Bool {
        var known: NBD.CommandFlags = shape.mode == .extended ? [.fua, .payloadLength] : [.fua]
        switch request.command {
        case NBD.Command.read: if shape.mode != .simple { known.insert(.dontFragment) }
        case NBD.Command.writeZeroes: known.formUnion([.noHole, .fastZero])
        case NBD.Command.blockStatus: known.insert(.requestOne)
        default: break
        }
        return request.flags.isSubset(of: known)
    }
}
