// Addresses to listen on, listening sockets, and who is at the other end of a connection.
public import Block
import CLinux
import Glibc

/// An address to listen on, as given on a command line.
public enum ListenAddress: Sendable, Equatable, CustomStringConvertible {
    /// A Unix socket at a path of at most 107 bytes.
    case unix(path: String)
    /// TCP on a host name or address, v4 or v6; port 0 takes a free one.
    case tcp(host: String, port: UInt16)
    /// A virtual machine socket on a port of this machine.
    case vsock(port: UInt32)

    /// Parses unix:PATH, tcp://HOST:PORT (HOST in brackets if v6; PORT may be missing) or vsock:PORT.
    ///
    /// - Throws: `.invalid` that shows the forms.
    public init(_ text: String, defaultPort: UInt16) throws(BlockError) {
        let bad = BlockError(
            .invalid, "\(text) is no address to listen on: give unix:PATH, tcp://HOST:PORT or vsock:PORT")
        if let path = text.after("unix:") {
            if path.isEmpty || path.utf8.count > 107 || path.utf8.contains(0) {
                throw BlockError(.invalid, "\(text): the path of a Unix socket has 1 to 107 bytes, none of them zero")
            }
            self = .unix(path: String(path))
        } else if let port = text.after("vsock:") {
            let digits = port.after("//:") ?? port.after("//") ?? port
            guard let number: UInt32 = Self.number(digits), number != .max else { throw bad }
            self = .vsock(port: number)
        } else if let rest = text.after("tcp://") ?? text.after("tcp:") {
            guard let (host, port) = Self.hostAndPort(rest, defaultPort: defaultPort) else { throw bad }
            self = .tcp(host: host, port: port)
        } else {
            throw bad
        }
    }

    /// Splits HOST:PORT, [V6]:PORT, HOST or [V6].
    private static func hostAndPort(_ text: Substring, defaultPort: UInt16) -> (String, UInt16)? {
        var host = text
        var port = defaultPort
        if text.first == "[" {
            guard let close = text.firstIndex(of: "]") else { return nil }
            host = text[text.index(after: text.startIndex)..<close]
            let rest = text[text.index(after: close)...]
            if !rest.isEmpty {
                guard let digits = rest.after(":"), let number: UInt16 = Self.number(digits) else { return nil }
                port = number
            }
        } else if let colon = text.lastIndex(of: ":") {
            guard let number: UInt16 = Self.number(text[text.index(after: colon)...]) else { return nil }
            host = text[..<colon]
            port = number
            if host.contains(":") { return nil }
        }
        return (String(host), port)
    }

    /// A number of digits only: integers of Swift take a sign.
    private static func number<T: FixedWidthInteger>(_ text: Substring) -> T? {
        text.utf8.allSatisfy { (UInt8(ascii: "0")...UInt8(ascii: "9")).contains($0) } ? T(text) : nil
    }

    /// Whether only this machine can reach it: a Unix socket, or TCP on a loopback address. A name other than localhost
    /// can mean any address, whatever it looks like.
    public var isLocal: Bool {
        switch self {
        case .unix: true
        case .vsock: false
        case .tcp(let host, _): host == "localhost" || IPAddress(host)?.isLoopback == true
        }
    }

    public var description: String {
        switch self {
        case .unix(let path): "unix:\(path)"
        case .vsock(let port): "vsock:\(port)"
        case .tcp(let host, let port): host.contains(":") ? "tcp://[\(host)]:\(port)" : "tcp://\(host):\(port)"
        }
    }
}

extension StringProtocol {
    /// What follows a prefix, or nil without it.
    public func after(_ prefix: String) -> SubSequence? {
        hasPrefix(prefix) ? self[index(startIndex, offsetBy: prefix.count)...] : nil
    }
}

/// A socket that accepts connections.
public struct ListeningSocket: Sendable {
    /// The socket.
    public let descriptor: Descriptor
    /// Where it listens; a TCP port of 0 is replaced by the one it got.
    public let address: ListenAddress
    /// Whether this process made the socket and so removes a Unix socket's path at the end.
    public let isOwn: Bool

    /// Connections that wait to be accepted; the kernel caps it.
    static let backlog: Int32 = 512

    /// Takes over a socket that systemd or a parent process has bound.
    public init(inherited descriptor: Descriptor) {
        self.descriptor = descriptor
        isOwn = false
        address = boundAddress(descriptor.number) ?? .unix(path: "inherited")
    }

    private init(_ descriptor: Descriptor, _ address: ListenAddress) {
        self.descriptor = descriptor
        self.address = address
        isOwn = true
    }

    /// Listens on an address: one socket, or one for each address that a host name has.
    ///
    /// - Throws: `BlockError` of the system's reason, for example that the address is in use.
    public static func listen(on address: ListenAddress) throws(BlockError) -> [ListeningSocket] {
        switch address {
        case .unix(let path): return [ListeningSocket(try listenUnix(path), address)]
        case .vsock(let port):
            let number = dg_vsock_listen(port, backlog)
            if number < 0 {
                throw BlockError(errno: -number, "listening on \(address) (is the vsock module of the kernel loaded?)")
            }
            return [ListeningSocket(Descriptor(owning: number), address)]
        case .tcp(let host, let port): return try listenTCP(host, port, address)
        }
    }

