// The keys and certificates of a server, read from files, and read again when the files have changed.
public import Block
import CLinux
import COpenSSL
import Glibc
import LinuxIO
public import Logging
import Synchronization

/// How a server deals with TLS (NBD protocol, "TLS support").
public enum TLSPolicy: String, Sendable, CaseIterable {
    /// NBD_OPT_STARTTLS is refused.
    case off
    /// Clients may use TLS.
    case allow
    /// Clients learn nothing before they use TLS.
    case require
}

/// The files that a server's TLS is made of, and what it asks of clients.
public struct TLSServerFiles: Sendable {
    /// A certificate with its issuers behind it, and its key, in PEM; may be the same file.
    public struct CertificateFiles: Sendable, Equatable {
        /// Path of the certificate.
        public var certificate: String
        /// Path of the key.
        public var key: String

        /// A pair of paths.
        public init(certificate: String, key: String) {
            self.certificate = certificate
            self.key = key
        }
    }

    /// Certificates; the first is for clients that ask for no name, or for one that none of the others has (SNI).
    public var certificates: [CertificateFiles] = []
    /// Path of the authorities that clients' certificates are checked against.
    public var authorities: String?
    /// Path of revocation lists for clients' certificates.
    public var revocations: String?
    /// A directory whose ca-cert.pem and ca-crl.pem are used, where no other paths are given, if they are there. Once
    /// they were, they have to stay.
    public var directory: String?
    /// Path of pre-shared keys.
    public var preSharedKeys: String?
    /// Whether clients have to show a certificate; by default exactly where there are authorities.
    public var verification: TLSContext.Verification?

    /// No files yet.
    public init() {}

    /// What clients have to show.
    var effectiveVerification: TLSContext.Verification { verification ?? (authorities == nil ? .off : .required) }

    /// All paths, those of files that need not be there among them.
    var paths: [String] {
        let optional = directory.map { ["\($0)/ca-cert.pem", "\($0)/ca-crl.pem"] } ?? []
        return certificates.flatMap { [$0.certificate, $0.key] }
            + [authorities, revocations, preSharedKeys].compactMap { $0 } + optional
    }

    /// The files with what is in the directory now.
    func resolved() throws(BlockError) -> TLSServerFiles {
        guard let directory, verification != .off else { return self }
        var files = self
        let (authorities, revocations) = ("\(directory)/ca-cert.pem", "\(directory)/ca-crl.pem")
        let (hasAuthorities, hasRevocations) = (try isThere(authorities), try isThere(revocations))
        if files.authorities == nil && hasAuthorities { files.authorities = authorities }
        if files.revocations == nil && hasRevocations { files.revocations = revocations }
        return files
    }
}

/// Whether a directory has an entry of this name, be it one that leads nowhere: whoever put it there meant something.
///
/// - Throws: `BlockError` of the system's reason when nobody can tell.
func isThere(_ path: String) throws(BlockError) -> Bool {
    var status = stat()
    if lstat(path, &status) == 0 { return true }
    if errno == ENOENT { return false }
    throw BlockError(errno: errno, "looking for \(path)")
}

/// Makes contexts for new handshakes. When a file has changed, the next handshake uses what it says now; connections
/// that are there stay as they are.
public final class TLSServer: Sendable {
    /// How clients may use TLS.
    public let policy: TLSPolicy
    /// Whether the kernel may encrypt what is sent, where it can.
    public let offersKernel: Bool
    private let files: TLSServerFiles
    private let log: Logger
    private let state: Locked<State>

    private struct State {
        var context: TLSContext
        /// What the files were when the context was made.
        var used: [FileState]
        /// What they were when making a context failed the last time, and when that was.
        var refused: [FileState]?
        var refusedAt = 0.0
        /// Which of the files in the directory were used.
        var hadAuthorities: Bool
        var hadRevocations: Bool
    }

    /// What tells a file from a later one of the same path.
    private struct FileState: Equatable {
        var device: UInt64 = 0
        var number: UInt64 = 0
        var size: Int64 = 0
        var modified: [Int] = []
        var isThere = false
    }

    /// A server's TLS. The files are read now.
    ///
    /// - Parameter allowsKernel: whether the kernel may encrypt what is sent, where it offers that (kTLS).
    /// - Throws: `BlockError` that names the file and what is wrong with it.
    public init(_ policy: TLSPolicy, files: TLSServerFiles, allowsKernel: Bool = true, log: Logger)
        throws(BlockError)
    {
        // The arguments are parsed, and a large library comes: one's pages make room for the other's.
        dg_forget_startup_pages()
        let used = Self.states(files.paths)
        let now = try files.resolved()
        guard !files.certificates.isEmpty || files.preSharedKeys != nil else {
            throw BlockError(.invalid, "starting TLS: give a certificate and its key, or a file of pre-shared keys")
        }
        if now.authorities == nil && (now.effectiveVerification != .off || now.revocations != nil) {
            throw BlockError(.invalid, "starting TLS: checking clients' certificates needs authorities to trust")
        }
        if files.certificates.isEmpty && files.authorities != nil {
            throw BlockError(
                .invalid, "starting TLS: clients show certificates only to a server that has one, too: give it one")
        }
        self.policy = policy
        self.files = files
        self.log = log
        state = Locked(
            State(
                context: try Self.makeContext(now), used: used, hadAuthorities: now.authorities != nil,
                hadRevocations: now.revocations != nil))
        offersKernel = allowsKernel && dg_kernel_has_tls()
        warnOfReadableSecrets()
        tellWhatIsAsked(now)
    }

