// Commands that change the disk, and those that only concern its cache.
import Block
import Glibc
import LinuxIO

extension Connection where Link: ~Copyable {
    /// The range of a command that changes the disk.
    private func writableRange(_ request: Request, _ doing: String) throws(BlockError) -> Range<UInt64> {
        if isReadOnly {
            throw BlockError(.readOnly, "\(doing) the export \(export.name): it is read-only here")
        }
        do throws(BlockError) {
            return try export.check(offset: request.offset, length: request.length)
        } catch  where error.kind == .outOfRange && request.command != NBD.Command.trim {
            // A write past the end is told as "no space" (NBD protocol, NBD_CMD_WRITE, NBD_CMD_WRITE_ZEROES).
            throw BlockError(.noSpace, error.message)
        }
    }

    /// Takes a slot for a command that a lane does.
    private mutating func plainSlot(_ request: Request, bytes: Int) -> Int {
        let slot = takeSlot(bytes: max(bytes, 1))
        let arrival = arrival
        withSlot(slot) {
            $0.kind = .plain
            $0.operation = Operation(command: request.command)
            $0.arrival = arrival
            $0.cookie = request.cookie
            $0.requestOffset = request.offset
            $0.requestLength = request.length
            $0.length = bytes
        }
        return slot
    }

    mutating func write(_ request: Request) {
        let range: Range<UInt64>
        do throws(BlockError) {
            range = try writableRange(request, "writing to")
            if request.length > Export.payloadMax {
                throw BlockError(.invalid, "writing \(request.length) bytes at once: at most \(Export.payloadMax)")
            }
        } catch {
            skipPayload(request.length)
            return replyError(request, error)
        }
        throttle(request.length)
        let durable = request.flags.contains(.fua)
        let isPrompt =
            export.info.writesArePrompt && !durable && export.options.writeDelayMS == 0
            && device.isPrompt(toWrite: range)
        let count = Int(request.length)
        if isPrompt && count <= inputEnd - inputStart {
            let bytes = UnsafeRawBufferPointer(rebasing: input[inputStart..<(inputStart + count)])
            inputStart += count
            finishWrite(request, writeNow(bytes, at: range.lowerBound, durable: false))
        } else if count <= Self.pieceMax {
            writePiece(request, range, isPrompt: isPrompt)
        } else {
            writeLong(request, range, durable: durable)
        }
    }

    private func writeNow(_ bytes: UnsafeRawBufferPointer, at offset: UInt64, durable: Bool) -> BlockError? {
        do throws(BlockError) {
            try device.write(bytes, at: offset, durable: durable)
            return nil
        } catch { return error }
    }

    private mutating func finishWrite(_ request: Request, _ error: BlockError?) {
        if let error { return replyError(request, error) }
        replyDone(cookie: request.cookie, offset: request.offset)
        countAnswered(.write, bytes: request.length)
    }

    /// A write of one piece that has not arrived in full, or that may block.
    private mutating func writePiece(_ request: Request, _ range: Range<UInt64>, isPrompt: Bool) {
        let count = Int(request.length)
        let slot = plainSlot(request, bytes: count)
        guard let memory = table.slots[slot].memory else { return }
        let bytes = UnsafeMutableRawBufferPointer(rebasing: memory[..<count])
        guard receivePayload(into: bytes) else {
            table.release(slot)
            return
        }
        if isPrompt {
            finishWrite(request, writeNow(UnsafeRawBufferPointer(bytes), at: range.lowerBound, durable: false))
            table.release(slot)
            return
        }
        let (payload, arrival) = (SlotMemory(bytes: bytes), arrival)
        withSlot(slot) { $0.arrival = arrival }
        let device = device
        let durable = request.flags.contains(.fua)
        let delayMS = export.options.writeDelayMS
        runOnLane(slot) { () throws(BlockError) -> [UInt8] in
            if delayMS > 0 { usleep(delayMS * 1000) }
            try device.write(UnsafeRawBufferPointer(payload.bytes), at: range.lowerBound, durable: durable)
            return []
        }
    }

    /// A long write: received and written piece by piece, so that memory stays bounded.
    private mutating func writeLong(_ request: Request, _ range: Range<UInt64>, durable: Bool) {
        if export.options.writeDelayMS > 0 { usleep(export.options.writeDelayMS * 1000) }
        let slot = takeSlot(bytes: Self.pieceMax)
        defer { table.release(slot) }
        guard let memory = table.slots[slot].memory else { return }
        let begun = arrival
        var failure: BlockError?
        var position = range.lowerBound
        while position < range.upperBound {
            let count = Int(min(range.upperBound - position, UInt64(Self.pieceMax)))
            let piece = UnsafeMutableRawBufferPointer(rebasing: memory[..<count])
            guard receivePayload(into: piece) else { return }
            if failure == nil { failure = writeNow(UnsafeRawBufferPointer(piece), at: position, durable: false) }
            position += UInt64(count)
        }
        if failure == nil && durable {
            do throws(BlockError) { try device.flush() } catch { failure = error }
        }
        if let failure { return replyError(request, failure) }
        replyDone(cookie: request.cookie, offset: request.offset)
        countFinished(.write, bytes: request.length, arrival: begun)
    }

    /// Runs a command that may block and has no data on a lane.
    private mutating func command(
        _ request: Request, _ work: @escaping @Sendable (any BlockDevice) throws(BlockError) -> Void
    ) {
        let slot = plainSlot(request, bytes: 0)
        let device = device
        let delayMS = export.options.writeDelayMS
        runOnLane(slot) { () throws(BlockError) -> [UInt8] in
            if delayMS > 0 { usleep(delayMS * 1000) }
            try work(device)
            return []
        }
    }

    mutating func flushDevice(_ request: Request) {
        var request = request
        request.length = 0
        command(request) { (device) throws(BlockError) in try device.flush() }
    }

    mutating func trim(_ request: Request) {
        do throws(BlockError) {
            let range = try writableRange(request, "discarding a range of")
            let durable = request.flags.contains(.fua)
            command(request) { (device) throws(BlockError) in try device.discard(range, durable: durable) }
        } catch { replyError(request, error) }
    }

    mutating func writeZeroes(_ request: Request) {
        do throws(BlockError) {
            let range = try writableRange(request, "zeroing a range of")
            var options: ZeroOptions = request.flags.contains(.noHole) ? [] : [.mayPunch]
            if request.flags.contains(.fastZero) { options.insert(.fastOnly) }
            if request.flags.contains(.fua) { options.insert(.durable) }
            let chosen = options
            command(request) { (device) throws(BlockError) in try device.zero(range, chosen) }
        } catch { replyError(request, error) }
    }

    mutating func cache(_ request: Request) {
        do throws(BlockError) {
            device.prefetch(try export.check(offset: request.offset, length: request.length))
            replyDone(cookie: request.cookie, offset: request.offset)
            countAnswered(.cache, bytes: request.length)
        } catch { replyError(request, error) }
    }
}
