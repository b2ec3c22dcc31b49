// The thread that an iSCSI session belongs to: connects, sends what others ask for, connects again when it is lost.
import Block
import CISCSI
import CLinux
import Glibc
import LinuxIO
import NBD

/// Owns a session with a target, which libiscsi lets one thread use, and carries out commands for others.
///
/// A command ends with what the unit answers, or with an error when its time is over: a target that says nothing is
/// left after `timeoutSeconds`, one that is gone is tried again for `reconnectSeconds`. A unit that is another one when
/// the target is back is never read from again.
final class ISCSIWorker: @unchecked Sendable {
    // Sendable because `shared` is under its lock, and everything else is touched by the worker's thread only.

    /// Commands that the target has at once; the others wait here.
    private static let flyingMax = 64
    /// Seconds between attempts to reach a target that is gone.
    private static let pauses = (first: 0.1, longest: 2.0)
    /// Sessions that may be lost with one command on its way: it may be that command that ends them.
    private static let lossesMax = 3
    /// How long to be polite at the end, in seconds.
    private static let goodbye = 2.0

    private struct Shared {
        var queue: [ISCSIRequest] = []
        var isStopped = false
        var hasEnded = false
        var opening: Result<LogicalUnitFacts, BlockError>?
        /// Why nothing can be asked of the unit any more.
        var failure: BlockError?
        /// Whether the unit has said that it may be another.
        var wantsLook = false
    }

    let reference: ISCSIReference
    let lock = Lock()
    private var shared = Shared()
    private let changed = Condition()
    private let wake: Descriptor
    private let secrets: ISCSISecrets
    private let sessionID = UInt32.random(in: .min ... .max)

    // The thread's own.
    private var session: OpaquePointer?
    private var flying: [ObjectIdentifier: ISCSIRequest] = [:]
    private var waiting: [ISCSIRequest] = []
    private var stepStatus: Int32?
    /// What libiscsi said when a step failed, before it says something less telling.
    private var stepFailure: String?
    private var loss: BlockError?
    private var facts: LogicalUnitFacts?
    private var isReconnecting = false
    private var nextAttempt = 0.0
    private var pause = ISCSIWorker.pauses.first
    private var lastFailure: BlockError?

    /// - Throws: `.denied` or what reading passwords throws; `.unsupported` when libiscsi is not there.
    init(_ reference: ISCSIReference) throws(BlockError) {
        self.reference = reference
        if let reason = dg_iscsi_load() {
            throw BlockError(.unsupported, "opening \(reference): \(String(cString: reason))")
        }
        secrets = try ISCSISecrets(reference)
        let number = dg_eventfd()
        if number < 0 { throw BlockError(errno: -number, "opening \(reference)") }
        wake = Descriptor(owning: number)
    }

    // MARK: - For others

    /// Starts the thread and waits until the unit is there.
    ///
    /// - Throws: why it cannot be reached.
    func start() throws(BlockError) -> LogicalUnitFacts {
        try startThread(name: "iscsi") { self.run() }
        lock.lock()
        defer { lock.unlock() }
        while true {
            if let opening = shared.opening { return try opening.get() }
            changed.wait(holding: lock)
        }
    }

    /// Ends the session. Commands that are on their way end with errors.
    func stop() {
        lock.lock()
        defer { lock.unlock() }
        shared.isStopped = true
        ring()
        // The thread may just be looking a name up, which takes as long as it takes.
        let limit = monotonicNanoseconds() + UInt64((Self.goodbye + 1) * 1e9)
        while !shared.hasEnded && changed.wait(holding: lock, until: limit) {}
    }

    func submit(_ request: ISCSIRequest) {
        lock.withLock {
            if let failure = shared.failure {
                request.outcome = .failure(failure)
            } else if shared.isStopped || shared.hasEnded {
                request.outcome = .failure(BlockError(.shutdown, "\(reference) is being closed"))
            } else {
                shared.queue.append(request)
                ring()
            }
        }
    }

    func wait(for request: ISCSIRequest) throws(BlockError) -> SCSIOutcome {
        lock.lock()
        defer { lock.unlock() }
        while true {
            if let outcome = request.outcome { return try outcome.get() }
            request.isFinished.wait(holding: lock)
        }
    }

    /// Looks whether the unit is still the same before anything else is asked of it.
    func lookAgain() {
        lock.withLock { shared.wantsLook = true }
        ring()
    }

    private func ring() {
        var one: UInt64 = 1
        _ = write(wake.number, &one, 8)
    }

    // MARK: - The thread

