// Reaching a Unix socket on another machine: ssh started with a socket as its standard input and output.
public import Block

/// What is reached through ssh.
public struct SSHTarget: Sendable, Equatable {
    /// The user there; nil for what ssh's configuration says.
    public let user: String?
    /// A host name or address.
    public let host: String
    /// The port of the ssh server; nil for what ssh's configuration says.
    public let port: UInt16?
    /// The Unix socket there.
    public let path: String

    /// A socket on a host.
    ///
    /// - Throws: `.invalid` when a name could be taken for an option, or the path has a zero byte.
    public init(user: String?, host: String, port: UInt16?, path: String) throws(BlockError) {
        let isName = { (text: String) in
            !text.isEmpty && !text.hasPrefix("-")
                && text.unicodeScalars.allSatisfy {
                    $0.isASCII && ($0.properties.isAlphabetic || "0123456789.-_:%".unicodeScalars.contains($0))
                }
        }
        guard isName(host), user.map(isName) ?? true, !path.isEmpty, !path.utf8.contains(0) else {
            throw BlockError(
                .invalid, "connecting with ssh: host, user or path have a form that could be taken for more")
        }
        self.user = user
        self.host = host
        self.port = port
        self.path = path
    }

    /// The arguments behind `ssh`. Nothing of the target can become an option, or a command of the shell over there.
    public var arguments: [String] {
        let quoted = "'" + path.split(separator: "'", omittingEmptySubsequences: false).joined(separator: "'\\''") + "'"
        // Nobody is there to answer questions.
        return ["-T", "-o", "BatchMode=yes"] + (user.map { ["-l", $0] } ?? [])
            + (port.map { ["-p", String($0)] } ?? [])
            + ["--", host, "nc", "-U", "--", quoted]
    }

    /// Starts ssh.
    ///
    /// - Returns: a socket whose other end is the remote one.
    /// - Throws: `BlockError` of the system's reason, for example that there is no ssh.
    func connect() throws(BlockError) -> Descriptor {
        try ConnectedProcess.start("ssh", arguments, hint: " (is openssh-client installed?)")
    }
}
