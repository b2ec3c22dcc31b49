// What happens outside the connection's thread: handing operations to the ring and the lanes, and taking results back.
import Block
import CLinux
import Glibc
import LinuxIO

/// Tags of ring operations that are no slot's.
private enum Tag {
    static let socket = UInt64.max
    static let port = UInt64.max - 1
}

extension Connection where Link: ~Copyable {
    @inline(__always)
    mutating func withSlot(_ index: Int, _ body: (inout Slot) -> Void) {
        body(&table.slots[index])
    }

    @inline(__always)
    mutating func withRead(_ index: Int, _ body: (inout ChunkedRead) -> Void) {
        if index >= 0 { body(&table.reads[index]) }
    }

    /// A free slot with room for `bytes`, for a request that holds `extra` bytes elsewhere. Waits for one if all are in
    /// flight, or all memory is in use and one of this connection's is in flight.
    mutating func takeSlot(bytes: Int, extra: Int = 0) -> Int {
        while true {
            if let slot = table.take(bytes: bytes, extra: extra) { return slot }
            publishSlots()
            flush()
            waitForCompletions(alsoInput: false)
        }
    }

    /// The aligned bytes to read so that `count` bytes at `offset` are among them.
    func aligned(_ file: FileRef, _ offset: UInt64, _ count: Int) -> (start: UInt64, wanted: Int, skip: Int) {
        guard file.traits.contains(.direct) else { return (offset, count, 0) }
        let mask = max(file.traits.alignment, 512) - 1
        let start = offset & ~mask
        let skip = Int(offset - start)
        return (start, Int((UInt64(skip + count) + mask) & ~mask), skip)
    }

    // MARK: - Handing out

    /// Reads a piece of a file into a slot: on the ring if there is one, otherwise on a lane.
    mutating func submitRead(
        _ slot: Int, _ file: FileRef, _ start: UInt64, wanted: Int, skip: Int, deviceOffset: UInt64
    ) {
        if !ringWasTried {
            ringWasTried = true
            ring = Ring(entries: UInt32(SlotTable.countMax * 2))
        }
        withSlot(slot) {
            $0.file = file
            $0.fileOffset = start
            $0.wanted = wanted
            $0.skip = skip
        }
        if ring != nil {
            ringReads += 1
            queueRead(slot)
        } else {
            withSlot(slot) { $0.skip = 0 }
            readOnLane(slot, at: deviceOffset, delayMS: 0)
        }
    }

    /// Queues what is still missing of a slot's read. Slots and polls together never exceed the ring's entries.
    private mutating func queueRead(_ slot: Int) {
        let state = table.slots[slot]
        guard let memory = state.memory else { return }
        let target = UnsafeMutableRawBufferPointer(rebasing: memory[state.had..<state.wanted])
        let offset = state.fileOffset + UInt64(state.had)
        while let queued = ring?.read(state.file.descriptor, into: target, at: offset, tag: UInt64(slot)), !queued {
            ring?.submit(waitingFor: 0)
        }
    }

    /// Has a lane read a slot's bytes through the device.
    mutating func readOnLane(_ slot: Int, at offset: UInt64, delayMS: UInt32) {
        guard let memory = table.slots[slot].memory else { return }
        let length = table.slots[slot].length
        let target = SlotMemory(bytes: UnsafeMutableRawBufferPointer(rebasing: memory[..<length]))
        let device = device
        runOnLane(slot) { () throws(BlockError) -> [UInt8] in
            if delayMS > 0 { usleep(delayMS * 1000) }
            try device.read(into: target.bytes, at: offset)
            return []
        }
    }

