// Reads: sent straight from stable files, tried from memory, or put in a slot where storage has to be waited for.
import Block
import CLinux
import Glibc
import LinuxIO

extension Connection where Link: ~Copyable {
    mutating func read(_ request: Request) {
        let range: Range<UInt64>
        do throws(BlockError) {
            range = try export.check(offset: request.offset, length: request.length)
            if request.length > Export.payloadMax {
                throw BlockError(.tooLarge, "reading \(request.length) bytes at once: at most \(Export.payloadMax)")
            }
            if mode != .simple && request.flags.contains(.dontFragment) && request.length > UInt64(Self.pieceMax) {
                throw BlockError(
                    .tooLarge, "reading \(request.length) bytes unfragmented: at most \(Self.pieceMax)")
            }
        } catch { return replyError(request, error) }
        throttle(request.length)
        if mode == .simple {
            if request.length <= UInt64(Self.pieceMax) { readWhole(request, range) } else { readLong(request, range) }
        } else if request.flags.contains(.dontFragment) {
            readWhole(request, range)
        } else {
            readChunks(request, range)
        }
    }

    // MARK: - In chunks

    /// Answers a read with one chunk for each run of its map.
    private mutating func readChunks(_ request: Request, _ range: Range<UInt64>) {
        var state = ChunkState(request, range)
        do throws(BlockError) {
            while state.position < state.end && isAlive {
                if export.options.readDelayMS > 0 {
                    submitPiece(&state, Int(min(state.end - state.position, UInt64(Self.pieceMax))))
                    continue
                }
                state.version = device.mapVersion
                extents.removeAll()
                let covered = try device.map(state.position..<state.end, .resident, into: &extents)
                if covered <= state.position {
                    // Metadata has to be read first: that is a lane's work.
                    submitPiece(&state, Int(min(state.end - state.position, UInt64(Self.pieceMax))))
                    continue
                }
                for index in 0..<extents.count where isAlive { try sendExtent(extents[index], &state) }
            }
        } catch {
            fail(&state, error)
        }
        finishIssuing(&state)
    }

    /// How far the answer to a chunked read has come.
    struct ChunkState {
        let cookie: UInt64
        let requestOffset: UInt64
        let length: UInt64
        var position: UInt64
        let end: UInt64
        var version: UInt64 = 0
        /// The entry in the table of chunked reads, once a slot was needed.
        var entry = -1
        var isDone = false
        var hasFailed = false

        init(_ request: Request, _ range: Range<UInt64>) {
            cookie = request.cookie
            requestOffset = request.offset
            length = request.length
            position = range.lowerBound
            end = range.upperBound
        }
    }

    /// Whether a chunk that ends at `end` is the last of its read.
    private func isLast(_ state: borrowing ChunkState, _ end: UInt64) -> Bool {
        if end != state.end { return false }
        let entry = state.entry
        return entry < 0 || table.reads[entry].outstanding == 0
    }

    @inline(__always)
    private mutating func sendExtent(_ extent: Extent, _ state: inout ChunkState) throws(BlockError) {
        switch extent.place {
        case .zeros:
            let last = isLast(state, state.position + extent.length)
            appendHeader(
                NBD.Chunk.offsetHole, done: last, cookie: state.cookie, offset: state.requestOffset, length: 12)
            append(state.position)
            append(UInt32(extent.length))
            state.isDone = last
            state.position += extent.length
        case .file(let file, let offset):
            if file.traits.contains(.stable) && !file.traits.contains(.direct) && extent.length >= Self.sendFileMin
                && link.canSendFile
            {
                sendFileRun(file, offset, extent.length, &state)
            } else {
                try readFileRun(file, offset, extent.length, &state)
            }
        case .source(let source, let offset):
            try readSourceRun(source.source, offset, extent.length, &state)
        }
    }

