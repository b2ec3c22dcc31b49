// The connections of one remote disk: opened when they are needed, and opened again when they are lost.
import Block
import Glibc
import LinuxIO
import Synchronization

/// Connections to one export, all of which must tell the same about it.
///
/// What was asked on a connection that broke is asked again on another one; every request can be repeated. Only changes
/// that the server was too slow to answer are not: it may still be at them. Writes that were answered but not flushed
/// when their connection broke may be lost with their server, which the next flush tells, and all that are under way.
final class ChannelPool: @unchecked Sendable {
    // Sendable because what changes is touched under `lock` only.

    /// The most times that one request is sent when connections break under it, although they can be made.
    static let attemptsMax = 5
    /// Seconds before another connection is tried after one could not be made, where that is not a matter of waiting.
    private static let pauseSeconds = 5.0
    /// The most seconds before one more connection is tried beside others; each failure doubles the pause.
    private static let openingPauseMax = 300.0
    /// Connections beside others that were lost before an answer came on them, until no more are tried.
    private static let strikesMax = 3

    private let connector: ClientConnector
    private let agreement: ClientAgreement
    private let mayBeSeveral: Bool
    private let reconnectSeconds: Double
    private let lock = Lock()
    // Held by who makes the first connection after all were lost; the others wait for it.
    private let reconnecting = Lock()
    private var channels: [PooledChannel]
    private var channelsMax: Int
    private var made: UInt64 = 1
    private var isOpening = false
    private var nextOpeningSeconds = 0.0
    private var strikes = 0
    private var openingPause = pauseSeconds
    private var lostSeconds: Double?
    private var fatal: BlockError?
    // Times at which answered changes may have been lost, and those of them that a flush has told.
    private var lossesNoticed: UInt64 = 0
    private var lossesTold: UInt64 = 0
    // Under `reconnecting`.
    private var lastFailure: (error: BlockError, seconds: Double)?

    /// Connections beside a first one that is made.
    init(_ connector: ClientConnector, first: ClientChannel) {
        self.connector = connector.pinned(to: first)
        agreement = first.agreement
        mayBeSeveral = agreement.flags.contains(.canMultiConn)
        channelsMax = mayBeSeveral ? connector.uri.connectionsMax : 1
        reconnectSeconds = Double(connector.uri.reconnectSeconds)
        channels = [PooledChannel(first, number: 0, isAdditional: false)]
    }

    deinit { for member in channels { member.channel.close() } }

    /// The most connections.
    var connectionsMax: Int { lock.withLock { channelsMax } }

    // MARK: - Running requests

    /// Runs a body that changes nothing on a connection, and again on another one if that breaks.
    ///
    /// - Throws: what the server answered, or why no connection can be had.
    func run<R>(_ body: (ClientChannel) throws(ChannelError) -> R) throws(BlockError) -> R {
        try run(changes: false) { (member) throws(ChannelError) in try body(member.channel) }
    }

    /// Runs a body on a connection, and again on another one if that breaks, unless it changes something and the server
    /// may still be at it: then it would overtake what was written since.
    private func run<R>(changes: Bool, _ body: (PooledChannel) throws(ChannelError) -> R) throws(BlockError) -> R {
        var attempts = 0
        // When the first attempt failed, and how many connections had been made by then.
        var first: (seconds: Double, made: UInt64)?
        while true {
            let member = try channel()
            do throws(ChannelError) {
                let result = try body(member)
                prove(member)
                return result
            } catch {
                if let final = final(error, member, changes: changes) { throw final }
                if case .broken = error, member.isUnproven { continue }
                let now = monotonicSeconds()
                let since = first ?? (now, lock.withLock { made })
                // Several connections may have been lost at once, which is one failure.
                if first != nil && member.number < since.made { continue }
                first = since
                attempts += 1
                if attempts >= Self.attemptsMax || now >= since.seconds + reconnectSeconds {
                    throw attempts == 1 ? error.error : error.error.during("in \(attempts) attempts")
                }
            }
            // The first time at once: the others may have waited for this long enough.
            if attempts > 1 { usleep(UInt32(50_000 << attempts)) }
        }
    }

    /// The error to fail with; nil if another connection may do better, in which case this one is dropped.
    private func final(_ error: ChannelError, _ member: PooledChannel, changes: Bool) -> BlockError? {
        switch error {
        case .refused(let error) where error.kind != .shutdown:
            prove(member)
            return error
        case .refused:
            prove(member)
            drop(member)
            // A server that allows one connection must not see two.
            if !mayBeSeveral { member.channel.close() }
            return nil
        case .broken:
            drop(member)
            return nil
        case .late(let error):
            drop(member, isLoss: changes)
            return changes ? error : nil
        case .violated(let error):
            drop(member)
            return error
        }
    }

