// One client in the transmission phase: receive what has arrived, answer all of it, send once.
import Block
import CLinux
import Glibc
import LinuxIO
import Synchronization

/// The loop of one connection. It never leaves its thread; what it shares are the export and its client's record.
struct Connection<Link: Transport & ~Copyable>: ~Copyable {
    /// Bytes received at once: two thousand requests, or the small writes of one batch.
    static var inputSize: Int { 65536 }
    /// The longest piece of data that is read at once; stays in the L2 cache from read to send.
    static var pieceMax: Int { 256 * 1024 }
    /// Room for one piece and the headers around it.
    static var outputSize: Int { pieceMax + 4096 }
    /// From this length on, pages of stable files are sent by reference.
    static var sendFileMin: UInt64 { 32768 }

    var link: Link
    let export: Export
    let device: any BlockDevice
    let mode: HeaderMode
    let contexts: [UInt32]
    let isReadOnly: Bool
    let client: ClientRecord
    /// Rate limits: of the export, of the client.
    let buckets: [TokenBucket]
    let isThrottled: Bool

    let input: UnsafeMutableRawBufferPointer
    var inputStart = 0
    var inputEnd = 0
    let output: UnsafeMutableRawBufferPointer
    var outputCount = 0
    var extents = ExtentList(capacity: 64)

    /// False once nothing can be sent any more.
    var isAlive = true
    /// Whether no more requests will be taken: the client disconnected, or the server closes.
    var isInputClosed = false

    var table: SlotTable
    var ring = Ring?.none
    var ringWasTried = false
    var ringReads = 0
    var laneJobs = 0
    var port: CompletionPort?
    let lanes = Lanes()
    var isSocketPollArmed = false
    var isPortPollArmed = false

    /// Turns of the loop for which readahead is asked for ahead of sending, set when reads came from storage.
    var coldTurns = 0
    var blocksRead = 0
    var hasSentFiles = false
    /// Bytes of the input, from its start, whose reads were asked to be read ahead.
    var prefetchedEnd = 0

    let figures: Figures
    let activity: Activity
    /// When something was last received, in nanoseconds of the monotonic clock.
    var arrival: UInt64
    var unsent = Unsent()
    /// Whether the activity tells of requests in slots.
    var hasPublishedSlots = false

    /// A connection that begins its transmission phase.
    ///
    /// - Parameters:
    ///   - bucket: the rate limit of the client, which its other connections share.
    ///   - budget: the memory that its slots share with those of others.
    ///   - input: the input buffer, `inputSize` bytes that the caller keeps until the connection is gone.
    ///   - received: bytes in it that the handshake received and did not take.
    init(
        _ link: consuming Link, session: Session, client: ClientRecord, bucket: TokenBucket?, budget: SlotBudget,
        input: UnsafeMutableRawBufferPointer, received: Range<Int>
    ) {
        self.link = link
        export = session.export
        device = session.export.device
        mode = session.mode
        contexts = session.contexts
        isReadOnly = session.isReadOnly
        self.client = client
        buckets = [session.export.bucket, bucket].compactMap { $0 }
        isThrottled = !buckets.isEmpty
        figures = client.figures
        activity = client.activity
        arrival = monotonicNanoseconds()
        self.input = input
        inputStart = received.lowerBound
        inputEnd = received.upperBound
        table = SlotTable(budget: budget)
        output = .allocate(byteCount: Self.outputSize, alignment: Buffer.alignment)
        blocksRead = dg_thread_blocks_read()
    }

    deinit { output.deallocate() }

    /// Serves the client until it disconnects, breaks the protocol or is told to go. Nothing is in flight afterwards.
    mutating func run() {
        activity.arrived(arrival)
        while isAlive {
            activity.enter(.working)
            answerRequests()
            if !isAlive || (isInputClosed && inFlight == 0) { break }
            flush()
            noticeColdReads()
            if activity.isAskedForMemory { giveMemoryBack() }
            if isAlive { waitForWork() }
        }
        flush()
        drain()
        if !isAlive { return }
        if client.isClosing {
            link.close(waitingSeconds: 5)
        } else if case .vsock = client.peer {
            // A vsock that is closed on one side fails on the other, where its end is still being read.
            link.close(waitingSeconds: 1)
        } else {
            link.sayGoodbye()
        }
    }

    /// Gives back what a client that asks for nothing does not need.
    private mutating func giveMemoryBack() {
        activity.askForMemory(false)
        table.giveMemoryBack()
        SlotPages.forget(output)
        if inputEnd == 0 || inputStart == inputEnd { SlotPages.forget(input) }
        activity.publish(memory: table.bytes)
    }

    var inFlight: Int { ringReads + laneJobs }

    // MARK: - Requests

    /// Answers every complete request in the input.
    private mutating func answerRequests() {
        if coldTurns > 0 { prefetchBatch() }
        let size = mode.requestSize
        while isAlive && !isInputClosed && inputEnd - inputStart >= size {
            let header = UnsafeRawBufferPointer(rebasing: input[inputStart..<(inputStart + size)])
            guard let request = Request(header, mode) else {
                client.note("the client sent a request with a wrong magic number")
                isInputClosed = true
                break
            }
            inputStart += size
            answer(request)
        }
        if client.isClosing { isInputClosed = true }
    }