    /// Sends a run of a stable file by reference, in pieces, so that a failure costs one piece and an error chunk.
    ///
    /// No piece is marked as the last of its read: whether the file has the bytes is known only after its header went
    /// out, and an error can follow only where the client still waits for something.
    private mutating func sendFileRun(_ file: FileRef, _ from: UInt64, _ length: UInt64, _ state: inout ChunkState) {
        var offset = from
        let end = from + length
        hasSentFiles = true
        while offset < end && isAlive {
            let count = Int(min(end - offset, UInt64(Self.pieceMax)))
            appendDataHeader(state, count, done: false)
            flush(more: true)
            if !isAlive { return }
            activity.enter(.sending)
            let result = link.sendFile(file.descriptor, at: offset, count: count)
            activity.step()
            activity.enter(.working)
            guard let sent = result else {
                isAlive = false
                return
            }
            if sent < count {
                padChunk(count - sent)
                let error = BlockError(
                    .inputOutput,
                    "reading \(count - sent) bytes at \(state.position + UInt64(sent)) of "
                        + "\(export.info.name): the file failed, or ends earlier than when it was opened")
                failPart(&state, error, at: state.position + UInt64(sent), done: false)
            }
            state.position += UInt64(count)
            offset += UInt64(count)
        }
    }

    /// The header of a data chunk at the state's position.
    @inline(__always)
    private mutating func appendDataHeader(_ state: borrowing ChunkState, _ count: Int, done: Bool) {
        appendHeader(
            NBD.Chunk.offsetData, done: done, cookie: state.cookie, offset: state.requestOffset, length: 8 + count)
        append(state.position)
    }

    /// Sends zeros for bytes that a header promised and nobody has.
    private mutating func padChunk(_ count: Int) {
        var left = count
        while left > 0 && isAlive {
            let now = min(left, ZeroPage.count)
            send(UnsafeRawBufferPointer(rebasing: ZeroPage.bytes[..<now]), more: true)
            left -= now
        }
    }

    /// Reads a run of a file: what is in memory at once, the rest through slots.
    private mutating func readFileRun(_ file: FileRef, _ from: UInt64, _ length: UInt64, _ state: inout ChunkState)
        throws(BlockError)
    {
        var offset = from
        let end = from + length
        let headerSize = mode.replySize + 8
        while offset < end && isAlive {
            var count = Int(min(end - offset, UInt64(Link.pieceMax)))
            if !file.traits.isDisjoint(with: [.tryable, .memory]) {
                reserve(headerRoom + count)
                let start = outputCount + headerSize
                let target = UnsafeMutableRawBufferPointer(rebasing: output[start..<(start + count)])
                let got = file.tryRead(into: target, at: offset)
                if got > 0 {
                    if device.mapVersion != state.version {
                        // The disk changed under the read: the lane maps and reads again until it holds still.
                        submitPiece(&state, count)
                    } else {
                        let last = isLast(state, state.position + UInt64(got))
                        appendDataHeader(state, got, done: last)
                        outputCount += got
                        state.isDone = last
                        state.position += UInt64(got)
                        count = got
                    }
                    offset += UInt64(count)
                    continue
                }
            }
            submitFile(file, offset, count, &state)
            offset += UInt64(count)
        }
    }

    private mutating func readSourceRun(
        _ source: any ByteSource, _ from: UInt64, _ length: UInt64, _ state: inout ChunkState
    ) throws(BlockError) {
        var offset = from
        let end = from + length
        let headerSize = mode.replySize + 8
        while offset < end && isAlive {
            let count = Int(min(end - offset, UInt64(Self.pieceMax)))
            if source.isPrompt {
                reserve(headerRoom + count)
                let start = outputCount + headerSize
                try source.read(
                    into: UnsafeMutableRawBufferPointer(rebasing: output[start..<(start + count)]), at: offset)
                let last = isLast(state, state.position + UInt64(count))
                appendDataHeader(state, count, done: last)
                outputCount += count
                state.isDone = last
                state.position += UInt64(count)
            } else {
                submitPiece(&state, count)
            }
            offset += UInt64(count)
        }
    }

    // MARK: - Slots of a chunked read

    /// Takes a slot for `count` bytes at the state's position, waiting for one, and advances the position.
    private mutating func takeChunkSlot(_ state: inout ChunkState, _ count: Int, room: Int) -> Int {
        let slot = takeSlot(bytes: room)
        if state.entry < 0 {
            state.entry = table.takeRead()
            let arrival = arrival
            withRead(state.entry) {
                $0.cookie = state.cookie
                $0.offset = state.requestOffset
                $0.length = state.length
                $0.arrival = arrival
                $0.isIssuing = true
            }
        }
        let (entry, arrival) = (state.entry, arrival)
        withRead(entry) { $0.outstanding += 1 }
        withSlot(slot) {
            $0.kind = .chunk
            $0.arrival = arrival
            $0.cookie = state.cookie
            $0.requestOffset = state.requestOffset
            $0.offset = state.position
            $0.length = count
            $0.version = state.version
            $0.read = entry
        }
        state.position += UInt64(count)
        return slot
    }