    /// Notes that the server answers on a connection, so that others may be worth trying.
    private func prove(_ member: PooledChannel) {
        if member.hasAnswered.load(ordering: .relaxed) { return }
        member.hasAnswered.store(true, ordering: .relaxed)
        if member.isAdditional { lock.withLock { openingPause = Self.pauseSeconds } }
    }

    /// Uses a connection no more.
    ///
    /// - Parameter isLoss: whether changes may be lost, or come late, although none was answered.
    private func drop(_ member: PooledChannel, isLoss: Bool = false) {
        lock.withLock {
            if isLoss { lossesNoticed += 1 }
            remove(member)
        }
    }

    /// Removes a connection, if nobody has yet; the lock is held.
    private func remove(_ member: PooledChannel) {
        if member.isDropped { return }
        member.isDropped = true
        channels.removeAll { $0 === member }
        if channels.isEmpty { lostSeconds = monotonicSeconds() }
        if member.isDirty { lossesNoticed += 1 }
        if member.isUnproven { strike() }
    }

    /// One more connection did not last; the lock is held.
    private func strike() {
        putOff()
        strikes += 1
        if strikes >= Self.strikesMax { channelsMax = max(channels.count, 1) }
    }

    /// One more connection is not tried at once; the lock is held.
    private func putOff() {
        nextOpeningSeconds = monotonicSeconds() + openingPause
        openingPause = min(openingPause * 2, Self.openingPauseMax)
    }

    /// Removes connections that have ended; the lock is held.
    private func removeBroken() { for member in channels where member.channel.isBroken { remove(member) } }

    /// Sends advice, if there is a connection and nothing to wait for.
    func advise(_ request: Request) {
        lock.withLock { leastBusy }?.channel.advise(request)
    }

    private var leastBusy: PooledChannel? { channels.min { $0.channel.inFlight < $1.channel.inFlight } }

    // MARK: - Changes and flushes

    /// Runs a body that changes the export durably.
    func runDurable(_ body: (ClientChannel) throws(ChannelError) -> Void) throws(BlockError) {
        try run(changes: true) { (member) throws(ChannelError) in try body(member.channel) }
    }

    /// Runs a body that changes the export without making that durable.
    func runChange(_ body: (ClientChannel) throws(ChannelError) -> Void) throws(BlockError) {
        try run(changes: true) { (member) throws(ChannelError) in
            try body(member.channel)
            lock.withLock {
                member.answered += 1
                // It may have been dropped between the answer and here.
                if member.isDropped { lossesNoticed += 1 }
            }
        }
    }

    /// The losses so far, to be handed to the flush behind a change that has not begun yet.
    var losses: UInt64 { lock.withLock { lossesNoticed } }

    /// Flushes every connection on which changes were answered since it was flushed, or any one.
    ///
    /// - Parameters:
    ///   - losses: the losses before the change that is to become durable. Without it, the flush is for all changes,
    ///     and what it tells is told.
    ///   - body: flushes a connection; nil where the server has no flush, so that answered changes are as safe as it
    ///     gets.
    /// - Throws: what went wrong, or that changes before it may have been lost.
    func flush(since losses: UInt64? = nil, _ body: ((ClientChannel) throws(ChannelError) -> Void)?)
        throws(BlockError)
    {
        let (known, dirty) = lock.withLock {
            removeBroken()
            return (losses ?? lossesTold, channels.filter(\.isDirty).map { ($0, $0.answered) })
        }
        if let body {
            for (member, mark) in dirty {
                do throws(ChannelError) {
                    try body(member.channel)
                    prove(member)
                    lock.withLock { member.cover(mark) }
                } catch {
                    // With the connection, its changes may be gone: that is told below.
                    if let final = final(error, member, changes: true) { throw final }
                }
            }
            if dirty.isEmpty { try flushAny(body) }
        } else {
            lock.withLock { for (member, mark) in dirty { member.cover(mark) } }
        }
        try tellLosses(after: known, isForAll: losses == nil)
    }

    private func flushAny(_ body: (ClientChannel) throws(ChannelError) -> Void) throws(BlockError) {
        try run(changes: true) { (member) throws(ChannelError) in
            let mark = lock.withLock { member.answered }
            try body(member.channel)
            lock.withLock { member.cover(mark) }
        }
    }

    private func tellLosses(after known: UInt64, isForAll: Bool) throws(BlockError) {
        let isLoss = lock.withLock {
            if isForAll { lossesTold = lossesNoticed }
            return lossesNoticed > known
        }
        if !isLoss { return }
        throw BlockError(
            .inputOutput,
            "flushing \(connector.uri): the connection was lost after writes that were answered and not yet flushed; "
                + "if the server was restarted, they may be gone and have to be written again")
    }

