// Who counts as one client however many connections it opens, and the byte rate that its connections share.
import Block
import LinuxIO

/// The key of a peer that may have several connections.
enum Party: Hashable, Sendable {
    /// A host, by the bytes of its address.
    case address([UInt8])
    /// A user at Unix sockets.
    case user(UInt32)
    /// A virtual machine.
    case machine(UInt32)
    /// The owner of a certificate, by its subject.
    case certificate(String)
    /// The owner of a pre-shared key, by its identity.
    case key(String)

    /// The party of a peer: what it has proved over TLS, else where it comes from; nil where nothing is known.
    init?(_ peer: Peer, _ identity: TLSIdentity?) {
        if let certificate = identity?.certificate {
            self = .certificate(certificate.subject)
            return
        }
        if let key = identity?.pskIdentity {
            self = .key(key)
            return
        }
        switch peer {
        case .ip(let address): self = .address(address.bytes)
        case .unix(_, let uid, _): self = .user(uid)
        case .vsock(let cid, _): self = .machine(cid)
        case .inherited: return nil
        }
    }
}

/// One rate limit for each party, shared by its connections: opening more of them gains nothing.
final class PartyBuckets: Sendable {
    private struct Entry {
        let bucket: TokenBucket
        var connections = 0
    }

    private let bytesPerSecond: UInt64
    private let entries = Locked<[Party: Entry]>([:])

    init(bytesPerSecond: UInt64) { self.bytesPerSecond = bytesPerSecond }

    /// The bucket of a party for one more connection.
    func enter(_ party: Party?) -> TokenBucket {
        guard let party else { return TokenBucket(bytesPerSecond: bytesPerSecond) }
        return entries.withLock { entries in
            var entry = entries[party] ?? Entry(bucket: TokenBucket(bytesPerSecond: bytesPerSecond))
            entry.connections += 1
            entries[party] = entry
            return entry.bucket
        }
    }

    /// Ends one connection of a party.
    ///
    /// The bucket of a party that has gone stays until it is full again, or connecting anew would be a way to get more.
    func leave(_ party: Party?) {
        guard let party else { return }
        entries.withLock { entries in
            entries[party]?.connections -= 1
            for (party, entry) in entries where entry.connections == 0 && entry.bucket.isFull { entries[party] = nil }
        }
    }

    /// Parties that have a bucket.
    var count: Int { entries.withLock { $0.count } }
}