    /// Has a lane map and read a piece of the device.
    private mutating func submitPiece(_ state: inout ChunkState, _ count: Int) {
        let offset = state.position
        let slot = takeChunkSlot(&state, count, room: count)
        readOnLane(slot, at: offset, delayMS: export.options.readDelayMS)
    }

    /// Has the ring, or a lane where there is none, read a piece of a file.
    private mutating func submitFile(_ file: FileRef, _ offset: UInt64, _ count: Int, _ state: inout ChunkState) {
        let deviceOffset = state.position
        let (start, wanted, skip) = aligned(file, offset, count)
        let slot = takeChunkSlot(&state, count, room: wanted)
        submitRead(slot, file, start, wanted: wanted, skip: skip, deviceOffset: deviceOffset)
    }

    /// Sends an error for one part of a read.
    private mutating func failPart(_ state: inout ChunkState, _ error: BlockError, at: UInt64, done: Bool) {
        if !state.hasFailed && (state.entry < 0 || !table.reads[state.entry].hasFailed) { figures.addError(.read) }
        state.hasFailed = true
        withRead(state.entry) { $0.hasFailed = true }
        client.noteError(error)
        appendError(
            NBD.Chunk.errorOffset, error, done: done, cookie: state.cookie, requestOffset: state.requestOffset, at: at)
    }

    /// Ends a read whose map failed: what was sent so far stays, the error tells from where on nothing follows.
    private mutating func fail(_ state: inout ChunkState, _ error: BlockError) {
        let done = state.entry < 0 || table.reads[state.entry].outstanding == 0
        failPart(&state, error, at: state.position, done: done)
        state.isDone = done
        state.position = state.end
    }

    /// Leaves the rest of a read to its slots, or ends it.
    private mutating func finishIssuing(_ state: inout ChunkState) {
        if state.entry >= 0 {
            let entry = state.entry
            let hasFailed = state.hasFailed
            withRead(entry) {
                $0.isIssuing = false
                $0.hasFailed = $0.hasFailed || hasFailed
            }
            if table.reads[entry].outstanding > 0 { return }
            if table.reads[entry].hasFailed { state.hasFailed = true }
            table.releaseRead(entry)
        }
        if !state.isDone && isAlive {
            appendHeader(NBD.Chunk.none, done: true, cookie: state.cookie, offset: state.requestOffset, length: 0)
        }
        countAnswered(.read, bytes: state.hasFailed ? 0 : state.length)
    }

    // MARK: - In one piece

    /// How far a read in one piece came without waiting.
    private enum Inline {
        case done
        /// All of it lies at one place of a file, but not in memory.
        case missed(FileRef, offset: UInt64, version: UInt64)
        case blocked
    }

    /// Answers a read of at most one piece without fragmenting it.
    private mutating func readWhole(_ request: Request, _ range: Range<UInt64>) {
        let count = Int(request.length)
        var outcome = Inline.blocked
        do throws(BlockError) {
            if export.options.readDelayMS == 0 { outcome = try fillInline(request, range, count) }
        } catch { return replyError(request, error) }
        switch outcome {
        case .done: countAnswered(.read, bytes: request.length)
        case .missed(let file, let offset, let version):
            let (start, wanted, skip) = aligned(file, offset, count)
            let slot = takeWholeSlot(request, room: wanted)
            withSlot(slot) { $0.version = version }
            submitRead(slot, file, start, wanted: wanted, skip: skip, deviceOffset: request.offset)
        case .blocked:
            let slot = takeWholeSlot(request, room: count)
            readOnLane(slot, at: request.offset, delayMS: export.options.readDelayMS)
        }
    }

    private mutating func takeWholeSlot(_ request: Request, room: Int) -> Int {
        let slot = takeSlot(bytes: room)
        let arrival = arrival
        withSlot(slot) {
            $0.kind = .whole
            $0.arrival = arrival
            $0.cookie = request.cookie
            $0.requestOffset = request.offset
            $0.requestLength = request.length
            $0.offset = request.offset
            $0.length = Int(request.length)
        }
        return slot
    }