    /// Runs blocking work on a lane; its result comes back to the slot.
    mutating func runOnLane(_ slot: Int, _ work: @escaping @Sendable () throws(BlockError) -> [UInt8]) {
        if port == nil { port = CompletionPort() }
        guard let port else {
            // No descriptor left for a port: do it here, slowly, rather than not at all.
            laneJobs += 1
            var finished = CompletionPort.Finished(slot: slot, error: nil, reply: [])
            do throws(BlockError) {
                finished = CompletionPort.Finished(slot: slot, error: nil, reply: try work())
            } catch { finished = CompletionPort.Finished(slot: slot, error: error, reply: []) }
            return finish(finished)
        }
        laneJobs += 1
        lanes.submit {
            do throws(BlockError) {
                port.finish(CompletionPort.Finished(slot: slot, error: nil, reply: try work()))
            } catch {
                port.finish(CompletionPort.Finished(slot: slot, error: error, reply: []))
            }
        }
    }

    // MARK: - Taking back

    /// Waits for the client's next bytes, or for something in flight.
    mutating func waitForWork() {
        publishSlots()
        if inFlight > 0 {
            waitForCompletions(alsoInput: !isInputClosed)
        } else if !isInputClosed {
            // No spinning before it blocks: measured with one and with many requests in flight, trying to receive for
            // a while first cost more CPU and gained nothing that lasted.
            activity.enter(inputEnd > inputStart ? .receiving : .idle)
            _ = receive(waiting: true)
        }
    }

    /// Waits until something in flight has finished, or, where asked for, input has arrived; takes both.
    mutating func waitForCompletions(alsoInput: Bool) {
        activity.enter(.waiting)
        defer { activity.enter(.working) }
        let wantsInput = alsoInput && inputEnd - inputStart < Self.inputSize
        if wantsInput && receive(waiting: false) {
            // More requests first: the deeper the queue below, the better. What has finished is taken on the way.
            takeFinished(waiting: false, wantsInput: false)
        } else {
            takeFinished(waiting: true, wantsInput: wantsInput && !isInputClosed)
        }
    }

    private mutating func takeFinished(waiting: Bool, wantsInput: Bool) {
        if ringReads > 0 {
            takeFromRing(waiting: waiting, wantsInput: wantsInput)
        } else if laneJobs > 0, let port {
            var ready = [
                pollfd(fd: port.descriptor, events: Int16(POLLIN), revents: 0),
                pollfd(fd: wantsInput ? link.inputDescriptor : -1, events: Int16(POLLIN), revents: 0),
            ]
            poll(&ready, 2, waiting ? -1 : 0)
            if ready[0].revents != 0 { takeFromPort() }
            if ready[1].revents != 0 { _ = receive(waiting: false) }
        }
    }

    private mutating func takeFromPort() {
        guard let port else { return }
        for finished in port.takeAll() { finish(finished) }
    }

    private mutating func takeFromRing(waiting: Bool, wantsInput: Bool) {
        if waiting && wantsInput && !isSocketPollArmed {
            isSocketPollArmed = ring?.pollReadable(link.inputDescriptor, tag: Tag.socket) ?? false
        }
        if laneJobs > 0 && !isPortPollArmed, let port {
            isPortPollArmed = ring?.pollReadable(port.descriptor, tag: Tag.port) ?? false
        }
        ring?.submit(waitingFor: waiting ? 1 : 0)
        while true {
            var completions: [Ring.Completion] = []
            let count = ring?.reap { completions.append($0) } ?? 0
            for completion in completions {
                switch completion.tag {
                case Tag.socket:
                    isSocketPollArmed = false
                    if wantsInput { _ = receive(waiting: false) }
                case Tag.port:
                    isPortPollArmed = false
                    takeFromPort()
                default: finishRingRead(Int(completion.tag), completion.result)
                }
            }
            if count < 64 { break }
        }
    }

    private mutating func finishRingRead(_ slot: Int, _ result: Int32) {
        let state = table.slots[slot]
        if result == -EAGAIN || result == -EINTR { return queueRead(slot) }
        ringReads -= 1
        if result < 0 {
            return finishRead(slot, BlockError(errno: -result, readingText(state)))
        }
        let had = state.had + Int(result)
        withSlot(slot) { $0.had = had }
        if had >= state.skip + state.length { return finishRead(slot, nil) }
        if result == 0 {
            let text = "\(readingText(state)): the file ends earlier than when it was opened"
            return finishRead(slot, BlockError(.inputOutput, text))
        }
        ringReads += 1
        queueRead(slot)
    }

