// Addresses to connect to, and connecting to them within a limited time.
public import Block
import CLinux
import Glibc

/// An address of a server.
public enum ServerAddress: Sendable, Equatable, CustomStringConvertible {
    /// A Unix socket at a path of 1 to 107 bytes.
    case unix(path: String)
    /// TCP on a host name or address, v4 or v6.
    case tcp(host: String, port: UInt16)
    /// A virtual machine socket: context id (2 is the host) and port.
    case vsock(cid: UInt32, port: UInt32)
    /// A Unix socket on another machine, through ssh.
    case ssh(SSHTarget)
    /// A server that a shell command starts, on its standard input and output.
    case command(String)

    public var description: String {
        switch self {
        case .unix(let path): "unix:\(path)"
        case .tcp(let host, let port): host.contains(":") ? "[\(host)]:\(port)" : "\(host):\(port)"
        case .vsock(let cid, let port): "vsock \(cid):\(port)"
        case .ssh(let target): "\(target.host), unix:\(target.path), with ssh"
        case .command(let command): "the command \(command)"
        }
    }
}

/// Connects to a server. Of a host name's addresses, the first that answers is taken.
///
/// - Parameter deadline: when to give up, by `monotonicSeconds()`. Looking up a name is not limited by it.
/// - Returns: a blocking socket, closed on exec.
/// - Throws: `BlockError` of the system's reason, `.notFound` for a name without an address.
public func connect(to address: ServerAddress, deadline: Double) throws(BlockError) -> Descriptor {
    let doing = "connecting to \(address)"
    switch address {
    case .unix(let path):
        guard (1...107).contains(path.utf8.count), !path.utf8.contains(0) else {
            throw BlockError(.invalid, "\(doing): the path of a Unix socket has 1 to 107 bytes, none of them zero")
        }
        var name = sockaddr_un()
        name.sun_family = sa_family_t(AF_UNIX)
        withUnsafeMutableBytes(of: &name.sun_path) { $0.copyBytes(from: path.utf8) }
        return try connect(AF_UNIX, 0, deadline: deadline, doing: doing) {
            dg_connect($0, &name, UInt32(MemoryLayout<sockaddr_un>.size))
        }
    case .vsock(let cid, let port):
        let doing = "\(doing) (is the vsock module of the kernel loaded?)"
        return try connect(AF_VSOCK, 0, deadline: deadline, doing: doing) { dg_vsock_connect($0, cid, port) }
    case .ssh(let target): return try target.connect()
    case .command(let command): return try ConnectedProcess.start("sh", ["-c", command])
    case .tcp(let host, let port):
        return try connectTCP(host, port, deadline: deadline, doing: doing)
    }
}

/// The addresses of a host, as numbers, in the order to try them.
///
/// - Throws: `.notFound` for a name without an address. How long that takes is the system's affair.
public func numericAddresses(of host: String) throws(BlockError) -> [String] {
    var hints = addrinfo()
    hints.ai_socktype = Int32(SOCK_STREAM.rawValue)
    var found: UnsafeMutablePointer<addrinfo>?
    let result = getaddrinfo(host, nil, &hints, &found)
    if result != 0 {
        throw BlockError(.notFound, "looking up \(host): \(String(cString: gai_strerror(result)))")
    }
    defer { freeaddrinfo(found) }
    var addresses: [String] = []
    var next = found
    while let info = next?.pointee {
        next = info.ai_next
        var text = [CChar](repeating: 0, count: Int(NI_MAXHOST))
        let length = socklen_t(text.count)
        let result = getnameinfo(info.ai_addr, info.ai_addrlen, &text, length, nil, 0, NI_NUMERICHOST)
        let address = String(decoding: text.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
        if result == 0 && !addresses.contains(address) { addresses.append(address) }
    }
    return addresses
}

/// Ends what stands behind a socket of `connect`, where that is a process: at once, not when it notices.
public func abandon(_ socket: Descriptor) { ConnectedProcess.abandon(socket) }

private func connectTCP(_ host: String, _ port: UInt16, deadline: Double, doing: String) throws(BlockError)
    -> Descriptor
{
    var hints = addrinfo()
    hints.ai_socktype = Int32(SOCK_STREAM.rawValue)
    hints.ai_flags = AI_NUMERICSERV
    var found: UnsafeMutablePointer<addrinfo>?
    let result = getaddrinfo(host, String(port), &hints, &found)
    if result != 0 {
        throw BlockError(.notFound, "looking up \(host): \(String(cString: gai_strerror(result)))")
    }
    defer { freeaddrinfo(found) }
    var failure = BlockError(.notFound, "\(doing): the name has no address")
    var next = found
    while let info = next?.pointee {
        next = info.ai_next
        // What is left is shared with the addresses that follow, so that one that is silent leaves time for another.
        let left = max(deadline - monotonicSeconds(), 0.1)
        let limit = monotonicSeconds() + (info.ai_next == nil ? left : left / 2)
        do throws(BlockError) {
            let socket = try connect(info.ai_family, info.ai_protocol, deadline: limit, doing: doing) {
                dg_connect($0, info.ai_addr, info.ai_addrlen)
            }
            setOption(socket.number, Int32(IPPROTO_TCP), TCP_NODELAY, 1)
            setOption(socket.number, SOL_SOCKET, SO_KEEPALIVE, 1)
            return socket
        } catch { failure = error }
    }
    throw failure
}

/// Connects one socket without waiting longer than until the deadline.
///
/// - Parameter start: begins to connect a socket that does not wait; 0 or a negative `errno` value.
private func connect(
    _ family: Int32, _ proto: Int32, deadline: Double, doing: String, _ start: (Int32) -> Int32
) throws(BlockError) -> Descriptor {
    let kind = SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue | SOCK_NONBLOCK.rawValue
    let number = socket(family, Int32(kind), proto)
    if number < 0 { throw BlockError(errno: errno, doing) }
    let descriptor = Descriptor(owning: number)
    var result = start(number)
    // A Unix socket whose queue is full says EAGAIN, and nothing tells when there is room.
    while result == -EAGAIN && monotonicSeconds() < deadline {
        usleep(10_000)
        result = start(number)
    }
    // After a signal, the kernel goes on connecting: to call again would be an error.
    if result == -EINPROGRESS || result == -EINTR {
        try waitUntilWritable(number, deadline: deadline, doing: doing)
        var error: Int32 = 0
        var size = socklen_t(MemoryLayout<Int32>.size)
        getsockopt(number, SOL_SOCKET, SO_ERROR, &error, &size)
        result = -error
    }
    if result < 0 { throw BlockError(errno: -result, doing) }
    descriptor.makeBlocking()
    return descriptor
}

/// Waits until a socket is connected, or has failed to, signals or not.
private func waitUntilWritable(_ number: Int32, deadline: Double, doing: String) throws(BlockError) {
    var ready = pollfd(fd: number, events: Int16(POLLOUT), revents: 0)
    while true {
        let left = min(max(deadline - monotonicSeconds(), 0), 3600)
        let result = poll(&ready, 1, Int32(left * 1000) + 1)
        if result > 0 { return }
        if result < 0 && errno != EINTR { throw BlockError(errno: errno, doing) }
        if monotonicSeconds() >= deadline { throw BlockError(errno: ETIMEDOUT, doing) }
    }
}
