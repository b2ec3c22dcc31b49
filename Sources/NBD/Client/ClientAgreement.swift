// What a handshake brings to light: the export's facts, and what client and server agreed on.
import Block

/// Limits on the sizes of requests (NBD protocol, "Block size constraints").
public struct BlockSizes: Sendable, Equatable {
    /// Requests start and end at multiples of it: a power of two from 1 to 65536.
    public var minimum: UInt32 = 1
    /// Requests are fastest at multiples of it: a power of two, at least 512 and `minimum`.
    public var preferred: UInt32 = 4096
    /// The most bytes that one read or write may have: at least `preferred`, a multiple of `minimum`.
    public var maximum: UInt32 = 32 << 20

    /// What holds where a server says nothing.
    public init() {}

    /// What a server says, checked.
    ///
    /// - Throws: `.invalid` when the protocol does not allow it.
    init(minimum: UInt32, preferred: UInt32, maximum: UInt32) throws(BlockError) {
        let isValid =
            minimum.nonzeroBitCount == 1 && minimum <= 65536 && preferred.nonzeroBitCount == 1 && preferred >= 512
            && preferred >= minimum && maximum >= preferred && (maximum == .max || maximum % minimum == 0)
        guard isValid else {
            throw BlockError(
                .invalid,
                "it names impossible block sizes: minimum \(minimum), preferred \(preferred), maximum \(maximum)")
        }
        self.minimum = minimum
        // More in one request brings nothing, and servers that name no limit still have one.
        self.maximum = min(maximum, 32 << 20)
        self.preferred = min(preferred, self.maximum)
    }
}

/// A meta context as a server numbers it on one connection.
public struct NegotiatedContext: Sendable, Equatable {
    /// The full name, for example "base:allocation".
    public let name: String
    /// Its number on this connection.
    public let id: UInt32
}

/// What client and server agreed on when the transmission phase begins.
public struct ClientAgreement: Sendable, Equatable {
    /// Bytes on the export, at most 2^63 - 1.
    public var size: UInt64
    /// What the server says one can do.
    public var flags: NBD.TransmissionFlags
    /// How messages are framed.
    public var mode: HeaderMode
    /// Limits on the sizes of requests.
    public var blockSizes = BlockSizes()
    /// The contexts that block status answers.
    public var contexts: [NegotiatedContext] = []
    /// The export's name as the server has it; nil where it says nothing. For people only: cut and cleaned.
    public var name: String?
    /// What the server says about the export. For people only: cut and cleaned.
    public var exportDescription: String?

    /// An agreement without contexts.
    public init(size: UInt64, flags: NBD.TransmissionFlags, mode: HeaderMode) {
        self.size = size
        self.flags = flags
        self.mode = mode
    }

    /// The number of a context by its name.
    func contextID(_ name: String) -> UInt32? { contexts.first { $0.name == name }?.id }

    /// The most bytes that a request without data may concern where nothing is changed (block status).
    var effectMax: UInt64 {
        // Below 2^31, which not every server takes for a positive number.
        mode == .extended ? 32 << 30 : 1 << 30
    }

    /// The most bytes that one zeroing or trimming concerns. It may take a server as long as writing them, and the
    /// answer has to come in time.
    var changeMax: UInt64 { mode == .extended ? 1 << 30 : 256 << 20 }
}

extension ClientAgreement {
    /// What is not as it is here on another connection, which is meant to lead to the same disk; nil if everything is.
    func difference(from other: ClientAgreement) -> String? {
        if other.size != size { return "it had \(size) bytes and now has \(other.size)" }
        if other.flags.contains(.readOnly) != flags.contains(.readOnly) {
            return "whether it may be written has changed"
        }
        if !other.flags.isSuperset(of: flags) { return "the server can do less than before" }
        if other.blockSizes != blockSizes { return "its block sizes have changed" }
        if other.mode != mode { return "the server speaks another form of the protocol than before" }
        // Servers need not say these, but what they say belongs to the disk.
        if let name, let otherName = other.name, name != otherName {
            return "it was called \"\(name)\" and is now called \"\(otherName)\""
        }
        if let text = exportDescription, let otherText = other.exportDescription, text != otherText {
            return "it was described as \"\(text)\" and is now described as \"\(otherText)\""
        }
        let missing = contexts.first { other.contextID($0.name) == nil }
        return missing.map { "its meta context \(printable($0.name, max: 64)) is gone" }
    }
}

/// An export in a server's list. For people, and to be asked for by its name as it is.
public struct ExportListing: Sendable, Equatable {
    /// The name.
    public let name: String
    /// What the server says about it: cut and cleaned.
    public let exportDescription: String
}