    /// Puts header and bytes in the output if that needs no waiting; otherwise leaves the output as it was.
    private mutating func fillInline(_ request: Request, _ range: Range<UInt64>, _ count: Int) throws(BlockError)
        -> Inline
    {
        let headerSize = mode == .simple ? 16 : mode.replySize + 8
        reserve(headerRoom + count)
        let version = device.mapVersion
        extents.removeAll()
        guard try device.map(range, .resident, into: &extents) == range.upperBound else { return .blocked }
        var position = outputCount + headerSize
        for index in 0..<extents.count {
            let extent = extents[index]
            let length = Int(extent.length)
            let part = UnsafeMutableRawBufferPointer(rebasing: output[position..<(position + length)])
            switch extent.place {
            case .zeros: part.initializeMemory(as: UInt8.self, repeating: 0)
            case .file(let file, let offset):
                if file.tryRead(into: part, at: offset) < length {
                    return extents.count == 1 ? .missed(file, offset: offset, version: version) : .blocked
                }
            case .source(let source, let offset):
                guard source.source.isPrompt else { return .blocked }
                try source.source.read(into: part, at: offset)
            }
            position += length
        }
        if device.mapVersion != version { return .blocked }
        appendWholeHeader(cookie: request.cookie, offset: request.offset, at: request.offset, count: count)
        outputCount += count
        return .done
    }

    /// The header of a read that is answered in one piece.
    mutating func appendWholeHeader(cookie: UInt64, offset: UInt64, at: UInt64, count: Int) {
        if mode == .simple {
            reserve(16)
            ReplyHeader.storeSimple(error: 0, cookie: cookie, into: free)
            outputCount += 16
        } else {
            appendHeader(NBD.Chunk.offsetData, done: true, cookie: cookie, offset: offset, length: 8 + count)
            append(at)
        }
    }

    /// Answers a long simple read in two passes over the disk, a piece at a time: the first finds out whether all of it
    /// can be read before the header promises it, so that a bad sector is an error; the second sends what by then is
    /// mostly in memory. Only what fails in between ends the connection. Memory stays at one piece.
    private mutating func readLong(_ request: Request, _ range: Range<UInt64>) {
        if export.options.readDelayMS > 0 { usleep(export.options.readDelayMS * 1000) }
        let piece = Buffer(count: Self.pieceMax)
        do throws(BlockError) {
            try readPieces(of: range, into: piece, sending: false)
        } catch { return replyError(request, error) }
        appendWholeHeader(
            cookie: request.cookie, offset: request.offset, at: request.offset, count: Int(request.length))
        do throws(BlockError) {
            try readPieces(of: range, into: piece, sending: true)
        } catch {
            client.note("ending the connection in the middle of a reply: \(error.message)")
            isAlive = false
            return
        }
        countAnswered(.read, bytes: request.length)
    }

    private mutating func readPieces(of range: Range<UInt64>, into piece: borrowing Buffer, sending: Bool)
        throws(BlockError)
    {
        var position = range.lowerBound
        while position < range.upperBound && isAlive {
            let count = Int(min(range.upperBound - position, UInt64(piece.bytes.count)))
            try device.read(into: UnsafeMutableRawBufferPointer(rebasing: piece.bytes[..<count]), at: position)
            if sending { sendOut(UnsafeRawBufferPointer(rebasing: piece.readable[..<count])) }
            position += UInt64(count)
        }
    }

    // MARK: - Cold files

    /// Notices whether sending files read from storage; if so, the next turns ask for readahead first.
    mutating func noticeColdReads() {
        if coldTurns > 0 { coldTurns -= 1 }
        guard hasSentFiles else { return }
        hasSentFiles = false
        let blocks = dg_thread_blocks_read()
        if blocks != blocksRead { coldTurns = 16 }
        blocksRead = blocks
    }

    /// Asks for readahead of every read that waits in the input, so that storage works on all of them at once.
    mutating func prefetchBatch() {
        let size = mode.requestSize
        var position = max(inputStart, prefetchedEnd)
        while inputEnd - position >= size {
            let header = UnsafeRawBufferPointer(rebasing: input[position..<(position + size)])
            guard let request = Request(header, mode) else { return }
            let payload = request.payloadLength(mode)
            guard payload <= UInt64(inputEnd - position - size) else { return }
            position += size + Int(payload)
            prefetchedEnd = position
            if request.command == NBD.Command.read, request.length <= Export.payloadMax,
                let range = try? export.check(offset: request.offset, length: request.length)
            {
                device.prefetch(range)
            }
        }
    }
}