    private func run() {
        do throws(BlockError) {
            try connect()
            let facts = try LogicalUnitFacts(of: ISCSIProbe(self))
            self.facts = facts
            publish { $0.opening = .success(facts) }
        } catch {
            dropSession()
            publish { $0.opening = .failure(error) }
        }
        while facts != nil && takeQueue() {
            if session != nil && takeDoubt() {
                lose(BlockError(.inputOutput, "\(reference): the unit says that it has changed"), isByUs: true)
            }
            if session == nil && !waiting.isEmpty && monotonicSeconds() >= nextAttempt { reconnect() }
            sendWaiting()
            giveUpOverdue()
            if loss == nil { pump(until: nextEvent()) }
            if let loss { lose(loss) }
        }
        sayGoodbye()
        dropSession()
        let ended = BlockError(.shutdown, "\(reference) is being closed")
        var rest = waiting + flying.values
        lock.withLock {
            rest += shared.queue
            shared.queue = []
        }
        for request in rest { finish(request, .failure(ended)) }
        (waiting, flying) = ([], [:])
        publish { $0.hasEnded = true }
    }

    private func publish(_ body: (inout Shared) -> Void) {
        lock.withLock {
            body(&shared)
            changed.broadcast()
        }
    }

    private func finish(_ request: ISCSIRequest, _ outcome: Result<SCSIOutcome, BlockError>) {
        lock.withLock {
            if request.outcome == nil { request.outcome = outcome }
            request.isFinished.signal()
        }
    }

    /// Takes what was submitted; false when the session is to end.
    private func takeQueue() -> Bool {
        lock.withLock {
            waiting += shared.queue
            shared.queue = []
            return !shared.isStopped
        }
    }

    private func takeDoubt() -> Bool {
        lock.withLock {
            defer { shared.wantsLook = false }
            return shared.wantsLook
        }
    }

    private func sendWaiting() {
        while session != nil, loss == nil, flying.count < Self.flyingMax, !waiting.isEmpty {
            send(waiting.removeFirst())
        }
    }

    private func send(_ request: ISCSIRequest) {
        guard let session else { return }
        request.deadline = monotonicSeconds() + Double(reference.timeoutSeconds)
        flying[ObjectIdentifier(request)] = request
        let result = dg_iscsi_submit(
            session, reference.addressedUnit, request.command.block, request.command.block.count,
            request.data.baseAddress, request.data.count,
            { pointer, result in
                guard let pointer, let result = result?.pointee else { return }
                let request = Unmanaged<ISCSIRequest>.fromOpaque(pointer).takeUnretainedValue()
                request.worker.complete(request, result)
            }, Unmanaged.passUnretained(request).toOpaque())
        if result < 0 { loss = loss ?? failure("sending \(request.command.name)") }
    }

    /// Takes a command's end, while the session is served or destroyed.
    private func complete(_ request: ISCSIRequest, _ result: dg_iscsi_result) {
        guard (0...0xFF).contains(result.status) else {
            // The session is lost; the request stays among those that are flying until that is dealt with.
            loss = loss ?? failure(request.command.name)
            return
        }
        let sense = SCSISense(
            key: result.sense_key, code: result.additional_code, qualifier: result.additional_qualifier)
        let outcome = SCSIOutcome(
            status: UInt8(result.status), sense: result.status == 2 ? sense : nil, transferred: result.transferred)
        flying[ObjectIdentifier(request)] = nil
        // That a target lets us in and says who the unit is does not tell yet whether it serves anybody.
        if outcome.status == 0 && !isReconnecting { (nextAttempt, pause) = (0, Self.pauses.first) }
        finish(request, .success(outcome))
    }

    // MARK: - Waiting

    private func nextEvent() -> Double {
        var next = flying.values.map(\.deadline).min() ?? monotonicSeconds() + 3600
        if session == nil && !waiting.isEmpty {
            next = min(next, nextAttempt, waiting.compactMap(\.givesUpAt).min() ?? nextAttempt)
        }
        return next
    }

    /// Waits for the target, for somebody who wants something, or until a moment, and serves the session once.
    private func pump(until moment: Double) {
        var polled = [pollfd(fd: wake.number, events: Int16(POLLIN), revents: 0)]
        if let session {
            let events = Int16(truncatingIfNeeded: dg_iscsi_events(session))
            let hangUp = Int16(truncatingIfNeeded: 0x2000)  // POLLRDHUP: the target has closed its side
            polled.append(pollfd(fd: dg_iscsi_descriptor(session), events: events | hangUp, revents: 0))
        }
        let seconds = min(max(moment - monotonicSeconds(), 0), 3600)
        let result = poll(&polled, nfds_t(polled.count), Int32(seconds * 1000) + (seconds > 0 ? 1 : 0))
        guard result > 0 else { return }
        if polled[0].revents != 0 {
            var count: UInt64 = 0
            _ = read(wake.number, &count, 8)
        }
        guard let session, polled.count > 1, polled[1].revents != 0 else { return }
        let events = Int32(polled[1].revents)
        let known = events & (Int32(POLLIN) | Int32(POLLOUT) | Int32(POLLERR) | Int32(POLLHUP))
        let isServed = dg_iscsi_service(session, known) == 0
        if !isServed || events & (Int32(POLLERR) | Int32(POLLHUP) | 0x2000) != 0 {
            loss = loss ?? failure("the connection has ended")
        }
    }

