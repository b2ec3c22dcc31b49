// One connection in its transmission phase: many requests in flight, sent by many threads or by one that goes on.
public import Block
import Glibc
import LinuxIO
import Synchronization

/// Why a request on a channel failed, which decides whether it may be sent again.
public enum ChannelError: Error, Sendable {
    /// The server answered with an error. The connection is as good as before.
    case refused(BlockError)
    /// The connection has ended. On another one, the request may succeed.
    case broken(BlockError)
    /// The connection was ended here because the server was too slow: it may still carry out what it was sent.
    case late(BlockError)
    /// The server did what no server does, and the connection was ended for it. Another try would be no better.
    case violated(BlockError)

    /// The error without the distinction.
    public var error: BlockError {
        switch self {
        case .refused(let error), .broken(let error), .late(let error), .violated(let error): error
        }
    }

    /// Whether the server may still carry out the request.
    var isLate: Bool { if case .late = self { true } else { false } }

    /// The same with circumstances put in front.
    func during(_ doing: String) -> ChannelError {
        switch self {
        case .refused(let error): .refused(error.during(doing))
        case .broken(let error): .broken(error.during(doing))
        case .late(let error): .late(error.during(doing))
        case .violated(let error): .violated(error.during(doing))
        }
    }
}

/// The end of a request that was submitted with a token.
public struct Completion: Sendable {
    /// What the request was submitted with.
    public let token: UInt64
    /// Why it failed; nil if it did not.
    public let error: ChannelError?
}

/// One connection to an export.
///
/// Two ways of using it can be mixed. Any number of threads may call what waits (`perform`, or `begin` and `finish`):
/// whoever waits and finds nobody receiving receives for all, so that a thread alone is never switched. And one thread
/// may submit requests with tokens and take their completions as they come. Bytes of reads arrive where they are wanted
/// without a detour; buffers must stay until the request has ended.
///
/// A request fails when no answer has come in time, and with it the connection. Requests in flight when a connection
/// ends fail with `.broken`, or `.violated`.
public final class ClientChannel: @unchecked Sendable {
    // Sendable because the requests and all that is marked so are touched under `lock` only, `outgoing` under
    // `sendLock`, and the parser by whoever has the role of the receiver, of whom there is one.

    /// The most requests in flight.
    public static let inFlightMax = 64
    /// Bytes of headers that wait at most, to be sent with those of the next requests.
    private static let gatheredMax = 1024
    /// Bytes that must move for each second by which an answer is later than allowed: what a long answer over a slow
    /// line needs, and a server that dawdles does not get.
    static let bytesPerExtraSecond = 65536.0

    /// What was agreed on.
    public let agreement: ClientAgreement
    /// The server, for messages.
    let name: String
    let link: ClientLink
    let timeoutSeconds: Double
    let lock = Lock()
    // Under the lock: where threads sleep that want a free request, or a completion, and how many.
    let freed = Condition()
    let completed = Condition()
    var freedWaiters = 0
    var sleepers = 0
    var completedWaiters = 0
    // Under the lock: the requests, and which of them are free.
    let requests: [PendingRequest]
    var free: [Int]
    private var generation: UInt64 = 1
    var ignored = 0
    var queued = 0
    var outstanding: UInt64 = 0
    var completions: [Completion] = []
    private var nextCompletionIndex = 0
    var hasReceiver = false
    var failure: ChannelError?
    // The receiver's.
    var parser: ReplyParser
    var checkedSeconds = 0.0
    var leftSeconds: Double
    // The sender's.
    private let sendLock = Lock()
    private var outgoing: [UInt8] = []
    private var outgoingStart = 0

    let broken = Atomic<Bool>(false)
    // Whether something waits in `outgoing`.
    private let hasGathered = Atomic<Bool>(false)
    let moved = Atomic<UInt64>(0)
    let load = Atomic<Int>(0)

    /// A channel on a link whose handshake is done.
    init(_ link: ClientLink, _ agreement: ClientAgreement, name: String, timeoutSeconds: Int) {
        self.link = link
        self.agreement = agreement
        self.name = name
        self.timeoutSeconds = Double(timeoutSeconds)
        parser = ReplyParser(agreement)
        requests = (0..<Self.inFlightMax).map { PendingRequest(index: $0) }
        free = Array((0..<Self.inFlightMax).reversed())
        leftSeconds = monotonicSeconds()
    }

    deinit { link.sayGoodbye() }

    /// Whether the connection has ended.
    public var isBroken: Bool { broken.load(ordering: .acquiring) }

    /// Requests in flight, about.
    public var inFlight: Int { load.load(ordering: .relaxed) }

