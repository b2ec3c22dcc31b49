// Listeners and clients: accepts connections, gives each a thread, and ends them in an orderly way.
public import Block
import CLinux
import Glibc
public import LinuxIO
public import Logging

/// Limits of a server.
public struct ServerLimits: Sendable {
    /// The most connections at once; more are closed as they come.
    public var connectionsMax = 1024
    /// Seconds that a client has for the whole handshake.
    public var handshakeSeconds = 10
    /// The most connections of one peer: of one IP address, one user at Unix sockets, one virtual machine.
    public var connectionsPerPeerMax = 1024
    /// Seconds for which a client may take nothing of what is sent to it, or stop in the middle of a request.
    public var stallSeconds = 600
    /// Seconds for which a client may ask for nothing; nil for as long as it likes: kernels have disks open for days.
    public var idleSeconds: Int?
    /// Seconds after which a request that is not answered is told of.
    public var stuckSeconds = 30.0
    /// Bytes that requests in flight may hold, all connections together; each gets one piece of 256 KiB in any case.
    public var slotBytesMax = 256 << 20
    /// Bytes per second that all connections of one peer together may read and write; nil for no limit.
    public var bytesPerSecondPerPeerMax: UInt64?

    /// The defaults.
    public init() {}
}

/// A server over listening sockets. Its methods may be called from any thread.
public final class Server: Sendable {
    private struct State {
        var clients: [Int: ClientRecord] = [:]
        var nextID = 1
        var isStopping = false
        var served = 0
        var isWatched = false
    }

    let directory: any ExportDirectory
    let limits: ServerLimits
    let tls: TLSServer?
    let log: Logger
    private let state = Locked(State())
    private let wake: Descriptor
    let partyBuckets: PartyBuckets?
    let slotBudget: SlotBudget
    /// Connections that were turned away.
    public let refusals: Refusals
    /// Called when a client has gone, with the number of those left and of all that ever finished a handshake.
    private let onLeave: @Sendable (_ left: Int, _ served: Int) -> Void

    /// A server that knows its exports through a directory.
    ///
    /// - Throws: `.noMemory` when the system has no descriptor left.
    public init(
        directory: any ExportDirectory, limits: ServerLimits = ServerLimits(), tls: TLSServer? = nil, log: Logger,
        onLeave: @escaping @Sendable (_ left: Int, _ served: Int) -> Void = { _, _ in }
    ) throws(BlockError) {
        let number = dg_eventfd()
        if number < 0 { throw BlockError(errno: -number, "starting a server") }
        wake = Descriptor(owning: number)
        self.directory = directory
        self.limits = limits
        self.tls = tls
        self.log = log
        partyBuckets = limits.bytesPerSecondPerPeerMax.map { PartyBuckets(bytesPerSecond: $0) }
        slotBudget = SlotBudget(bytesMax: limits.slotBytesMax)
        refusals = Refusals(log: log)
        self.onLeave = onLeave
        // A client that vanishes while a file is sent to it must not end the process.
        signal(SIGPIPE, SIG_IGN)
        // SIGURG only interrupts a thread's wait (ClientRecord.close): a handler that does nothing, without SA_RESTART.
        var interrupt = sigaction()
        interrupt.__sigaction_handler.sa_handler = { _ in }
        sigaction(SIGURG, &interrupt, nil)
    }

    /// Bytes that requests in flight hold now, and may hold.
    public var slotBytes: (held: Int, max: Int) { (slotBudget.bytes, slotBudget.bytesMax) }

    /// How many clients there are, those in their handshake among them.
    public var connections: Int { state.withLock { $0.clients.count } }

    /// The clients at this time, oldest first.
    public var clients: [ClientRecord] { state.withLock { $0.clients.values.sorted { $0.id < $1.id } } }

    /// Accepts connections on sockets from now on, on a thread of its own, until `stop`.
    public func accept(on sockets: [ListeningSocket]) throws(BlockError) {
        // accept must not wait for a client that has gone between poll and accept.
        for socket in sockets {
            let flags = dg_get_flags(socket.descriptor.number)
            if flags >= 0 { _ = dg_set_flags(socket.descriptor.number, flags | O_NONBLOCK) }
        }
        try startThread(name: "accept") { self.acceptLoop(sockets) }
    }

    private func acceptLoop(_ sockets: [ListeningSocket]) {
        var ready = sockets.map { pollfd(fd: $0.descriptor.number, events: Int16(POLLIN), revents: 0) }
        ready.append(pollfd(fd: wake.number, events: Int16(POLLIN), revents: 0))
        while !state.withLock({ $0.isStopping }) {
            if poll(&ready, nfds_t(ready.count), -1) < 0 && errno != EINTR { usleep(100_000) }
            for entry in ready.dropLast() where entry.revents != 0 { acceptOne(entry.fd) }
        }
    }

