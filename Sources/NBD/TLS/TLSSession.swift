// TLS of one connection over bytes in memory, without I/O: ciphertext in and out, plain bytes out and in.
public import Block
import COpenSSL
import LinuxIO

/// What reading from a session brought.
public enum TLSRead {
    /// This many plain bytes, at least 1.
    case bytes(Int)
    /// More ciphertext has to be received first.
    case wantsInput
    /// The peer said that nothing follows.
    case closed
    /// The peer broke the protocol, or somebody changed its bytes. Nothing more can be read.
    case failed(BlockError)
}

/// One connection's TLS. Used by one thread at a time.
///
/// After each call that handshakes, writes, reads or closes there may be output to send.
public final class TLSSession {
    let handle: OpaquePointer
    private let isServer: Bool
    private let hasKeys: Bool
    /// What the session is to people, put in front of errors.
    private let doing: String

    /// A session that has not begun its handshake.
    ///
    /// - Parameters:
    ///   - host: what a client asks for, and if `checksHost`, what the server's certificate must be for.
    ///   - doing: what is being done, for errors: "starting TLS with HOST".
    public init(_ context: TLSContext, host: String? = nil, checksHost: Bool = true, doing: String)
        throws(BlockError)
    {
        guard let handle = dg_tls_create(context.handle, host, checksHost) else {
            throw BlockError(.noMemory, "\(doing): \(TLSContext.reasons())")
        }
        self.handle = handle
        self.doing = doing
        isServer = context.isServer
        hasKeys = context.hasKeys
    }

    deinit { dg_tls_free(handle) }

    // MARK: - Ciphertext

    /// Ciphertext that is to be sent.
    public var output: UnsafeRawBufferPointer {
        var count = 0
        let start = dg_tls_output(handle, &count)
        return UnsafeRawBufferPointer(start: start, count: count)
    }

    /// Drops output that was sent, from its start.
    public func removeOutput(_ count: Int) { dg_tls_output_sent(handle, count) }

    /// Where to receive ciphertext; empty while the session has more than it can take.
    public var inputSpace: UnsafeMutableRawBufferPointer {
        var room = 0
        let start = dg_tls_input(handle, &room)
        return UnsafeMutableRawBufferPointer(start: start, count: room)
    }

    /// Tells that ciphertext was received into `inputSpace`.
    public func addInput(_ count: Int) { dg_tls_input_received(handle, count) }

    // MARK: - Handshake

    /// Goes on with the handshake.
    ///
    /// - Returns: true when it is done; false when more ciphertext has to be received. Output is to be sent either way.
    /// - Throws: why it failed, with what to do about it. There may be output that tells the peer.
    public func handshake() throws(BlockError) -> Bool {
        switch dg_tls_handshake(handle) {
        case DG_TLS_DONE: return true
        case DG_TLS_WANTS_INPUT, DG_TLS_WANTS_OUTPUT_SENT: return false
        case DG_TLS_CLOSED: throw abandoned()
        default: throw failure()
        }
    }

    /// Why the handshake ends when the peer closes the connection in it, or says that nothing follows.
    func abandoned() -> BlockError {
        // A client whose key is unknown is offered a certificate instead; if it wants none, it goes.
        if dg_tls_psk_was_unknown(handle) { return failure() }
        return BlockError(.denied, "\(doing): the \(isServer ? "client" : "server") ended the handshake")
    }

    /// Why the handshake failed.
    private func failure() -> BlockError {
        var code: Int32 = 0
        let refusal = dg_tls_verify_error(handle, &code).map { String(cString: $0) }
        let reasons = TLSContext.reasons()
        let unknown = dg_tls_psk_was_unknown(handle) ? pskIdentity : nil
        let text = TLSAdvice(isServer: isServer, hasKeys: hasKeys).explain(
            refusal: refusal.map { (code, $0) }, reasons: reasons, unknownIdentity: unknown)
        return BlockError(.denied, "\(doing): \(text)")
    }

    /// Whether the peer's certificate is not good. It counts where certificates are checked.
    var refusesPeer: Bool {
        var code: Int32 = 0
        return dg_tls_verify_error(handle, &code) != nil
    }

    /// The identity that a client named, or nil.
    private var pskIdentity: String? {
        var bytes = [UInt8](repeating: 0, count: 256)
        let count = dg_tls_psk_identity(handle, &bytes, bytes.count)
        if count == 0 { return nil }
        // As files of keys write it: two identities must never become one text.
        let identity = bytes[..<count]
        return String(validating: identity, as: UTF8.self)
            ?? "#" + identity.map { ($0 < 16 ? "0" : "") + String($0, radix: 16) }.joined()
    }

    /// Whether a pre-shared key was used. After the handshake.
    public var usedPreSharedKey: Bool { dg_tls_used_psk(handle) }