    private func tellWhatIsAsked(_ files: TLSServerFiles) {
        var ways: [String] = []
        if files.preSharedKeys != nil { ways.append("a pre-shared key") }
        switch (files.certificates.isEmpty, files.effectiveVerification) {
        case (false, .required): ways.append("a certificate")
        case (false, .optional): ways.append("a certificate or nothing")
        case (false, .off): ways.append("nothing")
        case (true, _): break
        }
        let revocations = files.revocations == nil ? "" : ", which is looked for in revocation lists"
        log.notice("TLS (\(policy.rawValue)): clients show \(ways.joined(separator: ", or "))\(revocations)")
    }

    /// Seconds after which files that were no good are tried again though they have not changed: the reason may have
    /// been elsewhere.
    private static let retrySeconds = 60.0

    /// The context for the next handshake, made anew when files have changed. If what they say now is no good, the old
    /// one stays in use and the log tells why.
    func context() -> TLSContext {
        let now = Self.states(files.paths)
        return state.withLock { state in
            if now == state.used { return state.context }
            if now == state.refused && monotonicSeconds() - state.refusedAt < Self.retrySeconds {
                return state.context
            }
            do throws(BlockError) {
                let resolved = try files.resolved()
                if state.hadAuthorities && resolved.authorities == nil {
                    throw BlockError(.notFound, "the authorities for clients' certificates (ca-cert.pem) are gone")
                }
                if state.hadRevocations && resolved.revocations == nil {
                    throw BlockError(.notFound, "the revocation lists (ca-crl.pem) are gone")
                }
                let context = try Self.makeContext(resolved)
                state.hadAuthorities = resolved.authorities != nil
                state.hadRevocations = resolved.revocations != nil
                // Files that changed while they were read are read once more by the next handshake.
                state.context = context
                state.used = now
                state.refused = nil
                log.notice("TLS: read certificates and keys again, since files have changed")
                tellWhatIsAsked(resolved)
            } catch {
                state.refused = now
                state.refusedAt = monotonicSeconds()
                log.error("TLS: files have changed, but the old certificates and keys stay in use: \(error)")
            }
            return state.context
        }
    }

    /// Reads the files again if they have changed, without waiting for a handshake.
    public func reload() {
        let before = state.withLock { state in
            state.refused = nil
            return state.used
        }
        _ = context()
        if Self.states(files.paths) == before {
            log.notice("TLS: certificates and keys have not changed since they were read")
        }
    }

    private static func states(_ paths: [String]) -> [FileState] {
        paths.map { path in
            var status = stat()
            guard stat(path, &status) == 0 else { return FileState() }
            return FileState(
                device: UInt64(status.st_dev), number: UInt64(status.st_ino), size: Int64(status.st_size),
                modified: [
                    status.st_mtim.tv_sec, status.st_mtim.tv_nsec, status.st_ctim.tv_sec, status.st_ctim.tv_nsec,
                ], isThere: true)
        }
    }

    private static func makeContext(_ files: TLSServerFiles) throws(BlockError) -> TLSContext {
        let keys = try files.preSharedKeys.map { (path) throws(BlockError) in
            try PreSharedKey.parse(readSecretFile(path), name: path)
        }
        let first = try makeContext(files, files.certificates.first, keys ?? [])
        for other in files.certificates.dropFirst() {
            try first.addAlternative(try makeContext(files, other, [], hasKeys: keys != nil))
        }
        return first
    }

    private static func makeContext(
        _ files: TLSServerFiles, _ pair: TLSServerFiles.CertificateFiles?, _ keys: [PreSharedKey],
        hasKeys: Bool = false
    ) throws(BlockError) -> TLSContext {
        let context = try TLSContext(server: true)
        try context.setCiphers(psk: hasKeys || !keys.isEmpty)
        if let pair {
            try context.setCertificate(
                try readSecretFile(pair.certificate), key: try readSecretFile(pair.key),
                name: "\(pair.certificate) with the key \(pair.key)")
        }
        if let path = files.authorities { try context.addAuthorities(try readSecretFile(path), name: path) }
        if let path = files.revocations { try context.addRevocations(try readSecretFile(path), name: path) }
        context.setVerification(files.effectiveVerification)
        for key in keys { try context.addKey(key) }
        return context
    }

    private func warnOfReadableSecrets() {
        for path in files.certificates.map(\.key) + [files.preSharedKeys].compactMap({ $0 }) {
            var status = stat()
            if stat(path, &status) == 0, status.st_mode & S_IFMT == S_IFREG, status.st_mode & 0o006 != 0 {
                log.warning("TLS: every user of this machine can read the secrets in \(path): chmod o= \(path)")
            }
        }
    }
}

/// The bytes of a small file: a certificate, a key, a list.
///
/// - Throws: `BlockError` of the system's reason, `.tooLarge` above 16 MiB.
func readSecretFile(_ path: String) throws(BlockError) -> [UInt8] {
    let number = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY)
    if number < 0 { throw BlockError(errno: errno, "opening \(path)") }
    defer { close(number) }
    var bytes: [UInt8] = []
    var piece = [UInt8](repeating: 0, count: 65536)
    while true {
        let got = read(number, &piece, piece.count)
        if got < 0 && errno == EINTR { continue }
        if got < 0 { throw BlockError(errno: errno, "reading \(path)") }
        if got == 0 { return bytes }
        bytes += piece[..<got]
        if bytes.count > 16 << 20 { throw BlockError(.tooLarge, "reading \(path): it has more than 16 MiB") }
    }
}