    // MARK: - Connections

    /// The connection with the least to do, or a new one after all were lost. While all are busy, another one is made
    /// for later requests.
    private func channel() throws(BlockError) -> PooledChannel {
        let (best, opens) = try lock.withLock { () throws(BlockError) -> (PooledChannel?, Bool) in
            if let fatal { throw fatal }
            removeBroken()
            guard let best = leastBusy else { return (nil, false) }
            let opens =
                channels.count < channelsMax && best.channel.inFlight > 0 && !isOpening
                && monotonicSeconds() >= nextOpeningSeconds
            if opens { isOpening = true }
            return (best, opens)
        }
        guard let best else { return try reconnect() }
        if opens { open() }
        return best
    }

    /// Makes one more connection on a thread of its own, so that no request waits for it.
    private func open() {
        let (connector, agreement) = (connector, agreement)
        do throws(BlockError) {
            try startThread(name: "nbd-open") { [weak self] in
                var isFinal = false
                let result = Result { () throws(BlockError) in
                    try Self.connect(connector, agreement, seconds: 5, isFinal: &isFinal)
                }
                // A channel that nobody takes closes itself.
                self?.opened(result, isFinal: isFinal)
            }
        } catch { opened(.failure(error), isFinal: false) }
    }

    private func opened(_ result: Result<ClientChannel, BlockError>, isFinal: Bool) {
        lock.withLock {
            isOpening = false
            guard case .success(let channel) = result else {
                putOff()
                // A server whose further connections lead elsewhere is good for those that there are.
                if isFinal { channelsMax = max(channels.count, 1) }
                return
            }
            add(channel)
        }
    }

    /// Uses a new connection, too; the lock is held.
    @discardableResult
    private func add(_ channel: ClientChannel) -> PooledChannel {
        let member = PooledChannel(channel, number: made, isAdditional: !channels.isEmpty)
        made += 1
        channels.append(member)
        lostSeconds = nil
        return member
    }

    /// Makes a connection after all were lost, again and again for as long as was asked for.
    private func reconnect() throws(BlockError) -> PooledChannel {
        if reconnectSeconds == 0 {
            throw BlockError(
                .shutdown, "\(connector.uri): the connection was lost, and reconnect=0 forbids another one")
        }
        return try reconnecting.withLock { () throws(BlockError) in
            var delay = 0.1
            while true {
                let (member, since) = try lock.withLock { () throws(BlockError) -> (PooledChannel?, Double) in
                    if let fatal { throw fatal }
                    removeBroken()
                    return (leastBusy, lostSeconds ?? 0)
                }
                if let member { return member }
                if let last = lastFailure, monotonicSeconds() - last.seconds < Self.pauseSeconds,
                    monotonicSeconds() > since + reconnectSeconds
                {
                    throw last.error
                }
                var isFinal = false
                do throws(BlockError) {
                    let channel = try Self.connect(
                        connector, agreement, seconds: ClientConnector.secondsMax, isFinal: &isFinal)
                    lastFailure = nil
                    Reconnections.note(connector.uri)
                    return lock.withLock { add(channel) }
                } catch {
                    let now = monotonicSeconds()
                    // Whoever answers is not the one that was opened: nothing of it is ever taken for that.
                    if isFinal { lock.withLock { fatal = error } }
                    if isFinal || now + delay > since + reconnectSeconds {
                        let failure = error.during("the connection was lost, and there is no new one")
                        lastFailure = (failure, now)
                        throw failure
                    }
                }
                usleep(UInt32(delay * 1e6))
                delay = min(delay * 2, 5)
            }
        }
    }

    /// Makes a connection that is not the pool's, and what makes more of them.
    ///
    /// - Throws: `BlockError`: no connection within so many seconds, or it leads to another disk.
    func connectApart(seconds: Int) throws(BlockError) -> (ClientConnector, ClientChannel) {
        var isFinal = false
        let channel = try Self.connect(connector, agreement, seconds: seconds, isFinal: &isFinal)
        return (connector.single(), channel)
    }

    /// Makes a connection, which must lead to the same disk.
    ///
    /// - Parameter isFinal: set when it leads elsewhere, so that no further one is to be tried.
    private static func connect(
        _ connector: ClientConnector, _ agreement: ClientAgreement, seconds: Int, isFinal: inout Bool
    ) throws(BlockError) -> ClientChannel {
        let channel = try connector.connect(
            contexts: agreement.contexts.map(\.name), seconds: seconds, isImpostor: &isFinal)
        guard let difference = agreement.difference(from: channel.agreement) else { return channel }
        channel.close()
        isFinal = true
        throw BlockError(
            .denied,
            "connecting to \(connector.uri) again: it is not the disk that was opened: \(difference). Open it anew")
    }
}
