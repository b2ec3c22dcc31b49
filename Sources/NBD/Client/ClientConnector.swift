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
        var dialogue = HandshakeDialogue(
            ClientLink(socket), ClientHandshake(goal, usesTLS: context != nil), deadline: deadline)
        var isAdmitted = true
        while true {
            try explaining(!isAdmitted) { () throws(BlockError) in try dialogue.receive() }
            isAdmitted = true
            let outcome = try dialogue.proceed()
            switch outcome {
            case .more: continue
            case .ready, .listed: return (dialogue.link, outcome)
            case .startTLS:
                let session = try startTLS(dialogue, &isImpostor)
                // In TLS 1.3 a server looks at the client's certificate after the client has finished.
                isAdmitted = false
                try explaining(true) { () throws(BlockError) in
                    try dialogue.tlsStarted(over: ClientLink(socket, session: session))
                }
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
    private func startTLS(_ dialogue: borrowing HandshakeDialogue, _ isImpostor: inout Bool) throws(BlockError)
        -> TLSSession
    {
        guard let context else { throw BlockError(.invalid, "TLS was not asked for") }
        let session = try context.session(host: hostName)
        while true {
            let result = Result { () throws(BlockError) in try session.handshake() }
            do throws(BlockError) {
                try dialogue.sendOutput(of: session)
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
                try dialogue.receive(
                    into: session.inputSpace,
                    during: "the TLS handshake; it may not accept the key or certificate that it was shown"))
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
}
