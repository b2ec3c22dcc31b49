// Listeners and clients: accepts connections, gives each a thread, and ends them in an orderly way.
public import Block
import CLinux
import Glibc
public import LinuxIO
public import Logging
import Synchronization

/// Limits of a server.
public struct ServerLimits: Sendable {
    /// The most connections at once; more are closed as they come.
    public var connectionsMax = 1024
    /// Seconds that a client has for the whole handshake.
    public var handshakeSeconds = 10
    /// The most connections of one peer: of one IP address, one user at Unix sockets, one virtual machine.
    public var connectionsPerPeerMax = 1024
    /// Seconds for which a client may take nothing of what is sent to it.
    public var stallSeconds = 600

    /// The defaults.
    public init() {}
}

/// What is known of a connected client. Its own thread writes it, others read it.
public final class ClientRecord: Sendable {
    /// A number that no other client of this process gets.
    public let id: Int
    /// Who it is.
    public let peer: Peer
    // Weak: its connection's thread owns the socket, and who looks at a record must not keep it open.
    private weak let descriptor: Descriptor?
    private let log: Logger
    private let closing = Atomic<Bool>(false)
    private let exportInUse = Locked<Export?>(nil)
    private let read = Atomic<UInt64>(0)
    private let written = Atomic<UInt64>(0)
    private let errorsLogged = Atomic<Int>(0)
    /// The thread that serves the client, while it does.
    private let thread = Locked<pthread_t?>(nil)

    /// The most errors of one client that are logged; the rest are counted.
    static let errorsLoggedMax = 20

    init(id: Int, peer: Peer, descriptor: Descriptor?, log: Logger) {
        self.id = id
        self.peer = peer
        self.descriptor = descriptor
        self.log = log
    }

    /// The export it uses; nil during the handshake.
    public var export: String? { exportInUse.withLock { $0?.name } }
    func isUsing(_ export: Export) -> Bool { exportInUse.withLock { $0 === export } }
    /// Bytes it has read.
    public var bytesRead: UInt64 { read.load(ordering: .relaxed) }
    /// Bytes it has written.
    public var bytesWritten: UInt64 { written.load(ordering: .relaxed) }
    var isClosing: Bool { closing.load(ordering: .relaxed) }

    func use(_ export: Export?) { exportInUse.withLock { $0 = export } }

    func add(_ bytesRead: UInt64, _ bytesWritten: UInt64) {
        if bytesRead > 0 { read.wrappingAdd(bytesRead, ordering: .relaxed) }
        if bytesWritten > 0 { written.wrappingAdd(bytesWritten, ordering: .relaxed) }
    }

    func note(_ text: String) { log.warning("client \(id) (\(peer)): \(text)") }

    func noteError(_ error: BlockError) {
        let count = errorsLogged.wrappingAdd(1, ordering: .relaxed).newValue
        if count <= Self.errorsLoggedMax { note(error.message) }
        if count == Self.errorsLoggedMax { note("further errors of this client are counted, not logged") }
    }

    /// Runs the body as the thread that serves the client, so that `close` can wake it.
    func whileServing(_ body: () -> Void) {
        thread.withLock { $0 = pthread_self() }
        body()
        thread.withLock { $0 = nil }
    }

    /// Takes no more requests: what was received is answered, then the connection ends. To be called again while the
    /// client is still there: a thread that was just about to wait misses a single wake-up.
    ///
    /// Shutting the socket down for reading would wake it, too, but TCP then answers the next request with a reset,
    /// which can destroy replies on their way.
    func close() {
        closing.store(true, ordering: .relaxed)
        thread.withLock { thread in
            if let thread { pthread_kill(thread, SIGURG) }
        }
    }

    /// Ends the connection at once.
    func abort() {
        closing.store(true, ordering: .relaxed)
        if let descriptor { shutdown(descriptor.number, Int32(SHUT_RDWR)) }
    }
}

/// A server over listening sockets. Its methods may be called from any thread.
public final class Server: Sendable {
    private struct State {
        var clients: [Int: ClientRecord] = [:]
        var nextID = 1
        var isStopping = false
        var served = 0
    }

    private let directory: any ExportDirectory
    private let limits: ServerLimits
    private let log: Logger
    private let state = Locked(State())
    private let wake: Descriptor
    /// Called when a client has gone, with the number of those left and of all that ever finished a handshake.
    private let onLeave: @Sendable (_ left: Int, _ served: Int) -> Void