    private func acceptOne(_ listener: Int32) {
        let number = dg_accept(listener)
        if number >= 0 {
            return serve(Descriptor(owning: number))
        }
        // Out of descriptors or memory: the connection stays in the queue, so do not spin on it.
        if number == -EMFILE || number == -ENFILE || number == -ENOMEM || number == -ENOBUFS {
            log.error("accepting a connection: \(systemErrorText(-number))")
            usleep(100_000)
        }
    }

    /// Serves a connected socket on a thread of its own, or closes it when there are too many.
    public func serve(_ socket: Descriptor) {
        let peer = Peer(socket: socket.number)
        guard let client = admit(peer, socket) else { return }
        do throws(BlockError) {
            try startThread(name: "client \(client.id)") {
                client.whileServing { self.converse(client, input: socket.number, output: socket.number) }
                withExtendedLifetime(socket) {}
            }
        } catch {
            log.error("serving \(peer): \(error)")
            leave(client, hasServed: false)
        }
    }

    /// Serves one client on a pair of descriptors, here and now, until it disconnects: standard input and output.
    public func serve(input: Int32, output: Int32) {
        guard let client = admit(.inherited, nil) else { return }
        client.whileServing { converse(client, input: input, output: output) }
    }

    private func admit(_ peer: Peer, _ socket: Descriptor?) -> ClientRecord? {
        var refusal: String?
        var mustWatch = false
        let client: ClientRecord? = state.withLock { state in
            if state.isStopping { return nil }
            if state.clients.count >= limits.connectionsMax {
                refusal = "\(limits.connectionsMax) clients are connected, the most at once (--max-connections)"
                return nil
            }
            let same = state.clients.values.reduce(0) { $0 + ($1.peer.isSameParty(as: peer) ? 1 : 0) }
            if same >= limits.connectionsPerPeerMax {
                refusal = "it has \(same) connections, the most of one client (--max-per-peer)"
                return nil
            }
            let beginners = state.clients.values.reduce(0) {
                $0 + ($1.export == nil && $1.peer.isSameParty(as: peer) ? 1 : 0)
            }
            if beginners >= max(16, limits.connectionsMax / 8) {
                refusal = "\(beginners) of its connections have not got beyond their handshakes"
                return nil
            }
            let client = ClientRecord(id: state.nextID, peer: peer, descriptor: socket, log: log)
            state.nextID += 1
            state.clients[client.id] = client
            mustWatch = !state.isWatched
            state.isWatched = true
            return client
        }
        if let refusal { refusals.add(.limit, "refusing \(peer): \(refusal)") }
        if mustWatch { startWatching() }
        return client
    }

    /// Watches the clients on a thread of its own, which ends when there is none: an idle server has no wake-ups.
    private func startWatching() {
        do throws(BlockError) {
            try startThread(name: "watcher", stackSize: 256 * 1024) { self.watch() }
        } catch {
            log.error("watching for requests that are stuck: \(error)")
            state.withLock { $0.isWatched = false }
        }
    }

    private func watch() {
        var watcher = Watcher(limits)
        let interval = UInt32(Watcher.interval(limits) * 1e6)
        while true {
            usleep(interval)
            let present = clients
            watcher.look(present)
            let isDone = state.withLock { state in
                if state.clients.isEmpty { state.isWatched = false }
                return !state.isWatched
            }
            if isDone { return }
        }
    }

    func leave(_ client: ClientRecord, hasServed: Bool) {
        let (left, served) = state.withLock { state in
            state.clients[client.id] = nil
            if hasServed { state.served += 1 }
            return (state.clients.count, state.served)
        }
        onLeave(left, served)
    }

    /// Has clients finish and waits until they are gone; cuts off those that are still there after a time.
    private func finish(seconds: Double, _ concerned: @escaping (ClientRecord) -> Bool) {
        let deadline = monotonicSeconds() + seconds
        while true {
            let left = clients.filter(concerned)
            if left.isEmpty { return }
            if monotonicSeconds() >= deadline { break }
            for client in left { client.close() }
            usleep(5000)
        }
        for client in clients where concerned(client) { client.abort() }
        let hardDeadline = monotonicSeconds() + 2
        while monotonicSeconds() < hardDeadline && clients.contains(where: concerned) { usleep(5000) }
    }

    /// Ends a client after answering what it has sent, and waits until it is gone; false when there is none of this id.
    public func disconnect(_ id: Int, seconds: Double = 10) -> Bool {
        guard clients.contains(where: { $0.id == id }) else { return false }
        finish(seconds: seconds) { $0.id == id }
        return true
    }

    /// Ends every client of an export after answering what it has sent, and waits until they are gone.
    public func disconnectAll(from export: Export, seconds: Double) {
        finish(seconds: seconds) { $0.isUsing(export) }
    }

    /// Accepts nobody any more, answers what clients have sent, and waits for them to go; cuts them off after a time.
    public func stop(graceSeconds: Double) {
        state.withLock { $0.isStopping = true }
        var one: UInt64 = 1
        write(wake.number, &one, 8)
        finish(seconds: graceSeconds) { _ in true }
    }
}
