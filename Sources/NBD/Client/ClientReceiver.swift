// The receiving half of a connection: whoever waits receives for all, ends requests, and watches over their time.
import Block
import Glibc
import LinuxIO
import Synchronization

extension ClientChannel {
    /// Becomes the receiver; the lock is held, and nobody else is.
    func takeRole() {
        hasReceiver = true
        // While nobody received, no answer could come; that is nobody's fault.
        let now = monotonicSeconds()
        if now - leftSeconds > 1 {
            for request in requests where request.cookie != 0 && !request.isDone {
                request.startSeconds += now - max(leftSeconds, request.startSeconds)
            }
        }
    }

    /// Is the receiver no more, and finds another one if there is somebody; the lock is held.
    func leaveRole() {
        hasReceiver = false
        leftSeconds = monotonicSeconds()
        if failure != nil { return loseAll() }
        if sleepers > 0, let sleeper = requests.first(where: { $0.isWaitedFor && !$0.isDone }) {
            sleeper.wake()
        } else if completedWaiters > 0 {
            completed.signal()
        } else if freedWaiters > 0 {
            freed.signal()
        }
    }

    /// Receives what has arrived and ends the requests whose answers are complete. Only the receiver calls it.
    ///
    /// - Returns: whether anything arrived.
    @discardableResult
    func receiveOnce(waiting: Bool) -> Bool {
        switch link.receive(parser.direct, parser.space, waiting: waiting) {
        case .bytes(let count):
            moved.add(UInt64(count), ordering: .relaxed)
            parser.received(count)
            do throws(BlockError) {
                while let request = try parser.next(self) {
                    lock.lock()
                    complete(request)
                    lock.unlock()
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
        lock.lock()
        let late = requests.first { request in
            guard request.cookie != 0, !request.isDone else { return false }
            if case .ignored = request.disposition { return false }
            // What others began to ask for later is no excuse.
            let extra = Double(min(bytes &- request.startBytes, request.extraMax)) / Self.bytesPerExtraSecond
            return now - request.startSeconds > timeoutSeconds + extra
        }
        let doing = late?.doing
        lock.unlock()
        guard let doing else { return }
        fail(.late(BlockError(.inputOutput, "\(name): the server gave no answer to \(doing) within \(timeout)")))
    }

    var timeout: String { "\(Int(timeoutSeconds)) s" }

    // MARK: - The ends of requests

    /// Ends the connection for a reason; the first one counts.
    func fail(_ error: ChannelError) {
        lock.lock()
        if failure == nil { failure = error }
        broken.store(true, ordering: .releasing)
        // With a receiver, bytes may be on their way into a request's buffer: it ends the requests when it has noticed.
        if !hasReceiver { loseAll() }
        lock.unlock()
        link.cut()
    }

    /// Ends every request in flight; the lock is held, and nobody receives.
    func loseAll() {
        parser.abandon()
        for request in requests where request.cookie != 0 && !request.isDone {
            request.loss = failure
            complete(request)
        }
        freed.broadcast()
        completed.broadcast()
    }

    /// A request has its answer, or will never get it; the lock is held.
    func complete(_ request: PendingRequest) {
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
            if completedWaiters > 0 { completed.signal() }
        }
    }

    /// A request can be used again; the lock is held.
    func release(_ request: PendingRequest) {
        request.cookie = 0
        outstanding -= request.expectedBytes
        request.expectedBytes = 0
        request.destination = UnsafeMutableRawBufferPointer(start: nil, count: 0)
        free.append(request.index)
        load.subtract(1, ordering: .relaxed)
        if freedWaiters > 0 { freed.signal() }
    }
}

extension ClientChannel: PendingRequests {
    func find(cookie: UInt64) -> PendingRequest? {
        lock.lock()
        defer { lock.unlock() }
        let request = requests[Int(cookie & 63)]
        return cookie != 0 && request.cookie == cookie && !request.isDone ? request : nil
    }
}
