// What is known of one client while it is connected: written by its own thread, looked at by others.
import Block
import Glibc
public import LinuxIO
import Logging
import Synchronization

/// What is known of a connected client. Its own thread writes it, others read it.
public final class ClientRecord: Sendable {
    /// A number that no other client of this process gets.
    public let id: Int
    /// Who it is.
    public let peer: Peer
    // Weak: its connection's thread owns the socket, and who looks at a record must not keep it open.
    private weak let descriptor: Descriptor?
    private let log: Logger
    /// When it connected, in nanoseconds of the monotonic clock.
    let began = monotonicNanoseconds()
    private let closing = Atomic<Bool>(false)
    private let tls = Locked<TLSIdentity?>(nil)
    private let exportInUse = Locked<Export?>(nil)
    let figures = Figures()
    let activity = Activity()
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
    /// The same, with its disk.
    var disk: Export? { exportInUse.withLock { $0 } }
    /// Who shares its limits with it.
    var party: Party? { Party(peer, identity) }
    func isUsing(_ export: Export) -> Bool { exportInUse.withLock { $0 === export } }
    /// What was done for it.
    public var sums: FigureSums {
        var sums = FigureSums()
        figures.add(to: &sums)
        return sums
    }
    /// Requests received and not yet answered.
    public var inFlight: Int { activity.inFlight }
    /// Seconds since the oldest of them arrived; nil when there is none.
    public var oldestRequestSeconds: Double? {
        activity.oldestStart.map { start in
            let now = monotonicNanoseconds()
            return now > start ? Double(now - start) / 1e9 : 0
        }
    }
    var isClosing: Bool { closing.load(ordering: .relaxed) }

    /// What it has shown over TLS; nil on a connection in clear text.
    public var identity: TLSIdentity? { tls.withLock { $0 } }
    func identify(_ identity: TLSIdentity) { tls.withLock { $0 = identity } }
    var isOnTCP: Bool { if case .ip = peer { true } else { false } }

    /// Begins to use an export, or, with nil, ends using the one it used.
    ///
    /// - Returns: how many connections the export has now.
    @discardableResult
    func use(_ export: Export?) -> Int {
        let before = exportInUse.withLock { inUse in
            defer { inUse = export }
            return inUse
        }
        before?.users.leave(self)
        return export?.users.enter(self) ?? 0
    }

    /// What messages call it.
    var name: String { "client \(id) (\(peer))" }

    func note(_ text: String) { log.warning("\(name): \(text)") }

    func noteError(_ error: BlockError) {
        let count = errorsLogged.wrappingAdd(1, ordering: .relaxed).newValue
        if count <= Self.errorsLoggedMax { note(error.message) }
        if count == Self.errorsLoggedMax { note("further errors of this client are counted, not logged") }
    }

    /// Runs the body as the thread that serves the client, so that `close` can wake it.
    func whileServing(_ body: () -> Void) {
        // A thread has the signal mask of the one that started it, which may be one that takes no signals.
        var set = sigset_t()
        sigemptyset(&set)
        sigaddset(&set, SIGURG)
        pthread_sigmask(SIG_UNBLOCK, &set, nil)
        thread.withLock { $0 = pthread_self() }
        body()
        thread.withLock { $0 = nil }
    }

    /// Wakes the thread that serves the client if it waits for the client; one that was just about to wait misses it.
    func wake() {
        thread.withLock { thread in
            if let thread { pthread_kill(thread, SIGURG) }
        }
    }

    /// Takes no more requests: what was received is answered, then the connection ends. To be called again while the
    /// client is still there: a thread that was just about to wait misses a single wake-up.
    ///
    /// Shutting the socket down for reading would wake it, too, but TCP then answers the next request with a reset,
    /// which can destroy replies on their way.
    func close() {
        closing.store(true, ordering: .relaxed)
        wake()
    }

    /// Ends the connection at once.
    func abort() {
        closing.store(true, ordering: .relaxed)
        if let descriptor { shutdown(descriptor.number, Int32(SHUT_RDWR)) }
    }
}
