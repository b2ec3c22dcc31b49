// From a URI to a connection in its transmission phase: connects, encrypts, shakes hands, all within one time limit.
public import Block
import Glibc
public import LinuxIO

/// Makes connections to the server that a URI names. Certificates and keys are read once.
public struct ClientConnector: Sendable {
    /// The longest that connecting and the handshake may take, in seconds, whatever a request may take.
    public static let secondsMax = 30

    /// Where to connect to.
    public private(set) var uri: NBDURI
    private var context: TLSClientContext?

    /// A connector for a URI.
    ///
    /// - Throws: `BlockError` when certificates or keys cannot be read.
    public init(_ uri: NBDURI) throws(BlockError) {
        self.uri = uri
        context = try uri.tls.map { (options) throws(BlockError) in try TLSClientContext(options) }
    }

    /// The same connector; where the certificate of the server is not checked, with the one that was shown on a first
    /// connection, so that at least nobody else answers later.
    func pinned(to first: ClientChannel) -> ClientConnector {
        guard let context, let shown = first.link.tlsIdentity?.certificate else { return self }
        var connector = self
        connector.context = context.pinned(to: shown)
        return connector
    }

    /// The same connector, for one connection only.
    func single() -> ClientConnector {
        var connector = self
        connector.uri.connectionsMax = 1
        return connector
    }

    /// Connects and enters the transmission phase.
    ///
    /// - Parameters:
    ///   - contexts: the meta contexts to ask for; nil for all that the server has.
    ///   - seconds: the time limit.
    /// - Throws: `BlockError`: nobody listens, TLS failed or is missing (`.denied`), there is no such export.
    public func connect(contexts: [String]? = nil, seconds: Int = secondsMax) throws(BlockError) -> ClientChannel {
        var isImpostor = false
        return try connect(contexts: contexts, seconds: seconds, isImpostor: &isImpostor)
    }

    /// The same.
    ///
    /// - Parameter isImpostor: set when it fails because the server could not show who it is.
    func connect(contexts: [String]?, seconds: Int, isImpostor: inout Bool) throws(BlockError) -> ClientChannel {
        let deadline = self.deadline(seconds)
        let socket = try LinuxIO.connect(to: uri.address, deadline: deadline)
        return try connect(over: socket, contexts: contexts, deadline: deadline, isImpostor: &isImpostor)
    }

    /// Enters the transmission phase over a connected socket, whoever made it.
    ///
    /// - Parameters:
    ///   - contexts: the meta contexts to ask for; nil for all that the server has.
    ///   - deadline: when to give up, by `monotonicSeconds()`.
    /// - Throws: `BlockError` as `connect(contexts:seconds:)`.
    public func connect(over socket: Descriptor, contexts: [String]? = nil, deadline: Double) throws(BlockError)
        -> ClientChannel
    {
        var isImpostor = false
        return try connect(over: socket, contexts: contexts, deadline: deadline, isImpostor: &isImpostor)
    }

    private func connect(over socket: Descriptor, contexts: [String]?, deadline: Double, isImpostor: inout Bool)
        throws(BlockError) -> ClientChannel
    {
        let goal = ClientHandshake.Goal.enter(export: uri.exportName, contexts: contexts)
        let (link, outcome) = try shakeHands(socket, goal, deadline, &isImpostor)
        guard case .ready(let agreement) = outcome else {
            throw BlockError(.invalid, "connecting to \(uri): the handshake ended early")
        }
        return ClientChannel(link, agreement, name: uri.description, timeoutSeconds: uri.timeoutSeconds)
    }

    /// The exports that the server lists.
    ///
    /// - Throws: `BlockError`: nobody listens, TLS failed, or the server does not list its exports (`.denied`).
    public func list() throws(BlockError) -> [ExportListing] {
        let deadline = self.deadline(Self.secondsMax)
        let socket = try LinuxIO.connect(to: uri.address, deadline: deadline)
        var isImpostor = false
        let (link, outcome) = try shakeHands(socket, .list, deadline, &isImpostor)
        link.sayGoodbye()
        guard case .listed(let listings) = outcome else { return [] }
        return listings
    }

    /// How the server is called in its certificate, unless the URI says so: by the name it was reached by.
    private var hostName: String {
        guard case .tcp(let host, _) = uri.address else { return "localhost" }
        // A zone is this machine's own affair.
        return String(host.prefix { $0 != "%" })
    }

    private func deadline(_ seconds: Int) -> Double {
        monotonicSeconds() + Double(min(seconds, Self.secondsMax, uri.timeoutSeconds))
    }

    private func shakeHands(
        _ socket: Descriptor, _ goal: ClientHandshake.Goal, _ deadline: Double, _ isImpostor: inout Bool
    ) throws(BlockError) -> (ClientLink, ClientHandshake.Outcome) {
        do throws(BlockError) {
            return try converse(socket, goal, deadline, &isImpostor)
        } catch {
            LinuxIO.abandon(socket)
            throw error.during("connecting to \(uri)")
        }
    }

