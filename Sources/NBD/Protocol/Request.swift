// Requests of the transmission phase: from bytes, and, for clients, to bytes.
import Block

/// How messages of the transmission phase are framed.
@frozen public enum HeaderMode: Sendable, BitwiseCopyable {
    /// Compact requests, simple replies.
    case simple
    /// Compact requests, structured replies.
    case structured
    /// Requests and replies with 64-bit lengths.
    case extended

    /// Bytes of a request header.
    @inlinable public var requestSize: Int { self == .extended ? 32 : 28 }
    /// Bytes of a reply chunk's header; for `.simple`, of the reply's.
    @inlinable public var replySize: Int {
        switch self {
        case .simple: 16
        case .structured: 20
        case .extended: 32
        }
    }
}

/// The header of one request (NBD protocol, "Request message").
public struct Request: BitwiseCopyable, Sendable, Equatable {
    /// How to do it.
    public var flags: NBD.CommandFlags
    /// What to do: one of `NBD.Command`.
    public var command: UInt16
    /// What the client calls the request.
    public var cookie: UInt64
    /// Where, in bytes.
    public var offset: UInt64
    /// How much, in bytes; with a payload, the payload's length.
    public var length: UInt64

    /// A request.
    public init(
        _ command: UInt16, flags: NBD.CommandFlags = [], cookie: UInt64, offset: UInt64 = 0, length: UInt64 = 0
    ) {
        self.command = command
        self.flags = flags
        self.cookie = cookie
        self.offset = offset
        self.length = length
    }

    /// Decodes a header; nil when its magic is wrong, after which nothing on the connection can be trusted.
    ///
    /// - Parameter bytes: at least `mode.requestSize` bytes.
    @inline(__always)
    public init?(_ bytes: UnsafeRawBufferPointer, _ mode: HeaderMode) {
        let isExtended = mode == .extended
        let magic = bytes.bigEndian(0, as: UInt32.self)
        guard magic == (isExtended ? NBD.extendedRequestMagic : NBD.requestMagic) else { return nil }
        flags = NBD.CommandFlags(rawValue: bytes.bigEndian(4))
        command = bytes.bigEndian(6)
        cookie = bytes.bigEndian(8)
        offset = bytes.bigEndian(16)
        length = isExtended ? bytes.bigEndian(24) : UInt64(bytes.bigEndian(24, as: UInt32.self))
    }

    /// Bytes that follow the header (a write's data, a status filter), given how the connection is framed.
    public func payloadLength(_ mode: HeaderMode) -> UInt64 {
        if command == NBD.Command.write { return length }
        return mode == .extended && flags.contains(.payloadLength) ? length : 0
    }

    /// The flags that mean something for the command (NBD protocol, "Command flags"); FUA does for every command. A
    /// command that is not known has all: what is wrong with it is said otherwise.
    @inline(__always)
    func allowedFlags(_ mode: HeaderMode) -> NBD.CommandFlags {
        let base: UInt16 = 1 << 0
        let payload: UInt16 = mode == .extended ? 1 << 5 : 0
        switch command {
        case NBD.Command.read: return NBD.CommandFlags(rawValue: base | payload | (mode == .simple ? 0 : 1 << 2))
        case NBD.Command.writeZeroes: return NBD.CommandFlags(rawValue: base | payload | 1 << 1 | 1 << 4)
        case NBD.Command.blockStatus: return NBD.CommandFlags(rawValue: base | payload | 1 << 3)
        case NBD.Command.write, NBD.Command.flush, NBD.Command.trim, NBD.Command.cache:
            return NBD.CommandFlags(rawValue: base | payload)
        default: return NBD.CommandFlags(rawValue: .max)
        }
    }

    /// Appends the header as a client sends it. In compact mode the length must fit 32 bits.
    public func encode(_ mode: HeaderMode, into output: inout [UInt8]) {
        output.appendBigEndian(mode == .extended ? NBD.extendedRequestMagic : NBD.requestMagic)
        output.appendBigEndian(flags.rawValue)
        output.appendBigEndian(command)
        output.appendBigEndian(cookie)
        output.appendBigEndian(offset)
        if mode == .extended {
            output.appendBigEndian(length)
        } else {
            output.appendBigEndian(UInt32(truncatingIfNeeded: length))
        }
    }
}
