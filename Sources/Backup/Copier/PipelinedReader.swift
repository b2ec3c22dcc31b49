// A worker that keeps several reads in flight on an NBD connection and writes from the buffers they arrive in.
import Block
import Glibc
import LinuxIO
import NBD

/// A connection of a worker.
typealias NBDConnection = NBDDevice

/// Reads over a connection of its own. What was in flight when the connection broke is read again over the next one.
final class PipelinedReader {
    /// Bytes in flight: enough to hide a round trip on a local network, few enough to stay in the processor's cache
    /// where pieces are small.
    private static let bytesInFlight: UInt64 = 4 << 20
    private static let depths = UInt64(2)...8
    /// Bytes asked for at a time: what a server copies then stays in its processor's cache, whatever the target likes
    /// to get at a time.
    private static let requestBytes: UInt64 = 256 << 10

    private enum State {
        case free
        /// On its way from the source.
        case coming
        /// On its way to the target, when it is its turn.
        case arrived
    }

    private struct Slot {
        var state = State.free
        var segment = CopySegment(id: 0, range: 0..<0, kind: .data)
        var range: Range<UInt64> = 0..<0
        /// Its requests that are to be sent, for the first time or again, a bit for each.
        var wanted: UInt64 = 0
        /// Its requests in flight.
        var flying = 0
        /// How often it was refused, and whether that was since something of it was sent: one trouble of a server
        /// refuses all requests that it meets.
        var attempts = 0
        var isRefused = false
        /// Its place in the order of the plan.
        var number: UInt64 = 0
    }

    private let crew: CopyCrew
    private let device: NBDDevice
    private let buffer: Buffer
    private let pieceBytes: UInt64
    private let requestBytes: UInt64
    private let inOrder: Bool
    private var slots: [Slot]
    /// Requests in flight.
    private var flying = 0
    private var given: UInt64 = 0
    private var delivered: UInt64 = 0
    // What is left of the segment that pieces are cut from.
    private var rest: (segment: CopySegment, start: UInt64)?
    private var isExhausted = false
    private var progressed = false
    private var connections = 0
    private var failure: BlockError?

    init(_ crew: CopyCrew, _ device: NBDDevice) {
        self.crew = crew
        self.device = device
        inOrder = crew.target.isSequential
        let block = max(crew.target.granularity, UInt64(device.agreement.blockSizes.minimum))
        let limit = min(
            UInt64(crew.target.pieceBytes), UInt64(device.agreement.blockSizes.maximum))
        pieceBytes = max(limit / block, 1) * block
        // As many requests as a word has bits at most.
        let request = max(Self.requestBytes, UInt64(device.agreement.blockSizes.preferred), (pieceBytes + 63) / 64)
        requestBytes = (request + block - 1) / block * block
        let wanted = Self.bytesInFlight / pieceBytes
        let depth = Int(min(max(wanted, Self.depths.lowerBound), Self.depths.upperBound))
        slots = [Slot](repeating: Slot(), count: depth)
        buffer = Buffer(count: depth * Int(pieceBytes), inHugePages: true)
    }

    /// Works until nothing is left.
    ///
    /// - Throws: what source or target says.
    func run() throws(BlockError) {
        var isDone = false
        while !isDone {
            isDone = try device.withChannel { (channel) throws(ChannelError) in try work(on: channel) }
            if let failure { throw failure }
            if crew.stop.isCancelled { return }
        }
    }

    /// Works until nothing is left, or the connection breaks.
    ///
    /// - Returns: whether nothing is left; if not, another connection may do better.
    /// - Throws: why the connection broke, when nothing came over it.
    private func work(on channel: ClientChannel) throws(ChannelError) -> Bool {
        let hook = crew.stop.whenCancelled { channel.close() }
        defer { crew.stop.forget(hook) }
        progressed = false
        connections += 1
        if connections > 1 { crew.countReconnect() }
        var loss: ChannelError?
        while true {
            // Several at once: they leave in one call, and arrive in few.
            if loss == nil && failure == nil && isRoomy && !crew.stop.isCancelled {
                do throws(ChannelError) { try submit(to: channel) } catch { lose(error, &loss) }
            }
            if flying == 0 {
                if failure != nil || crew.stop.isCancelled { return true }
                if let loss {
                    crew.countRetry()
                    if progressed && crew.options.retries > 0 { return false }
                    throw loss
                }
                if isExhausted && slots.allSatisfy({ $0.state == .free }) { return true }
                continue
            }
            guard let completion = channel.nextCompletion() else {
                // Cannot be: whatever was submitted ends.
                failure = BlockError(.inputOutput, "reading from \(device.info.name): requests were lost")
                return true
            }
            take(completion, &loss)
        }
    }

    /// Whether nothing is on its way to half of the slots.
    private var isRoomy: Bool { slots.count { $0.flying > 0 } <= slots.count / 2 }