    private func failure(_ doing: String) -> BlockError {
        let reason = stepFailure ?? session.map { String(cString: dg_iscsi_error($0)) } ?? ""
        let text = printable(reason.split(whereSeparator: \.isNewline).joined(separator: " "))
        return BlockError(.inputOutput, "\(reference): \(doing)\(text.isEmpty ? "" : ": \(text)")")
    }

    // MARK: - Losing and finding again

    /// Ends the session. Everybody whose command was on its way waits for the next one, unless it is too late, or was
    /// on its way when several were lost.
    ///
    /// - Parameter isByUs: the target has done nothing to end it.
    private func lose(_ reason: BlockError, isByUs: Bool = false) {
        dropSession()
        lastFailure = reason
        let lost = flying.values.sorted { $0.deadline < $1.deadline }
        flying = [:]
        waiting = lost + waiting
        if isByUs { return }
        for request in lost {
            request.losses += 1
            if request.losses >= Self.lossesMax { giveUp(request, reason) }
        }
    }

    private func dropSession() {
        let ending = session
        session = nil
        if let ending { dg_iscsi_destroy(ending) }
        (loss, stepStatus, stepFailure) = (nil, nil, nil)
    }

    /// Ends commands that have waited for too long: for an answer, or for the target to come back.
    private func giveUpOverdue() {
        let now = monotonicSeconds()
        let silent = flying.values.filter { $0.deadline <= now }
        if !silent.isEmpty {
            let reason = BlockError(
                .inputOutput,
                "\(reference): \(silent[0].command.name): no answer within \(reference.timeoutSeconds) s")
            lose(reason)
            for request in silent {
                request.silences += 1
                if request.silences > 1 { giveUp(request, reason) }
            }
        }
        guard session == nil else { return }
        for request in waiting {
            let limit = request.givesUpAt ?? now + Double(reference.reconnectSeconds)
            request.givesUpAt = limit
            if limit <= now, let lastFailure { giveUp(request, lastFailure) }
        }
    }

    private func giveUp(_ request: ISCSIRequest, _ reason: BlockError) {
        waiting.removeAll { $0 === request }
        finish(request, .failure(reason))
    }

    private func reconnect() {
        guard reference.reconnectSeconds > 0 else { return }
        isReconnecting = true
        defer {
            isReconnecting = false
            // Whoever lets us in and closes again is asked less and less often, until a command has succeeded.
            nextAttempt = monotonicSeconds() + pause
            pause = min(pause * 2, Self.pauses.longest)
        }
        do throws(BlockError) {
            try connect()
            let now = try LogicalUnitFacts(of: ISCSIProbe(self))
            if !now.hasIdentity {
                throw BlockError(
                    .changed,
                    "\(reference): the session was lost, and the unit has neither a worldwide name nor a serial number "
                        + "by which to know it again; open it anew")
            }
            if let facts, let difference = now.difference(from: facts) {
                throw BlockError(
                    .changed, "\(reference): after a lost session there is another unit: \(difference)")
            }
            for request in waiting { request.givesUpAt = nil }
        } catch {
            dropSession()
            // What was asked of the unit itself did not come from others.
            flying = [:]
            lastFailure = error
            guard error.kind == .changed else { return }
            publish { $0.failure = error }
            for request in waiting { finish(request, .failure(error)) }
            waiting = []
        }
    }

    private func sayGoodbye() {
        guard let session, loss == nil, flying.isEmpty else { return }
        _ = try? step("logging out", until: monotonicSeconds() + Self.goodbye, evenStopped: true) {
            dg_iscsi_logout(session, Self.stepDone, Unmanaged.passUnretained(self).toOpaque())
        }
    }
}

// MARK: - Connecting

extension ISCSIWorker {
    /// Logins that a target may send elsewhere, one after the other.
    private static let redirectionsMax = 4