    /// Tells the server that nothing follows. Requests in flight fail.
    public func close() {
        if !isBroken { sendDisconnect() }
        fail(.broken(BlockError(.shutdown, "\(name): the connection was closed here")))
    }

    private func sendDisconnect() {
        _ = sendLock.withLockIfFree {
            Request(NBD.Command.disconnect, cookie: 0).encode(agreement.mode, into: &outgoing)
            _ = push(UnsafeRawBufferPointer(start: nil, count: 0), waiting: false)
        }
        link.sayGoodbye()
    }

    // MARK: - Beginning

    /// Sends a request that somebody will wait for with `finish`.
    ///
    /// - Parameters:
    ///   - request: its cookie is chosen here. The range lies inside the export and keeps to the agreed sizes.
    ///   - payload: what is written.
    ///   - destination: where bytes that are read go.
    ///   - effect: the bytes that the request is about, where its length is that of a payload that says so.
    ///   - mayWait: whether to wait when as many requests are in flight as can be.
    ///   - isLast: whether the caller waits next; if not, a small request may stay here until one follows.
    /// - Returns: nil when it would have to wait and may not.
    func begin(
        _ request: Request, payload: UnsafeRawBufferPointer = .init(start: nil, count: 0),
        into destination: UnsafeMutableRawBufferPointer = .init(start: nil, count: 0), status: StatusQuestion? = nil,
        effect: UInt64? = nil, disposition: PendingRequest.Disposition = .awaited, mayWait: Bool = true,
        isLast: Bool = true
    ) throws(ChannelError) -> PendingRequest? {
        let length = effect ?? request.length
        guard request.offset <= agreement.size, length <= agreement.size - request.offset else {
            throw .refused(BlockError(.outOfRange, "\(name): \(length) bytes at \(request.offset) lie outside"))
        }
        lock.lock()
        while free.isEmpty && failure == nil {
            if !mayWait {
                lock.unlock()
                return nil
            }
            waitForFree()
        }
        guard failure == nil, let index = free.popLast() else {
            defer { lock.unlock() }
            // A request that was never sent is not late, whatever ended the connection.
            if case .late(let error)? = failure { throw .broken(error) }
            throw failure ?? .broken(BlockError(.shutdown, "\(name): the connection has ended"))
        }
        let pending = requests[index]
        var request = request
        generation += 1
        request.cookie = generation << 6 | UInt64(index)
        pending.reset(request, disposition)
        pending.request.length = length
        pending.destination = destination
        pending.status = status
        pending.startSeconds = monotonicSeconds()
        pending.startBytes = moved.load(ordering: .relaxed)
        pending.expectedBytes = UInt64(max(payload.count, destination.count))
        outstanding += pending.expectedBytes
        pending.extraMax = outstanding
        if case .queued = disposition { queued += 1 }
        if case .ignored = disposition { ignored += 1 }
        lock.unlock()
        load.add(1, ordering: .relaxed)
        send(request, payload, isLast: isLast)
        return pending
    }

    /// Sleeps until a request is free; the lock is held.
    private func waitForFree() {
        if hasReceiver {
            freedWaiters += 1
            freed.wait(holding: lock)
            freedWaiters -= 1
            return
        }
        if hasGathered.load(ordering: .relaxed) {
            lock.unlock()
            flush()
            lock.lock()
            return
        }
        // Those that wait for these requests may be busy sending; whoever receives now helps them, too.
        takeRole()
        lock.unlock()
        link.waitForInput(milliseconds: 20)
        receiveOnce(waiting: false)
        lock.lock()
        leaveRole()
    }

    /// Sends a request that is advice. It is dropped where that would mean waiting.
    func advise(_ request: Request) {
        lock.lock()
        guard failure == nil, ignored < 8, free.count > Self.inFlightMax / 2, let index = free.popLast() else {
            lock.unlock()
            return
        }
        var request = request
        generation += 1
        request.cookie = generation << 6 | UInt64(index)
        requests[index].reset(request, .ignored)
        ignored += 1
        lock.unlock()
        load.add(1, ordering: .relaxed)
        let isSent = sendLock.withLockIfFree {
            request.encode(agreement.mode, into: &outgoing)
            _ = push(UnsafeRawBufferPointer(start: nil, count: 0), waiting: false)
        }
        if isSent { return }
        lock.lock()
        if requests[index].cookie == request.cookie && !requests[index].isDone { complete(requests[index]) }
        lock.unlock()
    }

    // MARK: - Sending

    private func send(_ request: Request, _ payload: UnsafeRawBufferPointer, isLast: Bool) {
        sendLock.withLock {
            request.encode(agreement.mode, into: &outgoing)
            if payload.isEmpty && !isLast && outgoing.count - outgoingStart < Self.gatheredMax {
                return hasGathered.store(true, ordering: .relaxed)
            }
            _ = push(payload, waiting: true)
        }
    }