    /// Who the peer is. After the handshake.
    public var identity: TLSIdentity {
        TLSIdentity(
            certificate: certificates.first, pskIdentity: isServer && usedPreSharedKey ? pskIdentity : nil,
            version: String(cString: dg_tls_version(handle)), cipher: String(cString: dg_tls_cipher(handle)))
    }

    /// The certificates that the peer showed, its own first. After the handshake.
    public var certificates: [Certificate] {
        (0..<max(0, Int(dg_tls_peer_certificates(handle)))).map { index in
            func text(_ field: dg_cert_field) -> String { String(decoding: bytes(field, index) ?? [], as: UTF8.self) }
            var certificate = Certificate()
            certificate.subject = text(DG_CERT_SUBJECT)
            certificate.issuer = text(DG_CERT_ISSUER)
            certificate.serial = text(DG_CERT_SERIAL)
            certificate.notBefore = text(DG_CERT_NOT_BEFORE)
            certificate.notAfter = text(DG_CERT_NOT_AFTER)
            certificate.commonName = bytes(DG_CERT_COMMON_NAME, index).flatMap(Self.name)
            certificate.sha1 = bytes(DG_CERT_SHA1, index) ?? []
            certificate.sha256 = bytes(DG_CERT_SHA256, index) ?? []
            if index == 0 { certificate.names = names }
            return certificate
        }
    }

    /// A certificate of the peer in PEM; nil where there is none. After the handshake.
    public func pem(_ index: Int) -> String? {
        bytes(DG_CERT_PEM, index).map { String(decoding: $0, as: UTF8.self) }
    }

    private func bytes(_ field: dg_cert_field, _ index: Int) -> [UInt8]? {
        var bytes = [UInt8](repeating: 0, count: 65536)
        let count = dg_tls_peer_field(handle, Int32(clamping: index), field, &bytes, bytes.count)
        return count < 0 ? nil : Array(bytes[..<count])
    }

    /// A name that rules may be compared with: text without a zero byte, which would end it early elsewhere.
    private static func name(_ bytes: [UInt8]) -> String? {
        bytes.isEmpty || bytes.contains(0) ? nil : String(validating: bytes, as: UTF8.self)
    }

    /// The most alternative names that are looked at.
    private static let namesMax = 1024

    private var names: [Certificate.Name] {
        var names: [Certificate.Name] = []
        var bytes = [UInt8](repeating: 0, count: 4096)
        for index in 0..<Self.namesMax {
            var kind = DG_NAME_DNS
            let count = dg_tls_peer_name(handle, Int32(index), &kind, &bytes, bytes.count)
            if count < 0 { break }
            let value = Array(bytes[..<count])
            switch kind {
            case DG_NAME_IP:
                if let address = IPAddress(bytes: value) {
                    names.append(Certificate.Name(kind: .ip, text: address.description))
                }
            case DG_NAME_DNS, DG_NAME_EMAIL, DG_NAME_URI:
                let known: Certificate.Name.Kind = kind == DG_NAME_DNS ? .dns : kind == DG_NAME_EMAIL ? .email : .uri
                if let text = Self.name(value) { names.append(Certificate.Name(kind: known, text: text)) }
            default: continue
            }
        }
        return names
    }

    // MARK: - Plain bytes

    /// Takes what was received and decrypts as much as there is room for.
    public func read(into buffer: UnsafeMutableRawBufferPointer) -> TLSRead {
        var done = 0
        switch dg_tls_read(handle, buffer.baseAddress, buffer.count, &done) {
        case DG_TLS_DONE: return .bytes(done)
        case DG_TLS_WANTS_INPUT, DG_TLS_WANTS_OUTPUT_SENT: return .wantsInput
        case DG_TLS_CLOSED: return .closed
        default: return .failed(failure())
        }
    }

    /// Encrypts bytes into the output.
    ///
    /// - Returns: how many were taken, from the start; fewer than given when the output is full and has to be sent.
    ///   What was not taken is to be given again, with nothing else before it.
    /// - Throws: when the session is broken.
    public func write(_ bytes: UnsafeRawBufferPointer) throws(BlockError) -> Int {
        var done = 0
        switch dg_tls_write(handle, bytes.baseAddress, bytes.count, &done) {
        case DG_TLS_DONE: return done
        case DG_TLS_WANTS_OUTPUT_SENT: return 0
        default: throw failure()
        }
    }

    /// Tells the peer that nothing follows (close_notify).
    public func close() { dg_tls_close(handle) }

    /// Has a faster library encrypt what is written, where there is one that fits. After the handshake, before anything
    /// is written.
    func sealFast() -> Bool { dg_tls_seal_fast(handle) }

    // MARK: - The kernel's TLS

    /// Has the session write to a socket itself, so that the kernel can take over encryption. Before the handshake.
    func offerKernel(_ socket: Int32) -> Bool { dg_tls_offer_kernel(handle, socket) }

    /// After the handshake, once, if the kernel was offered: whether it encrypts what is sent on the socket.
    func kernelSends() -> Bool { dg_tls_kernel_sends(handle) }
}
