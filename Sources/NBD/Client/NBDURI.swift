// NBD URIs (doc/uri.md of the NBD project) with libnbd's parameters and ours: text in, checked values out.
public import Block
public import LinuxIO

/// An export on a server, as an NBD URI names it.
public struct NBDURI: Sendable, Equatable, CustomStringConvertible {
    /// Where the server is.
    public var address: ServerAddress
    /// The export's name; "" means the server's default export.
    public var exportName = ""
    /// TLS, if the scheme asks for it; nil is a connection in clear text.
    public var tls: TLSClientOptions?
    /// The most connections, 1 to 16; fewer where the server allows no several.
    public var connectionsMax = 4
    /// Seconds that the server has to answer one request, 1 to 3600.
    public var timeoutSeconds = 120
    /// Seconds for which a lost connection is tried again, 0 to 86400; 0 is never.
    public var reconnectSeconds = 60
    /// What format= says of the export's content.
    public var format: String?

    /// The schemes of NBD URIs that can be opened.
    public static let schemes: Set<String> = [
        "nbd", "nbds", "nbd+unix", "nbds+unix", "nbd+vsock", "nbds+vsock", "nbd+ssh", "nbd+command",
    ]

    /// The server and the export, as a URI without parameters that change what is reached: what is not plain text is
    /// encoded, so nothing in it steers a terminal.
    public var description: String {
        let name = Self.encoded(exportName)
        let scheme = tls == nil ? "nbd" : "nbds"
        switch address {
        case .unix(let path): return "\(scheme)+unix:///\(name)?socket=\(Self.encoded(path))"
        case .tcp(let host, let port):
            let authority = host.contains(":") ? "[\(host)]" : host
            return "\(scheme)://\(authority)\(port == NBD.defaultPort ? "" : ":\(port)")/\(name)"
        case .command(let command): return "\(Self.commandPrefix)\(printable(command))"
        case .vsock(let cid, let port): return "\(scheme)+vsock://\(cid):\(port)/\(name)"
        case .ssh(let target):
            let host = target.host.contains(":") ? "[\(target.host)]" : target.host
            let authority = (target.user.map { "\($0)@" } ?? "") + host + (target.port.map { ":\($0)" } ?? "")
            return "\(scheme)+ssh://\(authority)/\(name)?socket=\(Self.encoded(target.path))"
        }
    }

    /// A name as it is written in a URI: every byte that could mean something else there as %XX.
    public static func encoded(_ name: String) -> String {
        var text = ""
        for byte in name.utf8 {
            let scalar = Unicode.Scalar(byte)
            let isPlain =
                scalar.isASCII && (scalar.properties.isAlphabetic || "0123456789-._~/:".unicodeScalars.contains(scalar))
            text +=
                isPlain
                ? String(Character(scalar)) : "%" + (byte < 16 ? "0" : "") + String(byte, radix: 16, uppercase: true)
        }
        return text
    }

    /// An export at an address, in clear text.
    public init(_ address: ServerAddress, exportName: String = "") {
        self.address = address
        self.exportName = exportName
    }

    private static let commandPrefix = "nbd+command:"

    /// Parses an NBD URI; or nbd+command: with a shell command behind it, as it is, which starts a server on its
    /// standard input and output.
    ///
    /// - Throws: `.invalid` that says what is wrong with it.
    public init(_ text: String) throws(BlockError) {
        if let command = text.after(Self.commandPrefix) {
            guard !command.allSatisfy(\.isWhitespace), !command.utf8.contains(0) else {
                throw BlockError(.invalid, "opening \(text): give a shell command behind \(Self.commandPrefix)")
            }
            address = .command(String(command))
            // Each connection would be a server of its own, and the next one knows nothing of the last one's writes.
            connectionsMax = 1
            reconnectSeconds = 0
            return
        }
        let parts = try URIParts(text)
        guard Self.schemes.contains(parts.scheme) else {
            throw parts.bad("\(parts.scheme): is none of \(Self.schemes.sorted().joined(separator: ", "))")
        }
        let scheme = parts.scheme.split(separator: "+", omittingEmptySubsequences: false)
        let hasSocket = scheme.last == "unix" || scheme.last == "ssh"
        address = try Self.address(parts, kind: scheme.count == 2 ? scheme[1] : "")
        exportName = parts.path
        if exportName.utf8.count > NBD.stringLengthMax {
            throw parts.bad("the export's name has more than \(NBD.stringLengthMax) bytes")
        }
        if scheme[0] == "nbds" {
            var settings = TLSClientOptions()
            settings.identity = parts.user
            tls = settings
        } else if parts.user != nil && scheme.last != "ssh" {
            throw parts.bad("a user's name in front of the @ needs TLS: write nbds")
        }
        for (key, value) in parts.query where !(hasSocket && key == "socket") {
            try set(key, value, parts)
        }
    }