    private func converse(
        _ socket: Descriptor, _ goal: ClientHandshake.Goal, _ deadline: Double, _ isImpostor: inout Bool
    ) throws(BlockError) -> (ClientLink, ClientHandshake.Outcome) {
        var link = ClientLink(socket)
        var handshake = ClientHandshake(goal, usesTLS: context != nil)
        let buffer = Buffer(count: 2 * Int(ClientHandshake.replyLengthMax))
        var count = 0
        var isAdmitted = true
        while true {
            let space = UnsafeMutableRawBufferPointer(rebasing: buffer.bytes[count...])
            count += try explaining(!isAdmitted) { () throws(BlockError) in try receive(link, space, deadline) }
            isAdmitted = true
            var output: [UInt8] = []
            let input = UnsafeRawBufferPointer(rebasing: buffer.readable[..<count])
            let (taken, outcome) = try handshake.receive(input, into: &output)
            buffer.bytes.copyMemory(from: UnsafeRawBufferPointer(rebasing: input[taken...]))
            count -= taken
            try send(link, output, deadline)
            switch outcome {
            case .more: continue
            case .ready, .listed: return (link, outcome)
            case .startTLS:
                let session = try startTLS(link, deadline, &isImpostor)
                link = ClientLink(socket, session: session)
                output.removeAll()
                handshake.tlsStarted(into: &output)
                // In TLS 1.3 a server looks at the client's certificate after the client has finished.
                isAdmitted = false
                try explaining(true) { () throws(BlockError) in try send(link, output, deadline) }
            }
        }
    }

    /// Runs a step; if the server goes away in the first one after TLS began, says what that means: servers with GnuTLS
    /// leave without a word when they refuse a client's certificate.
    private func explaining<T>(_ isFirst: Bool, _ step: () throws(BlockError) -> T) throws(BlockError) -> T {
        do throws(BlockError) {
            return try step()
        } catch {
            guard isFirst, error.kind == .shutdown, !error.message.contains("alert") else { throw error }
            throw BlockError(
                error.kind,
                "\(error.message), when TLS had just begun; it may want a certificate of this client, or refuse the "
                    + "one that it got (client-cert.pem in tls-certificates)")
        }
    }

    /// Establishes TLS and checks that the right server has answered, before another byte is said.
    ///
    /// - Parameter isImpostor: set when another one has answered.
    private func startTLS(_ link: ClientLink, _ deadline: Double, _ isImpostor: inout Bool) throws(BlockError)
        -> TLSSession
    {
        guard let context else { throw BlockError(.invalid, "TLS was not asked for") }
        let session = try context.session(host: hostName)
        while true {
            let result = Result { () throws(BlockError) in try session.handshake() }
            do throws(BlockError) {
                while !session.output.isEmpty {
                    let count = session.output.count
                    try send(link, Array(session.output), deadline)
                    session.removeOutput(count)
                }
            } catch {
                // After a failure, the output only tells the server about it: the failure is what counts.
                guard case .failure = result else { throw error }
            }
            switch result {
            case .failure(let error):
                isImpostor = context.refuses(session)
                throw error
            case .success(let isDone): if isDone { return try checked(session, context, &isImpostor) }
            }
            session.addInput(
                try receive(
                    link, session.inputSpace, deadline,
                    doing: "the TLS handshake; it may not accept the key or certificate that it was shown"))
        }
    }

    private func checked(_ session: TLSSession, _ context: TLSClientContext, _ isImpostor: inout Bool)
        throws(BlockError) -> TLSSession
    {
        do throws(BlockError) {
            try context.check(session)
        } catch {
            isImpostor = true
            throw error
        }
        return session
    }

    private func receive(
        _ link: ClientLink, _ space: UnsafeMutableRawBufferPointer, _ deadline: Double,
        doing: String = "the handshake"
    ) throws(BlockError) -> Int {
        let empty = UnsafeMutableRawBufferPointer(start: nil, count: 0)
        while true {
            try check(deadline)
            switch link.receive(empty, space, waiting: true) {
            case .bytes(let count): return count
            case .closed(let why): throw BlockError(.shutdown, "the server \(why) during \(doing)")
            case .nothing: continue
            }
        }
    }

    private func send(_ link: ClientLink, _ bytes: [UInt8], _ deadline: Double) throws(BlockError) {
        var done = 0
        while done < bytes.count || link.hasOutput {
            try check(deadline)
            let sent = bytes.withUnsafeBytes {
                link.send(UnsafeRawBufferPointer(rebasing: $0[done...]), UnsafeRawBufferPointer(start: nil, count: 0))
            }
            switch sent {
            case .bytes(let count): done += count
            case .closed(let why):
                throw BlockError(.shutdown, "the server \(lastWord(link) ?? why) during the handshake")
            case .full: _ = link.waitForRoom(orInput: false, milliseconds: 100)
            }
        }
    }

    /// Why the server has ended TLS, if it said so before nothing could be sent any more.
    private func lastWord(_ link: ClientLink) -> String? {
        let space = Buffer(count: 4096)
        let empty = UnsafeMutableRawBufferPointer(start: nil, count: 0)
        while true {
            switch link.receive(empty, space.bytes, waiting: false) {
            case .bytes: continue
            case .nothing: return nil
            case .closed(let why): return why.hasPrefix("broke TLS") ? why : nil
            }
        }
    }

    private func check(_ deadline: Double) throws(BlockError) {
        if monotonicSeconds() > deadline {
            throw BlockError(errno: ETIMEDOUT, "waiting for the server during the handshake")
        }
    }
}