    /// A request has ended.
    private func take(_ completion: Completion, _ loss: inout ChannelError?) {
        let index = Int(completion.token / 64)
        flying -= 1
        slots[index].flying -= 1
        guard let error = completion.error else {
            progressed = true
            if slots[index].wanted != 0 || slots[index].flying > 0 { return }
            slots[index].state = .arrived
            do throws(BlockError) { try deliver() } catch { end(error) }
            return
        }
        slots[index].wanted |= 1 << (completion.token % 64)
        guard case .refused(let reason) = error else {
            return lose(error, &loss)
        }
        if slots[index].isRefused { return }
        slots[index].isRefused = true
        slots[index].attempts += 1
        let attempts = slots[index].attempts
        if attempts > crew.options.retries || ![.inputOutput, .shutdown, .noMemory].contains(reason.kind) {
            return end(attempts > 1 ? reason.during("in \(attempts) attempts") : reason)
        }
        crew.countRetry()
        if !crew.stop.isCancelled { usleep(UInt32(50_000 << min(attempts, 5))) }
    }

    /// The connection is of no more use. Another one is, unless the server has done what no server does or the request
    /// cannot be.
    private func lose(_ error: ChannelError, _ loss: inout ChannelError?) {
        switch error {
        case .broken, .late: loss = loss ?? error
        case .refused(let reason), .violated(let reason): end(reason)
        }
    }

    /// Ends the copy. What is in flight is not waited for: the connection closes.
    private func end(_ error: BlockError) {
        if failure == nil { failure = error }
        crew.fail(error)
    }

    // MARK: - Pieces

    /// Sends as many reads as there is room for.
    private func submit(to channel: ClientChannel) throws(ChannelError) {
        for index in slots.indices {
            if slots[index].state == .free {
                guard let (segment, range) = nextPiece() else {
                    // Perhaps there are others to be sent once more.
                    continue
                }
                slots[index] = Slot(state: .coming, segment: segment, range: range, number: given)
                given += 1
                if segment.kind == .zero {
                    // Only where everything goes in order.
                    slots[index].state = .arrived
                    do throws(BlockError) { try deliver() } catch { return end(error) }
                    continue
                }
                let requests = (range.count64 + requestBytes - 1) / requestBytes
                slots[index].wanted = .max >> (64 - requests)
                crew.pay(range.count64)
            }
            // What was refused is asked for again once all of it is known.
            if slots[index].isRefused && slots[index].flying > 0 { continue }
            while slots[index].wanted != 0 {
                let number = UInt64(slots[index].wanted.trailingZeroBitCount)
                let range = slots[index].range
                let offset = number * requestBytes
                let count = Int(min(requestBytes, range.count64 - offset))
                let start = index * Int(pieceBytes) + Int(offset)
                let part = UnsafeMutableRawBufferPointer(rebasing: buffer.bytes[start..<(start + count)])
                try channel.submitRead(into: part, at: range.lowerBound + offset, token: UInt64(index) * 64 + number)
                slots[index].wanted &= ~(1 << number)
                slots[index].isRefused = false
                slots[index].flying += 1
                flying += 1
            }
        }
    }

    /// The next piece to read; zeros on the way there are dealt with at once, unless everything goes in order.
    private func nextPiece() -> (CopySegment, Range<UInt64>)? {
        while failure == nil {
            if let (segment, start) = rest {
                let end = min(start + pieceBytes, segment.range.upperBound)
                rest = end < segment.range.upperBound ? (segment, end) : nil
                return (segment, start..<end)
            }
            if isExhausted { return nil }
            switch crew.take(mayWait: flying == 0) {
            case .later: return nil
            case .nothing:
                isExhausted = true
                return nil
            case .work(let segment):
                if segment.kind == .data {
                    rest = (segment, segment.range.lowerBound)
                } else if inOrder {
                    return (segment, segment.range)
                } else {
                    do throws(BlockError) { try crew.deliverZeros(segment.range, of: segment) } catch { end(error) }
                }
            }
        }
        return nil
    }

    /// Brings what has arrived to the target, in order where that is asked for.
    private func deliver() throws(BlockError) {
        var again = true
        while again {
            again = false
            for index in slots.indices where slots[index].state == .arrived {
                let slot = slots[index]
                if inOrder && slot.number != delivered { continue }
                if slot.segment.kind == .zero {
                    try crew.deliverZeros(slot.range, of: slot.segment)
                } else {
                    let start = index * Int(pieceBytes)
                    let part = buffer.readable[start..<(start + Int(slot.range.count64))]
                    try crew.deliver(
                        UnsafeRawBufferPointer(rebasing: part), at: slot.range.lowerBound, of: slot.segment)
                }
                slots[index].state = .free
                delivered += 1
                again = inOrder
            }
        }
    }
}
