// Replies of the transmission phase: headers to bytes, errors to error values, and, for clients, from bytes.
public import Block

extension BlockError.Kind {
    /// What a client is told (NBD protocol, "Error values").
    public var errorValue: UInt32 {
        switch self {
        case .inputOutput, .corrupt, .changed, .notFound: NBD.ErrorValue.inputOutput
        case .noSpace: NBD.ErrorValue.noSpace
        case .readOnly, .denied: NBD.ErrorValue.notPermitted
        case .outOfRange, .invalid: NBD.ErrorValue.invalid
        case .unsupported: NBD.ErrorValue.notSupported
        case .tooLarge: NBD.ErrorValue.overflow
        case .noMemory: NBD.ErrorValue.noMemory
        case .shutdown: NBD.ErrorValue.shutdown
        }
    }

    /// What a client makes of an error value; every value that is not known is an input/output error.
    public init(errorValue: UInt32) {
        switch errorValue {
        case NBD.ErrorValue.notPermitted: self = .readOnly
        case NBD.ErrorValue.noMemory: self = .noMemory
        case NBD.ErrorValue.invalid: self = .invalid
        case NBD.ErrorValue.noSpace: self = .noSpace
        case NBD.ErrorValue.overflow: self = .tooLarge
        case NBD.ErrorValue.notSupported: self = .unsupported
        case NBD.ErrorValue.shutdown: self = .shutdown
        default: self = .inputOutput
        }
    }
}

/// The header of one reply chunk, or of a simple reply.
public struct ReplyHeader: BitwiseCopyable, Sendable, Equatable {
    /// NBD_REPLY_FLAG_DONE or 0; simple replies are always done.
    public var flags: UInt16
    /// One of `NBD.Chunk`; for simple replies `none`.
    public var type: UInt16
    /// The request's cookie.
    public var cookie: UInt64
    /// Extended replies: the request's offset.
    public var offset: UInt64
    /// Bytes that follow; unknown (0) for simple replies.
    public var length: UInt64
    /// Simple replies: the error value, 0 for none.
    public var error: UInt32 = 0

    /// A chunk's header.
    public init(flags: UInt16, type: UInt16, cookie: UInt64, offset: UInt64, length: UInt64) {
        self.flags = flags
        self.type = type
        self.cookie = cookie
        self.offset = offset
        self.length = length
    }

    /// Stores a chunk's header (structured or extended) at the start of `bytes`, which has room for it.
    @inline(__always)
    public func store(_ mode: HeaderMode, into bytes: UnsafeMutableRawBufferPointer) {
        let isExtended = mode == .extended
        bytes.storeBigEndian(isExtended ? NBD.extendedReplyMagic : NBD.structuredReplyMagic, at: 0)
        bytes.storeBigEndian(flags, at: 4)
        bytes.storeBigEndian(type, at: 6)
        bytes.storeBigEndian(cookie, at: 8)
        if isExtended {
            bytes.storeBigEndian(offset, at: 16)
            bytes.storeBigEndian(length, at: 24)
        } else {
            bytes.storeBigEndian(UInt32(truncatingIfNeeded: length), at: 16)
        }
    }

    /// Stores a simple reply's header in the first 16 bytes.
    @inline(__always)
    public static func storeSimple(error: UInt32, cookie: UInt64, into bytes: UnsafeMutableRawBufferPointer) {
        bytes.storeBigEndian(NBD.simpleReplyMagic, at: 0)
        bytes.storeBigEndian(error, at: 4)
        bytes.storeBigEndian(cookie, at: 8)
    }

    /// Bytes that a header with this magic has; nil for a magic that no reply has.
    public static func size(magic: UInt32) -> Int? {
        switch magic {
        case NBD.simpleReplyMagic: 16
        case NBD.structuredReplyMagic: 20
        case NBD.extendedReplyMagic: 32
        default: nil
        }
    }

    /// Decodes a header as a client does; nil when too short or no reply's magic.
    public init?(_ bytes: UnsafeRawBufferPointer) {
        guard bytes.count >= 4, let size = Self.size(magic: bytes.bigEndian(0)), bytes.count >= size else { return nil }
        if size == 16 {
            self.init(flags: NBD.Chunk.flagDone, type: 0, cookie: bytes.bigEndian(8), offset: 0, length: 0)
            error = bytes.bigEndian(4)
            return
        }
        self.init(
            flags: bytes.bigEndian(4), type: bytes.bigEndian(6), cookie: bytes.bigEndian(8),
            offset: size == 32 ? bytes.bigEndian(16) : 0,
            length: size == 32 ? bytes.bigEndian(24) : UInt64(bytes.bigEndian(16, as: UInt32.self)))
    }
}
