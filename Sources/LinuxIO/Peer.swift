// Who is at the other end of an accepted connection.
import Block
import CLinux
import Glibc

/// An IP address with a port.
public struct IPAddress: Sendable, Equatable, CustomStringConvertible {
    /// 4 or 16 bytes in network order; a v4 address that came in over v6 has 4.
    public let bytes: [UInt8]
    /// The port.
    public let port: UInt16

    init?(_ storage: sockaddr_storage) {
        var storage = storage
        let raw = withUnsafeBytes(of: &storage) { Array($0) }
        port = UInt16(raw[2]) << 8 | UInt16(raw[3])
        switch Int32(storage.ss_family) {
        case AF_INET: bytes = Array(raw[4..<8])
        case AF_INET6:
            let address = Array(raw[8..<24])
            let isMapped = address[..<10].allSatisfy { $0 == 0 } && address[10] == 0xFF && address[11] == 0xFF
            bytes = isMapped ? Array(address[12...]) : address
        default: return nil
        }
    }

    /// An address of 4 or 16 bytes in network order, without a port; nil for another number of bytes.
    public init?(bytes: [UInt8]) {
        guard bytes.count == 4 || bytes.count == 16 else { return nil }
        self.bytes = bytes
        port = 0
    }

    /// Parses an address without a port, v4 or v6; nil if it is none.
    public init?(_ text: String) {
        var buffer = [UInt8](repeating: 0, count: 16)
        port = 0
        if inet_pton(AF_INET, text, &buffer) == 1 {
            bytes = Array(buffer[..<4])
        } else if inet_pton(AF_INET6, text, &buffer) == 1 {
            // Peers that come in over v6 with a v4 address are known by that.
            let isMapped = buffer[..<10].allSatisfy { $0 == 0 } && buffer[10] == 0xFF && buffer[11] == 0xFF
            bytes = isMapped ? Array(buffer[12...]) : buffer
        } else {
            return nil
        }
    }

    /// Whether it is an address of this machine only: 127.0.0.0/8 or ::1.
    public var isLoopback: Bool {
        bytes.count == 4 ? bytes[0] == 127 : bytes.last == 1 && bytes.dropLast().allSatisfy { $0 == 0 }
    }

    public var description: String {
        var text = [CChar](repeating: 0, count: Int(INET6_ADDRSTRLEN))
        let family = bytes.count == 4 ? AF_INET : AF_INET6
        guard inet_ntop(family, bytes, &text, socklen_t(text.count)) != nil else { return "?" }
        return String(decoding: text.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
    }
}

/// The other end of a connection.
public enum Peer: Sendable, Equatable, CustomStringConvertible {
    /// A process on this machine, by the credentials it connected with.
    case unix(pid: Int32, uid: UInt32, gid: UInt32)
    /// A host.
    case ip(IPAddress)
    /// A virtual machine, or this one, by context id.
    case vsock(cid: UInt32, port: UInt32)
    /// Standard input and output, or a socket of a kind that says nothing.
    case inherited

    /// Asks a connected socket.
    public init(socket: Int32) {
        var storage = sockaddr_storage()
        var length = UInt32(MemoryLayout<sockaddr_storage>.size)
        let result = dg_peer_address(socket, &storage, &length)
        var (pid, uid, gid): (Int32, UInt32, UInt32) = (0, 0, 0)
        var (cid, port): (UInt32, UInt32) = (0, 0)
        if result == 0, let address = IPAddress(storage) {
            self = .ip(address)
        } else if result == 0, Int32(storage.ss_family) == AF_UNIX, dg_unix_peer(socket, &pid, &uid, &gid) == 0 {
            self = .unix(pid: pid, uid: uid, gid: gid)
        } else if result == 0, dg_vsock_peer(socket, &cid, &port) == 0 {
            self = .vsock(cid: cid, port: port)
        } else {
            self = .inherited
        }
    }

    /// Whether two connections come from the same address, user or virtual machine; nobody is the same as an unknown.
    public func isSameParty(as other: Peer) -> Bool {
        switch (self, other) {
        case (.unix(_, let uid, _), .unix(_, let otherUID, _)): uid == otherUID
        case (.ip(let address), .ip(let otherAddress)): address.bytes == otherAddress.bytes
        case (.vsock(let cid, _), .vsock(let otherCID, _)): cid == otherCID
        default: false
        }
    }

    public var description: String {
        switch self {
        case .unix(let pid, let uid, _): "unix pid \(pid) uid \(uid)"
        case .ip(let address): address.bytes.count == 4 ? "\(address):\(address.port)" : "[\(address)]:\(address.port)"
        case .vsock(let cid, let port): "vsock \(cid):\(port)"
        case .inherited: "inherited"
        }
    }
}
