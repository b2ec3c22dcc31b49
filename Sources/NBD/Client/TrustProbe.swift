// Asks a server for its certificates without trusting it, so that a person can compare them and pin one.
public import Block
import Glibc
public import LinuxIO

/// What a server shows to whoever asks.
public struct ShownCertificates: Sendable {
    /// Whether TLS began with NBD_OPT_STARTTLS; otherwise with the first byte, as HTTPS does.
    public let isNBD: Bool
    /// The certificates, the server's own first.
    public let certificates: [Certificate]
    /// The same certificates in PEM.
    public let pem: [String]
}

extension ShownCertificates {
    /// Seconds that a server has to greet like an NBD server, before TLS is tried with the first byte.
    static let greetingSeconds = 2.0

    /// Connects to a server, shakes hands and leaves. Nothing that it shows is checked.
    ///
    /// - Parameters:
    ///   - hostName: the name to ask for (SNI).
    ///   - seconds: the time limit.
    /// - Throws: `BlockError`: nobody listens, it offers no TLS, or it authenticates without certificates.
    public static func ask(_ address: ServerAddress, hostName: String, seconds: Double = 20) throws(BlockError)
        -> ShownCertificates
    {
        let deadline = monotonicSeconds() + seconds
        let socket = try LinuxIO.connect(to: address, deadline: deadline)
        let link = ClientLink(socket)
        var dialogue = HandshakeDialogue(link, ClientHandshake(.list, usesTLS: true), deadline: deadline)
        do throws(BlockError) {
            let isNBD = link.waitForInput(milliseconds: Int32(min(greetingSeconds, seconds) * 1000))
            if isNBD { try askForTLS(&dialogue) }
            return try shakeHands(dialogue, hostName: hostName, isNBD: isNBD)
        } catch { throw error.during("asking \(address) for its certificate") }
    }

    /// Goes as far as TLS with a server that greets like an NBD server.
    private static func askForTLS(_ dialogue: inout HandshakeDialogue) throws(BlockError) {
        while true {
            try dialogue.receive()
            switch try dialogue.proceed() {
            case .more: continue
            case .startTLS: return
            case .ready, .listed: throw BlockError(.invalid, "it ended the handshake before TLS")
            }
        }
    }

    private static func shakeHands(_ dialogue: borrowing HandshakeDialogue, hostName: String, isNBD: Bool)
        throws(BlockError) -> ShownCertificates
    {
        var options = TLSClientOptions()
        options.verifiesPeer = false
        let session = try TLSClientContext(options).session(host: hostName)
        var failure: BlockError?
        while failure == nil {
            do throws(BlockError) {
                let isDone = try session.handshake()
                try dialogue.sendOutput(of: session)
                if isDone { break }
                session.addInput(try dialogue.receive(into: session.inputSpace, during: "TLS; does it offer that?"))
            } catch { failure = error }
        }
        // A server that wants a certificate from the client has shown its own before it refuses.
        let certificates = session.certificates
        if certificates.isEmpty {
            throw failure ?? BlockError(.notFound, "it shows no certificate; does it use pre-shared keys?")
        }
        session.close()
        try? dialogue.sendOutput(of: session)
        return ShownCertificates(
            isNBD: isNBD, certificates: certificates, pem: certificates.indices.compactMap { session.pem($0) })
    }
}