    /// Sends what waits to be sent.
    private func flush() {
        guard hasGathered.load(ordering: .relaxed) else { return }
        sendLock.withLock { _ = push(UnsafeRawBufferPointer(start: nil, count: 0), waiting: true) }
    }

    /// Sends what waits and the payload behind it; the send lock is held. Receives meanwhile if nobody else does: a
    /// server that cannot get rid of its replies may take no requests.
    ///
    /// - Parameter waiting: without it, the payload is empty, and what there is no room for waits on.
    private func push(_ payload: UnsafeRawBufferPointer, waiting: Bool) -> Bool {
        var done = 0
        var progressSeconds = monotonicSeconds()
        while outgoingStart < outgoing.count || done < payload.count || link.hasOutput {
            if isBroken { return false }
            let sent = outgoing.withUnsafeBytes { header in
                link.send(
                    UnsafeRawBufferPointer(rebasing: header[outgoingStart...]),
                    UnsafeRawBufferPointer(rebasing: payload[done...]))
            }
            switch sent {
            case .bytes(let count):
                let ofHeader = min(count, outgoing.count - outgoingStart)
                outgoingStart += ofHeader
                done += count - ofHeader
                moved.add(UInt64(count), ordering: .relaxed)
                // Encrypted bytes that left are progress, too.
                progressSeconds = monotonicSeconds()
            case .full:
                if !waiting {
                    hasGathered.store(true, ordering: .relaxed)
                    return true
                }
                if monotonicSeconds() - progressSeconds > timeoutSeconds {
                    fail(.late(BlockError(.inputOutput, "\(name): the server took no bytes for \(timeout)")))
                    return false
                }
                receiveWhileFull()
            case .closed(let why):
                fail(.broken(BlockError(.shutdown, "\(name): the server \(why)")))
                return false
            }
        }
        outgoing.removeAll(keepingCapacity: true)
        outgoingStart = 0
        hasGathered.store(false, ordering: .relaxed)
        return true
    }

    private func receiveWhileFull() {
        lock.lock()
        // Where the requests have ended, their buffers are no longer ours to receive into.
        if failure != nil {
            lock.unlock()
            return
        }
        if hasReceiver {
            lock.unlock()
            // The receiver may leave, and then it is up to us.
            _ = link.waitForRoom(orInput: false, milliseconds: 20)
            return
        }
        takeRole()
        lock.unlock()
        if !receiveOnce(waiting: false) { _ = link.waitForRoom(orInput: true, milliseconds: 200) }
        lock.lock()
        leaveRole()
        lock.unlock()
    }

    // MARK: - Waiting

    /// Waits for the end of a request.
    ///
    /// - Parameter keeping: called with the request before it is free for others.
    /// - Throws: what went wrong with it; then, too, nothing touches its buffers any more.
    func finish(_ request: PendingRequest, keeping: (PendingRequest) -> Void = { _ in }) throws(ChannelError) {
        flush()
        lock.lock()
        while !request.isDone {
            if hasReceiver {
                sleepers += 1
                request.sleep(holding: lock)
                sleepers -= 1
            } else {
                takeRole()
                lock.unlock()
                repeat { receiveOnce(waiting: true) } while !request.isDone && !isBroken
                lock.lock()
                leaveRole()
            }
        }
        let error = result(of: request)
        keeping(request)
        release(request)
        lock.unlock()
        if let error { throw error }
    }

    func result(of request: PendingRequest) -> ChannelError? {
        if let loss = request.loss { return loss.during(request.doing) }
        guard let error = request.error else { return nil }
        return .refused(error.during("\(request.doing) of \(name)"))
    }

    /// The next request submitted with a token that has ended, waiting for it; nil when none is in flight.
    public func nextCompletion() -> Completion? {
        flush()
        lock.lock()
        defer { lock.unlock() }
        while nextCompletionIndex == completions.count {
            if queued == 0 { return nil }
            if hasReceiver {
                completedWaiters += 1
                completed.wait(holding: lock)
                completedWaiters -= 1
                continue
            }
            takeRole()
            lock.unlock()
            // Only who receives adds completions, so there is no need to look under the lock.
            repeat { receiveOnce(waiting: true) } while nextCompletionIndex == completions.count && !isBroken
            lock.lock()
            leaveRole()
        }
        let completion = completions[nextCompletionIndex]
        nextCompletionIndex += 1
        if nextCompletionIndex == completions.count {
            completions.removeAll(keepingCapacity: true)
            nextCompletionIndex = 0
        }
        return completion
    }
}