    private static func address(_ parts: URIParts, kind: Substring) throws(BlockError) -> ServerAddress {
        if kind == "unix" {
            let paths = parts.query.filter { $0.key == "socket" }
            guard paths.count == 1, let path = paths.first?.value, (1...107).contains(path.utf8.count) else {
                throw parts.bad("give the server's Unix socket as ?socket=PATH, of at most 107 bytes")
            }
            // libnbd, too, takes none: nbd+unix://NAME would look like an export's name and be a host's.
            if !parts.host.isEmpty || parts.port != nil { throw parts.bad("write nbd+unix:///EXPORT?socket=PATH") }
            return .unix(path: path)
        }
        if kind == "ssh" {
            let paths = parts.query.filter { $0.key == "socket" }
            guard paths.count == 1, let path = paths.first?.value else {
                throw parts.bad("give the Unix socket of the server there as ?socket=PATH")
            }
            let port = try parts.port.map { (digits) throws(BlockError) in
                guard let port = decimal(digits, as: UInt16.self), port > 0 else {
                    throw parts.bad("the port is no number")
                }
                return port
            }
            return .ssh(try SSHTarget(user: parts.user, host: parts.host, port: port, path: path))
        }
        if kind == "vsock" {
            guard let cid = decimal(parts.host, as: UInt32.self) else {
                throw parts.bad("give the machine's context id: nbd+vsock://CID:PORT/EXPORT")
            }
            guard let port = decimal(parts.port ?? "\(NBD.defaultPort)", as: UInt32.self) else {
                throw parts.bad("the port is no number")
            }
            return .vsock(cid: cid, port: port)
        }
        if parts.host.isEmpty { throw parts.bad("a host is missing") }
        guard let port = decimal(parts.port ?? "\(NBD.defaultPort)", as: UInt16.self), port > 0 else {
            throw parts.bad("the port is no number from 1 to 65535")
        }
        return .tcp(host: parts.host, port: port)
    }

    private mutating func set(_ key: String, _ value: String, _ parts: URIParts) throws(BlockError) {
        func number(_ range: ClosedRange<Int>) throws(BlockError) -> Int {
            guard let number = decimal(value, as: Int.self), range.contains(number) else {
                throw parts.bad("\(key) is a number from \(range.lowerBound) to \(range.upperBound)")
            }
            return number
        }
        switch key {
        case "connections": connectionsMax = try number(1...16)
        case "timeout": timeoutSeconds = try number(1...3600)
        case "reconnect": reconnectSeconds = try number(0...86400)
        case "format": format = value
        case "tls-certificates", "tls-psk-file", "tls-hostname", "tls-verify-peer", "fingerprint":
            guard var settings = tls else {
                throw parts.bad("\(key) needs TLS, which this scheme does not have: write nbds")
            }
            try Self.set(key, value, &settings, parts)
            tls = settings
        default: throw parts.bad("the parameter \(printable(key, max: 64)) means nothing here")
        }
    }

    private static func set(_ key: String, _ value: String, _ tls: inout TLSClientOptions, _ parts: URIParts)
        throws(BlockError)
    {
        if value.isEmpty { throw parts.bad("\(key) is empty") }
        switch key {
        case "tls-certificates": tls.certificates = value
        case "tls-psk-file": tls.preSharedKeys = value
        case "tls-hostname": tls.hostName = value
        case "tls-verify-peer":
            switch value {
            case "true", "1": tls.verifiesPeer = true
            case "false", "0": tls.verifiesPeer = false
            default: throw parts.bad("tls-verify-peer is true or false")
            }
        default:
            for item in value.split(separator: ",", omittingEmptySubsequences: false) {
                tls.fingerprints.append(try Fingerprint(String(item)))
            }
        }
    }
}

/// Digits only, as a number: integers of Swift take a sign.
private func decimal<T: FixedWidthInteger>(_ text: String, as type: T.Type) -> T? {
    text.utf8.allSatisfy { (UInt8(ascii: "0")...UInt8(ascii: "9")).contains($0) } ? T(text) : nil
}