    private mutating func answer(_ request: Request) {
        activity.begin(request)
        let payload = request.payloadLength(mode)
        if !request.flags.isSubset(of: request.allowedFlags(mode)) {
            skipPayload(payload)
            return replyError(request, BlockError(.invalid, "the command does not know all of its flags"))
        }
        switch request.command {
        case NBD.Command.read where payload == 0: read(request)
        case NBD.Command.write: write(request)
        case NBD.Command.blockStatus: blockStatus(request)
        case NBD.Command.disconnect: isInputClosed = true
        case NBD.Command.flush where payload == 0: flushDevice(request)
        case NBD.Command.trim where payload == 0: trim(request)
        case NBD.Command.writeZeroes where payload == 0: writeZeroes(request)
        case NBD.Command.cache where payload == 0: cache(request)
        default:
            skipPayload(payload)
            let text =
                request.command <= NBD.Command.blockStatus ? "the command takes no payload" : "the command is not known"
            replyError(request, BlockError(.invalid, text))
        }
    }

    /// Waits as the rate limits ask, in short steps so that the server can close meanwhile.
    @inline(__always)
    mutating func throttle(_ bytes: UInt64) {
        if isThrottled { waitForTokens(bytes) }
    }

    private mutating func waitForTokens(_ bytes: UInt64) {
        var seconds = buckets.reduce(0) { max($0, $1.take(bytes)) }
        if seconds <= 0 { return }
        flush()
        activity.enter(.throttled)
        defer { activity.enter(.working) }
        while seconds > 0 && !client.isClosing {
            // Whoever has gone pays nothing: what it took would be missing for those who are still there.
            var peer = pollfd(fd: link.inputDescriptor, events: Int16(POLLRDHUP), revents: 0)
            if poll(&peer, 1, Int32(min(seconds, 0.1) * 1000) + 1) > 0 {
                for bucket in buckets { bucket.giveBack(bytes) }
                isInputClosed = true
                return
            }
            seconds -= 0.1
        }
    }

    // MARK: - Input

    /// Moves what is left in the input to its start and receives more behind it.
    mutating func receive(waiting: Bool) -> Bool {
        if inputStart > 0 {
            let rest = inputEnd - inputStart
            input.copyMemory(from: UnsafeRawBufferPointer(rebasing: input[inputStart..<inputEnd]))
            prefetchedEnd = max(0, prefetchedEnd - inputStart)
            inputStart = 0
            inputEnd = rest
        }
        switch link.receive(into: UnsafeMutableRawBufferPointer(rebasing: input[inputEnd...]), waiting: waiting) {
        case .bytes(let count):
            inputEnd += count
            noteArrival()
            return true
        case .nothing: return false
        case .closed:
            isInputClosed = true
            return false
        }
    }

    /// Fills a buffer with payload bytes, from the input first; false when the client is gone.
    mutating func receivePayload(into buffer: UnsafeMutableRawBufferPointer) -> Bool {
        var done = min(buffer.count, inputEnd - inputStart)
        buffer.copyMemory(from: UnsafeRawBufferPointer(rebasing: input[inputStart..<(inputStart + done)]))
        inputStart += done
        // The client may wait for replies before it sends the rest.
        if done == buffer.count { return true }
        flush()
        activity.enter(.receiving)
        defer { activity.enter(.working) }
        while done < buffer.count {
            let rest = UnsafeMutableRawBufferPointer(rebasing: buffer[done...])
            switch link.receive(into: rest, waiting: true) {
            case .bytes(let count):
                done += count
                noteArrival()
            case .nothing where !client.isClosing: continue
            case .nothing, .closed:
                isInputClosed = true
                return false
            }
        }
        return true
    }

    /// Takes a payload that nobody wants off the stream.
    mutating func skipPayload(_ length: UInt64) {
        var left = length
        while left > 0 {
            let now = min(left, UInt64(inputEnd - inputStart))
            inputStart += Int(now)
            left -= now
            if left == 0 { break }
            flush()
            activity.enter(.receiving)
            if !receive(waiting: true) && (isInputClosed || client.isClosing) { break }
        }
        activity.enter(.working)
    }

    /// Notes the time for the requests that have arrived. Whatever was answered before has been sent by now.
    @inline(__always)
    private mutating func noteArrival() {
        arrival = monotonicNanoseconds()
        activity.arrived(arrival)
    }

    // MARK: - Output

    /// Makes room for `count` bytes, at most `outputSize`, at the end of the output.
    @inline(__always)
    mutating func reserve(_ count: Int) {
        if output.count - outputCount < count { flush() }
    }

    /// What `appendHeader` makes room for: a header and the fixed fields behind it. Whoever puts bytes where they will
    /// be behind a header reserves so much more, or making room for the header moves it away from them.
    var headerRoom: Int { mode.replySize + 64 }

