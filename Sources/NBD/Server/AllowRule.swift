// Who may use an export: rules on the address or the credentials of a peer.
public import Block
public import LinuxIO

/// A rule that admits peers. Where an export has rules, a peer that none admits does not learn that it exists.
public enum AllowRule: Sendable, Equatable {
    /// Hosts whose address starts with these bits; v4 rules admit v4 addresses only.
    case network(address: [UInt8], prefixLength: Int)
    /// Processes of a user at a Unix socket.
    case uid(UInt32)
    /// Processes of a group at a Unix socket.
    case gid(UInt32)
    /// A virtual machine by its context id.
    case cid(UInt32)

    /// Parses address=ADDRESS[/BITS], uid=N, gid=N or cid=N.
    ///
    /// - Throws: `.invalid` that shows the forms.
    public init(_ text: String) throws(BlockError) {
        if let rest = text.after("uid="), let id = UInt32(rest) {
            self = .uid(id)
        } else if let rest = text.after("gid="), let id = UInt32(rest) {
            self = .gid(id)
        } else if let rest = text.after("cid="), let id = UInt32(rest) {
            self = .cid(id)
        } else if let rest = text.after("address="), let rule = Self.network(rest) {
            self = rule
        } else {
            throw BlockError(
                .invalid, "\(text) is no rule for clients: give address=ADDRESS[/BITS], uid=N, gid=N or cid=N")
        }
    }

    private static func network(_ text: Substring) -> AllowRule? {
        let parts = text.split(separator: "/", maxSplits: 1, omittingEmptySubsequences: false)
        guard let first = parts.first, let address = IPAddress(String(first)) else { return nil }
        let bits = address.bytes.count * 8
        guard parts.count == 2 else { return .network(address: address.bytes, prefixLength: bits) }
        guard let length = Int(parts[1]), length >= 0, length <= bits else { return nil }
        return .network(address: address.bytes, prefixLength: length)
    }

    /// Whether the rule admits a peer.
    public func admits(_ peer: Peer) -> Bool {
        switch (self, peer) {
        case (.uid(let wanted), .unix(_, let uid, _)): wanted == uid
        case (.gid(let wanted), .unix(_, _, let gid)): wanted == gid
        case (.cid(let wanted), .vsock(let cid, _)): wanted == cid
        case (.network(let network, let length), .ip(let address)):
            network.count == address.bytes.count
                && (0..<length).allSatisfy { bit in
                    (network[bit / 8] ^ address.bytes[bit / 8]) & (0x80 >> UInt8(bit % 8)) == 0
                }
        default: false
        }
    }
}

extension ExportOptions {
    /// Whether the rules admit a peer; without rules everybody is admitted.
    public func admits(_ peer: Peer) -> Bool { allow.isEmpty || allow.contains { $0.admits(peer) } }
}