    private static func listenUnix(_ path: String) throws(BlockError) -> Descriptor {
        let doing = "listening on unix:\(path)"
        let number = socket(AF_UNIX, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue), 0)
        if number < 0 { throw BlockError(errno: errno, doing) }
        let descriptor = Descriptor(owning: number)
        var name = sockaddr_un()
        name.sun_family = sa_family_t(AF_UNIX)
        withUnsafeMutableBytes(of: &name.sun_path) { $0.copyBytes(from: path.utf8.prefix($0.count - 1)) }
        let size = UInt32(MemoryLayout<sockaddr_un>.size)
        var result = dg_bind(number, &name, size)
        if result == -EADDRINUSE && isAbandonedSocket(path) {
            unlink(path)
            result = dg_bind(number, &name, size)
        }
        if result < 0 { throw BlockError(errno: -result, doing) }
        if Glibc.listen(number, backlog) < 0 { throw BlockError(errno: errno, doing) }
        return descriptor
    }

    private static func listenTCP(_ host: String, _ port: UInt16, _ address: ListenAddress) throws(BlockError)
        -> [ListeningSocket]
    {
        var hints = addrinfo()
        hints.ai_flags = AI_PASSIVE
        hints.ai_socktype = Int32(SOCK_STREAM.rawValue)
        var found: UnsafeMutablePointer<addrinfo>?
        let name: String? = host.isEmpty || host == "*" ? nil : host
        let result = getaddrinfo(name, String(port), &hints, &found)
        if result != 0 {
            throw BlockError(.notFound, "looking up \(host): \(String(cString: gai_strerror(result)))")
        }
        defer { freeaddrinfo(found) }
        var sockets: [ListeningSocket] = []
        var failure = BlockError(.notFound, "listening on \(address): the name has no address")
        var next = found
        while let info = next?.pointee {
            next = info.ai_next
            do throws(BlockError) {
                let descriptor = try listenTCP(info, address)
                sockets.append(ListeningSocket(descriptor, boundAddress(descriptor.number) ?? address))
                // A free port is chosen once; the other families of the name would get other ports.
                if port == 0 { break }
            } catch { failure = error }
        }
        if sockets.isEmpty { throw failure }
        return sockets
    }

    private static func listenTCP(_ info: addrinfo, _ address: ListenAddress) throws(BlockError) -> Descriptor {
        let doing = "listening on \(address)"
        let number = socket(info.ai_family, info.ai_socktype | Int32(SOCK_CLOEXEC.rawValue), info.ai_protocol)
        if number < 0 { throw BlockError(errno: errno, doing) }
        let descriptor = Descriptor(owning: number)
        setOption(number, SOL_SOCKET, SO_REUSEADDR, 1)
        // v4 and v6 are bound as separate sockets, whatever the system's default is.
        if info.ai_family == AF_INET6 { setOption(number, Int32(IPPROTO_IPV6), IPV6_V6ONLY, 1) }
        let result = dg_bind(number, info.ai_addr, info.ai_addrlen)
        if result < 0 { throw BlockError(errno: -result, doing) }
        if Glibc.listen(number, backlog) < 0 { throw BlockError(errno: errno, doing) }
        return descriptor
    }
}

/// Whether a path was left by a process that is gone: it is a socket's, and no process has that socket. A server does
/// not notice that it was asked for.
public func isAbandonedSocket(_ path: String) -> Bool {
    var status = stat()
    guard path.utf8.count < 108, lstat(path, &status) == 0, status.st_mode & S_IFMT == S_IFSOCK else { return false }
    var name = sockaddr_un()
    name.sun_family = sa_family_t(AF_UNIX)
    withUnsafeMutableBytes(of: &name.sun_path) { $0.copyBytes(from: path.utf8.prefix($0.count - 1)) }
    // A socket of another type than servers have: it is refused as such where there is a server (EPROTOTYPE), which
    // hears nothing of it. A connection that is closed at once is an error to some, and a monitor takes only one.
    let probe = socket(AF_UNIX, Int32(SOCK_DGRAM.rawValue | SOCK_CLOEXEC.rawValue | SOCK_NONBLOCK.rawValue), 0)
    if probe < 0 { return false }
    defer { close(probe) }
    return dg_connect(probe, &name, UInt32(MemoryLayout<sockaddr_un>.size)) == -ECONNREFUSED
}

/// Sets an integer socket option; a failure only costs the improvement that the option brings.
public func setOption(_ socket: Int32, _ level: Int32, _ option: Int32, _ value: Int32) {
    var value = value
    setsockopt(socket, level, option, &value, socklen_t(MemoryLayout<Int32>.size))
}

/// Where a listening socket is bound, nil for families that are not known here.
func boundAddress(_ socket: Int32) -> ListenAddress? {
    var storage = sockaddr_storage()
    var length = UInt32(MemoryLayout<sockaddr_storage>.size)
    if dg_local_address(socket, &storage, &length) < 0 { return nil }
    switch Int32(storage.ss_family) {
    case AF_UNIX:
        let offset = MemoryLayout<sa_family_t>.size
        let path = withUnsafeBytes(of: &storage) {
            String(decoding: $0[offset..<max(offset, Int(length))].prefix { $0 != 0 }, as: UTF8.self)
        }
        return .unix(path: path)
    case AF_INET, AF_INET6:
        guard let peer = IPAddress(storage) else { return nil }
        return .tcp(host: peer.description, port: peer.port)
    default: return nil
    }
}
