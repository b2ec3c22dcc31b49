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
    // Sendable because the requests and all that is marked so are touched under `mutex` only, `outgoing` under
    // `sendLock`, and the parser by whoever has the role of the receiver, of whom there is one.

    /// The most requests in flight.
    public static let inFlightMax = 64
    /// Bytes of headers that wait at most, to be sent with those of the next requests.
    private static let gatheredMax = 1024
    /// Bytes that must move for each second by which an answer is later than allowed: what a long answer over a slow
    /// line needs, and a server that dawdles does not get.
    private static let bytesPerExtraSecond = 65536.0

    /// What was agreed on.
    public let agreement: ClientAgreement
    /// The server, for messages.
    let name: String
    let link: ClientLink
    private let timeoutSeconds: Double
    let mutex: UnsafeMutablePointer<pthread_mutex_t>
    // Under the mutex: where threads sleep that want a free request, or a completion, and how many.
    private let freed: UnsafeMutablePointer<pthread_cond_t>
    private let completed: UnsafeMutablePointer<pthread_cond_t>
    private var freedWaiters = 0
    private var sleepers = 0
    private var completedWaiters = 0
    // Under the mutex: the requests, and which of them are free.
    private let requests: [PendingRequest]
    private var free: [Int]
    private var generation: UInt64 = 1
    private var ignored = 0
    private var queued = 0
    private var outstanding: UInt64 = 0
    private var completions: [Completion] = []
    private var nextCompletionIndex = 0
    private var hasReceiver = false
    private var failure: ChannelError?
    // The receiver's.
    private var parser: ReplyParser
    private var checkedSeconds = 0.0
    private var leftSeconds: Double
    // The sender's.
    private let sendLock = Lock()
    private var outgoing: [UInt8] = []
    private var outgoingStart = 0

    private let broken = Atomic<Bool>(false)
    // Whether something waits in `outgoing`.
    private let hasGathered = Atomic<Bool>(false)
    private let moved = Atomic<UInt64>(0)
    private let load = Atomic<Int>(0)

    /// A channel on a link whose handshake is done.
    init(_ link: ClientLink, _ agreement: ClientAgreement, name: String, timeoutSeconds: Int) {
        self.link = link
        self.agreement = agreement
        self.name = name
        self.timeoutSeconds = Double(timeoutSeconds)
        parser = ReplyParser(agreement)
        requests = (0..<Self.inFlightMax).map { PendingRequest(index: $0) }
        free = Array((0..<Self.inFlightMax).reversed())
        mutex = .allocate(capacity: 1)
        mutex.initialize(to: pthread_mutex_t())
        pthread_mutex_init(mutex, nil)
        freed = .allocate(capacity: 1)
        freed.initialize(to: pthread_cond_t())
        pthread_cond_init(freed, nil)
        completed = .allocate(capacity: 1)
        completed.initialize(to: pthread_cond_t())
        pthread_cond_init(completed, nil)
        leftSeconds = monotonicSeconds()
    }

    deinit {
        link.sayGoodbye()
        for condition in [freed, completed] {
            pthread_cond_destroy(condition)
            condition.deallocate()
        }
        pthread_mutex_destroy(mutex)
        mutex.deallocate()
    }

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
        pthread_mutex_lock(mutex)
        while free.isEmpty && failure == nil {
            if !mayWait {
                pthread_mutex_unlock(mutex)
                return nil
            }
            waitForFree()
        }
        guard failure == nil, let index = free.popLast() else {
            defer { pthread_mutex_unlock(mutex) }
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
        pthread_mutex_unlock(mutex)
        load.add(1, ordering: .relaxed)
        send(request, payload, isLast: isLast)
        return pending
    }

    /// Sleeps until a request is free; the mutex is held.
    private func waitForFree() {
        if hasReceiver {
            freedWaiters += 1
            pthread_cond_wait(freed, mutex)
            freedWaiters -= 1
            return
        }
        if hasGathered.load(ordering: .relaxed) {
            pthread_mutex_unlock(mutex)
            flush()
            pthread_mutex_lock(mutex)
            return
        }
        // Those that wait for these requests may be busy sending; whoever receives now helps them, too.
        takeRole()
        pthread_mutex_unlock(mutex)
        link.waitForInput(milliseconds: 20)
        receiveOnce(waiting: false)
        pthread_mutex_lock(mutex)
        leaveRole()
    }

    /// Sends a request that is advice. It is dropped where that would mean waiting.
    func advise(_ request: Request) {
        pthread_mutex_lock(mutex)
        guard failure == nil, ignored < 8, free.count > Self.inFlightMax / 2, let index = free.popLast() else {
            pthread_mutex_unlock(mutex)
            return
        }
        var request = request
        generation += 1
        request.cookie = generation << 6 | UInt64(index)
        requests[index].reset(request, .ignored)
        ignored += 1
        pthread_mutex_unlock(mutex)
        load.add(1, ordering: .relaxed)
        let isSent = sendLock.withLockIfFree {
            request.encode(agreement.mode, into: &outgoing)
            _ = push(UnsafeRawBufferPointer(start: nil, count: 0), waiting: false)
        }
        if isSent { return }
        pthread_mutex_lock(mutex)
        if requests[index].cookie == request.cookie && !requests[index].isDone { complete(requests[index]) }
        pthread_mutex_unlock(mutex)
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
        pthread_mutex_lock(mutex)
        // Where the requests have ended, their buffers are no longer ours to receive into.
        if failure != nil {
            pthread_mutex_unlock(mutex)
            return
        }
        if hasReceiver {
            pthread_mutex_unlock(mutex)
            // The receiver may leave, and then it is up to us.
            _ = link.waitForRoom(orInput: false, milliseconds: 20)
            return
        }
        takeRole()
        pthread_mutex_unlock(mutex)
        if !receiveOnce(waiting: false) { _ = link.waitForRoom(orInput: true, milliseconds: 200) }
        pthread_mutex_lock(mutex)
        leaveRole()
        pthread_mutex_unlock(mutex)
    }

    // MARK: - Waiting

    /// Waits for the end of a request.
    ///
    /// - Parameter keeping: called with the request before it is free for others.
    /// - Throws: what went wrong with it; then, too, nothing touches its buffers any more.
    func finish(_ request: PendingRequest, keeping: (PendingRequest) -> Void = { _ in }) throws(ChannelError) {
        flush()
        pthread_mutex_lock(mutex)
        while !request.isDone {
            if hasReceiver {
                sleepers += 1
                request.sleep(mutex)
                sleepers -= 1
            } else {
                takeRole()
                pthread_mutex_unlock(mutex)
                repeat { receiveOnce(waiting: true) } while !request.isDone && !isBroken
                pthread_mutex_lock(mutex)
                leaveRole()
            }
        }
        let error = result(of: request)
        keeping(request)
        release(request)
        pthread_mutex_unlock(mutex)
        if let error { throw error }
    }

    private func result(of request: PendingRequest) -> ChannelError? {
        if let loss = request.loss { return loss.during(request.doing) }
        guard let error = request.error else { return nil }
        return .refused(error.during("\(request.doing) of \(name)"))
    }

    /// The next request submitted with a token that has ended, waiting for it; nil when none is in flight.
    public func nextCompletion() -> Completion? {
        flush()
        pthread_mutex_lock(mutex)
        defer { pthread_mutex_unlock(mutex) }
        while nextCompletionIndex == completions.count {
            if queued == 0 { return nil }
            if hasReceiver {
                completedWaiters += 1
                pthread_cond_wait(completed, mutex)
                completedWaiters -= 1
                continue
            }
            takeRole()
            pthread_mutex_unlock(mutex)
            // Only who receives adds completions, so there is no need to look under the mutex.
            repeat { receiveOnce(waiting: true) } while nextCompletionIndex == completions.count && !isBroken
            pthread_mutex_lock(mutex)
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

    // MARK: - The receiver

    /// Becomes the receiver; the mutex is held, and nobody else is.
    private func takeRole() {
        hasReceiver = true
        // While nobody received, no answer could come; that is nobody's fault.
        let now = monotonicSeconds()
        if now - leftSeconds > 1 {
            for request in requests where request.cookie != 0 && !request.isDone {
                request.startSeconds += now - max(leftSeconds, request.startSeconds)
            }
        }
    }

    /// Is the receiver no more, and finds another one if there is somebody; the mutex is held.
    private func leaveRole() {
        hasReceiver = false
        leftSeconds = monotonicSeconds()
        if failure != nil { return loseAll() }
        if sleepers > 0, let sleeper = requests.first(where: { $0.isWaitedFor && !$0.isDone }) {
            sleeper.wake()
        } else if completedWaiters > 0 {
            pthread_cond_signal(completed)
        } else if freedWaiters > 0 {
            pthread_cond_signal(freed)
        }
    }

    /// Receives what has arrived and ends the requests whose answers are complete. Only the receiver calls it.
    ///
    /// - Returns: whether anything arrived.
    @discardableResult
    private func receiveOnce(waiting: Bool) -> Bool {
        switch link.receive(parser.direct, parser.space, waiting: waiting) {
        case .bytes(let count):
            moved.add(UInt64(count), ordering: .relaxed)
            parser.received(count)
            do throws(BlockError) {
                while let request = try parser.next(self) {
                    pthread_mutex_lock(mutex)
                    complete(request)
                    pthread_mutex_unlock(mutex)
                }
            } catch { fail(.violated(error.during(name))) }
            checkDeadlinesAtTimes()
            return true
        case .nothing:
            checkDeadlinesAtTimes()
            return false
        case .closed(let why):
            fail(.broken(BlockError(.shutdown, "\(name): the server \(why)")))
            return false
        }
    }

    /// Looks at deadlines, but not all the time. Receivers may change often, so that it does not matter who they are.
    private func checkDeadlinesAtTimes() {
        if monotonicSeconds() - checkedSeconds >= ClientLink.tickSeconds { checkDeadlines() }
    }

    private func checkDeadlines() {
        let now = monotonicSeconds()
        checkedSeconds = now
        let bytes = moved.load(ordering: .relaxed)
        pthread_mutex_lock(mutex)
        let late = requests.first { request in
            guard request.cookie != 0, !request.isDone else { return false }
            if case .ignored = request.disposition { return false }
            // What others began to ask for later is no excuse.
            let extra = Double(min(bytes &- request.startBytes, request.extraMax)) / Self.bytesPerExtraSecond
            return now - request.startSeconds > timeoutSeconds + extra
        }
        let doing = late?.doing
        pthread_mutex_unlock(mutex)
        guard let doing else { return }
        fail(.late(BlockError(.inputOutput, "\(name): the server gave no answer to \(doing) within \(timeout)")))
    }

    private var timeout: String { "\(Int(timeoutSeconds)) s" }

    // MARK: - The ends of requests

    /// Ends the connection for a reason; the first one counts.
    func fail(_ error: ChannelError) {
        pthread_mutex_lock(mutex)
        if failure == nil { failure = error }
        broken.store(true, ordering: .releasing)
        // With a receiver, bytes may be on their way into a request's buffer: it ends the requests when it has noticed.
        if !hasReceiver { loseAll() }
        pthread_mutex_unlock(mutex)
        link.cut()
    }

    /// Ends every request in flight; the mutex is held, and nobody receives.
    private func loseAll() {
        parser.abandon()
        for request in requests where request.cookie != 0 && !request.isDone {
            request.loss = failure
            complete(request)
        }
        pthread_cond_broadcast(freed)
        pthread_cond_broadcast(completed)
    }

    /// A request has its answer, or will never get it; the mutex is held.
    private func complete(_ request: PendingRequest) {
        request.isDone = true
        switch request.disposition {
        case .awaited: if request.isWaitedFor { request.wake() }
        case .ignored:
            ignored -= 1
            release(request)
        case .queued(let token):
            completions.append(Completion(token: token, error: result(of: request)))
            queued -= 1
            release(request)
            if completedWaiters > 0 { pthread_cond_signal(completed) }
        }
    }

    /// A request can be used again; the mutex is held.
    private func release(_ request: PendingRequest) {
        request.cookie = 0
        outstanding -= request.expectedBytes
        request.expectedBytes = 0
        request.destination = UnsafeMutableRawBufferPointer(start: nil, count: 0)
        free.append(request.index)
        load.subtract(1, ordering: .relaxed)
        if freedWaiters > 0 { pthread_cond_signal(freed) }
    }
}

extension ClientChannel: PendingRequests {
    func find(cookie: UInt64) -> PendingRequest? {
        pthread_mutex_lock(mutex)
        defer { pthread_mutex_unlock(mutex) }
        let request = requests[Int(cookie & 63)]
        return cookie != 0 && request.cookie == cookie && !request.isDone ? request : nil
    }
}