    private static let stepDone: @convention(c) (UnsafeMutableRawPointer?, Int32) -> Void = { owner, status in
        guard let owner else { return }
        let worker = Unmanaged<ISCSIWorker>.fromOpaque(owner).takeUnretainedValue()
        worker.stepStatus = status
        if status != 0 { worker.stepFailure = worker.session.map { String(cString: dg_iscsi_error($0)) } }
    }

    /// Makes a session with the target: of the portal's addresses, with the first that answers.
    private func connect() throws(BlockError) {
        let doing = "connecting to \(reference)"
        var failure = BlockError(.notFound, "\(doing): the name has no address")
        for address in try numericAddresses(of: reference.host) {
            do throws(BlockError) {
                return try logIn(
                    to: address.contains(":") ? "[\(address)]:\(reference.port)" : "\(address):\(reference.port)")
            } catch {
                failure = error
                dropSession()
                // Another address of the same portal would say the same.
                if error.kind == .denied || error.kind == .shutdown { break }
            }
        }
        throw failure
    }

    private func logIn(to portal: String) throws(BlockError) {
        let deadline = monotonicSeconds() + Double(reference.timeoutSeconds)
        var portal = portal
        for _ in 0...Self.redirectionsMax {
            let session = try secrets.makeSession(sessionID)
            self.session = session
            let owner = Unmanaged.passUnretained(self).toOpaque()
            let connected = try step("connecting to \(portal)", until: deadline) {
                dg_iscsi_connect(session, portal, Self.stepDone, owner)
            }
            if connected != 0 { throw failure("connecting to \(portal)") }
            let status = try step("logging in", until: deadline) { dg_iscsi_login(session, Self.stepDone, owner) }
            if status == 0 { return }
            guard status == Int32(DG_ISCSI_REDIRECT), let other = dg_iscsi_redirection(session) else {
                throw refusal(failure("logging in"))
            }
            portal = String(cString: other)
            dropSession()
        }
        throw BlockError(.inputOutput, "\(reference): it sends logins from one place to the next")
    }

    /// What a failed login means: libiscsi only has words for it.
    private func refusal(_ error: BlockError) -> BlockError {
        let text = error.message.lowercased()
        if text.contains("auth") || text.contains("chap") || text.contains("0x0201") || text.contains("0x0202") {
            let advice =
                reference.user == nil
                ? "it may want a user and a password (iscsi://USER@HOST/...?password-file=PATH)"
                : "see whether user and password are right, and whether this initiator may log in"
            return BlockError(.denied, "\(error.message); \(advice)")
        }
        if text.contains("not found") || text.contains("0x0203") { return BlockError(.notFound, error.message) }
        return error
    }

    /// Begins a step and waits for its end.
    private func step(_ doing: String, until deadline: Double, evenStopped: Bool = false, _ begin: () -> Int32)
        throws(BlockError) -> Int32
    {
        (stepStatus, stepFailure) = (nil, nil)
        if begin() != 0 { throw failure(doing) }
        while true {
            if let status = stepStatus { return status }
            if let loss { throw loss.during(doing) }
            if !evenStopped && lock.withLock({ shared.isStopped }) {
                throw BlockError(.shutdown, "\(reference) is being closed")
            }
            if monotonicSeconds() >= deadline {
                throw BlockError(
                    .inputOutput, "\(reference): \(doing): no answer within \(reference.timeoutSeconds) s")
            }
            pump(until: deadline)
        }
    }

    /// Carries out a command of the worker's own, on its thread.
    fileprivate func carryOut(_ command: SCSICommand, into buffer: UnsafeMutableRawBufferPointer) throws(BlockError)
        -> SCSIOutcome
    {
        let request = ISCSIRequest(command, buffer, self)
        send(request)
        while true {
            if let outcome = lock.withLock({ request.outcome }) { return try outcome.get() }
            let isStopped = lock.withLock { shared.isStopped }
            let isLate = monotonicSeconds() >= request.deadline
            if loss != nil || isStopped || isLate {
                let reason =
                    loss
                    ?? BlockError(
                        .inputOutput,
                        "\(reference): \(command.name): "
                            + (isLate ? "no answer within \(reference.timeoutSeconds) s" : "the session is closed"))
                // Only then is the buffer nobody else's.
                dropSession()
                flying = [:]
                throw reason
            }
            pump(until: request.deadline)
        }
    }
}

/// The worker's own way to the unit, while it looks who that is. For its thread only.
private struct ISCSIProbe: SCSICommandPath {
    let worker: ISCSIWorker

    init(_ worker: ISCSIWorker) { self.worker = worker }

    var unitName: String { worker.reference.description }

    func execute(_ command: SCSICommand, into buffer: UnsafeMutableRawBufferPointer) throws(BlockError) -> SCSIOutcome {
        try worker.carryOut(command, into: buffer)
    }
}