    /// The free part of the output.
    @inline(__always)
    var free: UnsafeMutableRawBufferPointer { UnsafeMutableRawBufferPointer(rebasing: output[outputCount...]) }

    /// Sends the output.
    mutating func flush(more: Bool = false) {
        if outputCount > 0 {
            send(UnsafeRawBufferPointer(rebasing: output[..<outputCount]), more: more)
            outputCount = 0
        }
        if !unsent.isEmpty { unsent.count(in: figures, lastArrival: arrival, now: monotonicNanoseconds()) }
    }

    /// Sends bytes, unless the client is gone.
    @inline(__always)
    mutating func send(_ bytes: UnsafeRawBufferPointer, more: Bool) {
        guard isAlive else { return }
        activity.enter(.sending)
        if !link.send(bytes, more: more) { isAlive = false }
        activity.step()
        activity.enter(.working)
    }

    /// Sends bytes that are not in the output, after it.
    mutating func sendOut(_ bytes: UnsafeRawBufferPointer) {
        if bytes.count <= 32768 {
            reserve(bytes.count)
            free.copyMemory(from: bytes)
            outputCount += bytes.count
        } else {
            flush(more: true)
            send(bytes, more: false)
        }
    }

    /// Appends a chunk's header; what `length` promises must follow.
    @inline(__always)
    mutating func appendHeader(_ type: UInt16, done: Bool, cookie: UInt64, offset: UInt64, length: Int) {
        reserve(headerRoom)
        ReplyHeader(
            flags: done ? NBD.Chunk.flagDone : 0, type: type, cookie: cookie, offset: offset, length: UInt64(length)
        ).store(mode, into: free)
        outputCount += mode.replySize
    }

    @inline(__always)
    mutating func append<T: FixedWidthInteger>(_ value: T) {
        output.storeBigEndian(value, at: outputCount)
        outputCount += MemoryLayout<T>.size
    }

    /// Answers a command that has no data in its reply.
    mutating func replyDone(cookie: UInt64, offset: UInt64) {
        if mode == .extended {
            appendHeader(NBD.Chunk.none, done: true, cookie: cookie, offset: offset, length: 0)
        } else {
            // Commands without data may be answered simply in structured mode, too; it is shorter.
            reserve(16)
            ReplyHeader.storeSimple(error: 0, cookie: cookie, into: free)
            outputCount += 16
        }
    }

    /// Answers a request that arrived last with an error.
    mutating func replyError(_ request: Request, _ error: BlockError) {
        let operation = Operation(command: request.command)
        noteFailure(operation, error)
        unsent.add(operation)
        replyError(cookie: request.cookie, offset: request.offset, error)
    }

    /// Counts a request that fails, and logs why.
    mutating func noteFailure(_ operation: Operation, _ error: BlockError) {
        figures.addError(operation)
        client.noteError(error)
    }

    /// Sends an error, and its text where the framing has room for it.
    mutating func replyError(cookie: UInt64, offset: UInt64, _ error: BlockError) {
        if mode == .simple {
            reserve(16)
            ReplyHeader.storeSimple(error: error.kind.errorValue, cookie: cookie, into: free)
            outputCount += 16
        } else {
            appendError(NBD.Chunk.error, error, done: true, cookie: cookie, requestOffset: offset, at: 0)
        }
    }

    /// The bytes of a text as far as the protocol lets them be sent, cut between two characters.
    private static func cut(_ text: String) -> [UInt8] {
        var bytes = Array(text.utf8)
        if bytes.count <= NBD.stringLengthMax { return bytes }
        var end = NBD.stringLengthMax
        while end > 0 && bytes[end] & 0xC0 == 0x80 { end -= 1 }
        bytes.removeSubrange(end...)
        return bytes
    }

    /// Appends an error chunk; `at` is sent for NBD_REPLY_TYPE_ERROR_OFFSET only.
    mutating func appendError(
        _ type: UInt16, _ error: BlockError, done: Bool, cookie: UInt64, requestOffset: UInt64, at: UInt64
    ) {
        let text = Self.cut(error.message)
        let hasOffset = type == NBD.Chunk.errorOffset
        reserve(headerRoom + text.count)
        appendHeader(
            type, done: done, cookie: cookie, offset: requestOffset, length: 6 + text.count + (hasOffset ? 8 : 0))
        append(error.kind.errorValue)
        append(UInt16(text.count))
        free.copyBytes(from: text)
        outputCount += text.count
        if hasOffset { append(at) }
    }

    // MARK: - Counting

    /// Counts a request that arrived last and was answered well.
    @inline(__always)
    mutating func countAnswered(_ operation: Operation, bytes: UInt64) {
        figures.add(bytes: bytes, operation)
        unsent.add(operation)
    }

    /// Counts a request that was in slots.
    mutating func countFinished(_ operation: Operation, bytes: UInt64, arrival: UInt64) {
        if bytes > 0 { figures.add(bytes: bytes, operation) }
        unsent.add(operation, arrival: arrival)
    }
}
