// The transports by name, and an order of preference among them: what users write as san:hotadd:nbdssl:nbd:file.
public import Block
import NBD

/// A way on which the bytes of a disk come to this machine.
public enum TransportKind: String, Codable, CaseIterable, Sendable, CustomStringConvertible {
    /// From the LUNs that the datastore lies on, past the host.
    case san
    /// From a disk that was added to the virtual machine that this proxy is.
    case hotadd
    /// From a server on the network, over TLS.
    case nbdssl
    /// From a server on the network, in clear text.
    case nbd
    /// From a file or block device of this machine.
    case file

    public var description: String { rawValue }
}

/// Transports in the order in which they are wanted. Those that are missing are not to be used.
public struct TransportOrder: Codable, Sendable, Equatable, CustomStringConvertible {
    /// The transports, each at most once, at least one.
    public let kinds: [TransportKind]

    /// All of them, the fastest first.
    public static let standard = TransportOrder(kinds: TransportKind.allCases)

    private init(kinds: [TransportKind]) { self.kinds = kinds }

    /// Takes names with colons between them apart.
    ///
    /// - Throws: `.invalid` for a name that is none, for none, or for one that is there twice; it lists the names.
    public init(_ text: String) throws(BlockError) {
        let known = TransportKind.allCases.map(\.rawValue).joined(separator: ", ")
        var kinds: [TransportKind] = []
        for name in text.split(separator: ":", omittingEmptySubsequences: false) {
            guard let kind = TransportKind(rawValue: name.lowercased()) else {
                throw BlockError(
                    .invalid,
                    "reading the order of transports \(text): \(name.isEmpty ? "an empty name" : name) is no transport "
                        + "(there are \(known); write them with colons between, san:hotadd:nbdssl)")
            }
            if kinds.contains(kind) {
                throw BlockError(.invalid, "reading the order of transports \(text): \(kind) is there twice")
            }
            kinds.append(kind)
        }
        self.kinds = kinds
    }

    /// The names with colons between them.
    public var description: String { kinds.map(\.rawValue).joined(separator: ":") }

    public init(from decoder: any Decoder) throws {
        self = try TransportOrder(try decoder.singleValueContainer().decode(String.self))
    }

    public func encode(to encoder: any Encoder) throws {
        var container = encoder.singleValueContainer()
        try container.encode(description)
    }
}

extension SourceReference {
    /// The transport by which the source's bytes come; nil for those that come from nowhere else: patterns, memory,
    /// restore points.
    public var transport: TransportKind? {
        switch kind {
        case .path: .file
        case .nbd(let uri): uri.tls == nil ? .nbd : .nbdssl
        case .hotAdd: .hotadd
        // A LUN is a LUN, whoever speaks iSCSI with it.
        case .san, .iscsi: .san
        case .pattern, .memory, .point: nil
        }
    }
}