    private func readingText(_ slot: Slot) -> String {
        "reading \(slot.length) bytes at \(slot.offset) of \(export.info.name)"
    }

    /// Answers with what a lane has done.
    private mutating func finish(_ finished: CompletionPort.Finished) {
        laneJobs -= 1
        let slot = table.slots[finished.slot]
        if slot.kind != .plain { return finishRead(finished.slot, finished.error) }
        if let error = finished.error {
            noteFailure(slot.operation, error)
            replyError(cookie: slot.cookie, offset: slot.requestOffset, error)
        } else if finished.reply.isEmpty {
            replyDone(cookie: slot.cookie, offset: slot.requestOffset)
        } else {
            finished.reply.withUnsafeBytes { sendOut($0) }
        }
        countFinished(
            slot.operation, bytes: finished.error == nil ? slot.requestLength : 0, arrival: slot.arrival)
        table.release(finished.slot)
    }

    /// Answers with bytes that were read into a slot, or with what went wrong.
    private mutating func finishRead(_ index: Int, _ error: BlockError?) {
        let slot = table.slots[index]
        if error == nil && slot.wanted > 0 && device.mapVersion != slot.version {
            // The disk changed under the read: the lane maps and reads again until it holds still.
            withSlot(index) {
                $0.skip = 0
                $0.wanted = 0
            }
            return readOnLane(index, at: slot.offset, delayMS: 0)
        }
        if slot.kind == .chunk { return finishChunk(index, error) }
        if let error {
            noteFailure(.read, error)
            replyError(cookie: slot.cookie, offset: slot.requestOffset, error)
        } else {
            appendWholeHeader(cookie: slot.cookie, offset: slot.requestOffset, at: slot.offset, count: slot.length)
            sendOut(slot.bytes)
        }
        countFinished(.read, bytes: error == nil ? slot.requestLength : 0, arrival: slot.arrival)
        table.release(index)
    }

    /// Sends a chunk that was read, or its error, and ends its read if it was the last.
    private mutating func finishChunk(_ index: Int, _ error: BlockError?) {
        let slot = table.slots[index]
        let read = table.reads[slot.read]
        let last = read.outstanding == 1 && !read.isIssuing
        if let error {
            if !read.hasFailed { figures.addError(.read) }
            client.noteError(error)
            appendError(
                NBD.Chunk.errorOffset, error, done: last, cookie: slot.cookie, requestOffset: slot.requestOffset,
                at: slot.offset)
        } else {
            appendHeader(
                NBD.Chunk.offsetData, done: last, cookie: slot.cookie, offset: slot.requestOffset,
                length: 8 + slot.length)
            append(slot.offset)
            sendOut(slot.bytes)
        }
        let hasFailed = read.hasFailed || error != nil
        withRead(slot.read) {
            $0.outstanding -= 1
            $0.hasFailed = hasFailed
        }
        if last {
            countFinished(.read, bytes: hasFailed ? 0 : read.length, arrival: read.arrival)
            table.releaseRead(slot.read)
        }
        table.release(index)
    }

    /// Tells the watcher what is in slots before the thread waits; nothing to do where there was and is nothing.
    mutating func publishSlots() {
        if table.inFlight == 0 && !hasPublishedSlots { return }
        hasPublishedSlots = table.inFlight > 0
        activity.publish(inSlots: table.requests, oldest: table.oldest)
        activity.publish(memory: table.bytes)
    }

    /// Waits until nothing is in flight, so that slots and the device may go.
    mutating func drain() {
        while inFlight > 0 {
            publishSlots()
            activity.enter(.waiting)
            takeFinished(waiting: true, wantsInput: false)
        }
        publishSlots()
        lanes.retire()
        if isAlive { flush() }
    }
}