    /// A server that knows its exports through a directory.
    ///
    /// - Throws: `.noMemory` when the system has no descriptor left.
    public init(
        directory: any ExportDirectory, limits: ServerLimits = ServerLimits(), log: Logger,
        onLeave: @escaping @Sendable (_ left: Int, _ served: Int) -> Void = { _, _ in }
    ) throws(BlockError) {
        let number = dg_eventfd()
        if number < 0 { throw BlockError(errno: -number, "starting a server") }
        wake = Descriptor(owning: number)
        self.directory = directory
        self.limits = limits
        self.log = log
        self.onLeave = onLeave
        // A client that vanishes while a file is sent to it must not end the process.
        signal(SIGPIPE, SIG_IGN)
        // SIGURG only interrupts a thread's wait (ClientRecord.close): a handler that does nothing, without SA_RESTART.
        var interrupt = sigaction()
        interrupt.__sigaction_handler.sa_handler = { _ in }
        sigaction(SIGURG, &interrupt, nil)
    }

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
        guard let client = admit(peer, socket) else {
            return log.warning("refusing \(peer): too many clients are connected already")
        }
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
        converse(client, input: input, output: output)
    }

    private func admit(_ peer: Peer, _ socket: Descriptor?) -> ClientRecord? {
        state.withLock { state in
            if state.isStopping || state.clients.count >= limits.connectionsMax { return nil }
            let same = state.clients.values.reduce(0) { $0 + ($1.peer.isSameParty(as: peer) ? 1 : 0) }
            if same >= limits.connectionsPerPeerMax { return nil }
            let client = ClientRecord(id: state.nextID, peer: peer, descriptor: socket, log: log)
            state.nextID += 1
            state.clients[client.id] = client
            return client
        }
    }

    private func leave(_ client: ClientRecord, hasServed: Bool) {
        let (left, served) = state.withLock { state in
            state.clients[client.id] = nil
            if hasServed { state.served += 1 }
            return (state.clients.count, state.served)
        }
        onLeave(left, served)
    }

    /// Handshake and transmission of one client.
    private func converse(_ client: ClientRecord, input: Int32, output: Int32) {
        let buffer = UnsafeMutableRawBufferPointer.allocate(
            byteCount: Connection<PlainTransport>.inputSize, alignment: Buffer.alignment)
        defer { buffer.deallocate() }
        var link = PlainTransport(input: input, output: output)
        link.setTimeout(seconds: limits.handshakeSeconds)
        guard let (session, rest) = negotiate(&link, client, buffer) else { return leave(client, hasServed: false) }
        link.setTimeout(seconds: limits.stallSeconds)
        let counters = session.export.counters
        let connections = counters.connections.wrappingAdd(1, ordering: .relaxed).newValue
        client.use(session.export)
        // Whoever removes an export has looked for its clients either after this, or before the next line.
        let isStillThere = directory.serves(session.export)
        if isStillThere && connections <= session.export.options.connectionsMax {
            log.info("client \(client.id) (\(client.peer)) uses export \"\(session.export.name)\"")
            var connection = Connection(link, session: session, client: client, input: buffer, received: rest)
            connection.run()
        } else if isStillThere {
            client.note("too many connections to export \"\(session.export.name)\"")
        }
        counters.connections.wrappingSubtract(1, ordering: .relaxed)
        client.use(nil)
        log.info("client \(client.id) (\(client.peer)) has gone")
        leave(client, hasServed: true)
    }

    /// Runs the handshake; nil when it ends without a session. Also the bytes of the buffer that belong to what
    /// follows.
    private func negotiate(
        _ link: inout PlainTransport, _ client: ClientRecord, _ buffer: UnsafeMutableRawBufferPointer
    ) -> (Session, Range<Int>)? {
        var handshake = ServerHandshake(directory: directory, peer: client.peer)
        let deadline = monotonicSeconds() + Double(limits.handshakeSeconds)
        var count = 0
        guard ServerHandshake.greeting.withUnsafeBytes({ link.send($0, more: false) }) else { return nil }
        var mustReceive = true
        while !client.isClosing {
            if mustReceive {
                guard waitForInput(link.inputDescriptor, client, until: deadline) else {
                    if client.isClosing { return nil }
                    client.note("the handshake took longer than \(limits.handshakeSeconds) s")
                    return nil
                }
                let space = UnsafeMutableRawBufferPointer(rebasing: buffer[count...])
                switch link.receive(into: space, waiting: true) {
                case .bytes(let got): count += got
                case .nothing: continue
                case .closed: return nil
                }
            }
            var output: [UInt8] = []
            let (consumed, outcome) = handshake.receive(
                UnsafeRawBufferPointer(rebasing: buffer[..<count]), into: &output)
            if !output.isEmpty, !output.withUnsafeBytes({ link.send($0, more: false) }) { return nil }
            switch outcome {
            case .close: return nil
            case .transmission(let session): return (session, consumed..<count)
            case .more:
                buffer.copyMemory(from: UnsafeRawBufferPointer(rebasing: buffer[consumed..<count]))
                count -= consumed
                // Something was taken: what is left may hold further options.
                mustReceive = consumed == 0 || count == 0
            }
        }
        return nil
    }

    private func waitForInput(_ descriptor: Int32, _ client: ClientRecord, until deadline: Double) -> Bool {
        while !client.isClosing {
            let left = deadline - monotonicSeconds()
            if left <= 0 { return false }
            var ready = pollfd(fd: descriptor, events: Int16(POLLIN), revents: 0)
            let result = poll(&ready, 1, Int32(left * 1000) + 1)
            if result > 0 { return true }
            if result < 0 && errno != EINTR { return false }
        }
        return false
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
