// The numbers of the NBD protocol (doc/proto.md of the NBD project, with its extension-ext-header branch).

/// Numbers that both sides of the NBD protocol agree on.
public enum NBD {
    /// "NBDMAGIC", the first 8 bytes a server sends.
    public static let initMagic: UInt64 = 0x4e42_444d_4147_4943
    /// "IHAVEOPT", before every option.
    public static let optionMagic: UInt64 = 0x4948_4156_454F_5054
    /// In place of "IHAVEOPT": the handshake before newstyle negotiation, which nothing here speaks.
    public static let oldstyleMagic: UInt64 = 0x0000_4202_8186_1253
    /// Before every reply to an option.
    public static let optionReplyMagic: UInt64 = 0x0003_e889_0455_65a9
    /// Before a compact request.
    public static let requestMagic: UInt32 = 0x2560_9513
    /// Before an extended request.
    public static let extendedRequestMagic: UInt32 = 0x21e4_1c71
    /// Before a simple reply.
    public static let simpleReplyMagic: UInt32 = 0x6744_6698
    /// Before a structured reply chunk.
    public static let structuredReplyMagic: UInt32 = 0x668e_33ef
    /// Before an extended reply chunk.
    public static let extendedReplyMagic: UInt32 = 0x6e8a_278c
    /// The port assigned to NBD.
    public static let defaultPort: UInt16 = 10809
    /// The longest string the protocol allows, in bytes ("Values", string fields).
    public static let stringLengthMax = 4096

    /// Handshake flags of server and client.
    public enum HandshakeFlags {
        /// Fixed newstyle negotiation.
        public static let fixedNewstyle: UInt16 = 1
        /// No 124 zeros after NBD_OPT_EXPORT_NAME.
        public static let noZeroes: UInt16 = 2
    }

    /// Options of the handshake.
    public enum Option {
        /// NBD_OPT_EXPORT_NAME
        public static let exportName: UInt32 = 1
        /// NBD_OPT_ABORT
        public static let abort: UInt32 = 2
        /// NBD_OPT_LIST
        public static let list: UInt32 = 3
        /// NBD_OPT_STARTTLS
        public static let startTLS: UInt32 = 5
        /// NBD_OPT_INFO
        public static let info: UInt32 = 6
        /// NBD_OPT_GO
        public static let go: UInt32 = 7
        /// NBD_OPT_STRUCTURED_REPLY
        public static let structuredReply: UInt32 = 8
        /// NBD_OPT_LIST_META_CONTEXT
        public static let listMetaContext: UInt32 = 9
        /// NBD_OPT_SET_META_CONTEXT
        public static let setMetaContext: UInt32 = 10
        /// NBD_OPT_EXTENDED_HEADERS
        public static let extendedHeaders: UInt32 = 11
    }

    /// Types of replies to options.
    public enum OptionReply {
        /// NBD_REP_ACK
        public static let ack: UInt32 = 1
        /// NBD_REP_SERVER
        public static let server: UInt32 = 2
        /// NBD_REP_INFO
        public static let info: UInt32 = 3
        /// NBD_REP_META_CONTEXT
        public static let metaContext: UInt32 = 4
        /// NBD_REP_ERR_UNSUP
        public static let errorUnsupported: UInt32 = 1 << 31 | 1
        /// NBD_REP_ERR_POLICY
        public static let errorPolicy: UInt32 = 1 << 31 | 2
        /// NBD_REP_ERR_INVALID
        public static let errorInvalid: UInt32 = 1 << 31 | 3
        /// NBD_REP_ERR_PLATFORM
        public static let errorPlatform: UInt32 = 1 << 31 | 4
        /// NBD_REP_ERR_TLS_REQD
        public static let errorTLSRequired: UInt32 = 1 << 31 | 5
        /// NBD_REP_ERR_UNKNOWN
        public static let errorUnknown: UInt32 = 1 << 31 | 6
        /// NBD_REP_ERR_SHUTDOWN
        public static let errorShutdown: UInt32 = 1 << 31 | 7
        /// NBD_REP_ERR_BLOCK_SIZE_REQD
        public static let errorBlockSizeRequired: UInt32 = 1 << 31 | 8
        /// NBD_REP_ERR_TOO_BIG
        public static let errorTooBig: UInt32 = 1 << 31 | 9
        /// NBD_REP_ERR_EXT_HEADER_REQD
        public static let errorExtendedHeadersRequired: UInt32 = 1 << 31 | 10
    }

    /// Kinds of information in NBD_REP_INFO.
    public enum Info {
        /// NBD_INFO_EXPORT
        public static let export: UInt16 = 0
        /// NBD_INFO_NAME
        public static let name: UInt16 = 1
        /// NBD_INFO_DESCRIPTION
        public static let description: UInt16 = 2
        /// NBD_INFO_BLOCK_SIZE
        public static let blockSize: UInt16 = 3
    }

    /// Flags of an export.
    public struct TransmissionFlags: OptionSet, Sendable {
        public let rawValue: UInt16
        public init(rawValue: UInt16) { self.rawValue = rawValue }

        /// NBD_FLAG_HAS_FLAGS
        public static let hasFlags = TransmissionFlags(rawValue: 1 << 0)
        /// NBD_FLAG_READ_ONLY
        public static let readOnly = TransmissionFlags(rawValue: 1 << 1)
        /// NBD_FLAG_SEND_FLUSH
        public static let sendFlush = TransmissionFlags(rawValue: 1 << 2)
        /// NBD_FLAG_SEND_FUA
        public static let sendFUA = TransmissionFlags(rawValue: 1 << 3)
        /// NBD_FLAG_ROTATIONAL
        public static let rotational = TransmissionFlags(rawValue: 1 << 4)
        /// NBD_FLAG_SEND_TRIM
        public static let sendTrim = TransmissionFlags(rawValue: 1 << 5)
        /// NBD_FLAG_SEND_WRITE_ZEROES
        public static let sendWriteZeroes = TransmissionFlags(rawValue: 1 << 6)
        /// NBD_FLAG_SEND_DF
        public static let sendDF = TransmissionFlags(rawValue: 1 << 7)
        /// NBD_FLAG_CAN_MULTI_CONN
        public static let canMultiConn = TransmissionFlags(rawValue: 1 << 8)
        /// NBD_FLAG_SEND_CACHE
        public static let sendCache = TransmissionFlags(rawValue: 1 << 10)
        /// NBD_FLAG_SEND_FAST_ZERO
        public static let sendFastZero = TransmissionFlags(rawValue: 1 << 11)
        /// NBD_FLAG_BLOCK_STATUS_PAYLOAD
        public static let blockStatusPayload = TransmissionFlags(rawValue: 1 << 12)
    }

    /// Flags of a request.
    public struct CommandFlags: OptionSet, BitwiseCopyable, Sendable {
        public let rawValue: UInt16
        public init(rawValue: UInt16) { self.rawValue = rawValue }

        /// NBD_CMD_FLAG_FUA: on stable storage before the reply.
        public static let fua = CommandFlags(rawValue: 1 << 0)
        /// NBD_CMD_FLAG_NO_HOLE: zeros stay allocated.
        public static let noHole = CommandFlags(rawValue: 1 << 1)
        /// NBD_CMD_FLAG_DF: one data chunk.
        public static let dontFragment = CommandFlags(rawValue: 1 << 2)
        /// NBD_CMD_FLAG_REQ_ONE: one extent.
        public static let requestOne = CommandFlags(rawValue: 1 << 3)
        /// NBD_CMD_FLAG_FAST_ZERO: fail rather than write zeros.
        public static let fastZero = CommandFlags(rawValue: 1 << 4)
        /// NBD_CMD_FLAG_PAYLOAD_LEN: the header's length is that of a payload.
        public static let payloadLength = CommandFlags(rawValue: 1 << 5)
    }

    /// Commands.
    public enum Command {
        /// NBD_CMD_READ
        public static let read: UInt16 = 0
        /// NBD_CMD_WRITE
        public static let write: UInt16 = 1
        /// NBD_CMD_DISC
        public static let disconnect: UInt16 = 2
        /// NBD_CMD_FLUSH
        public static let flush: UInt16 = 3
        /// NBD_CMD_TRIM
        public static let trim: UInt16 = 4
        /// NBD_CMD_CACHE
        public static let cache: UInt16 = 5
        /// NBD_CMD_WRITE_ZEROES
        public static let writeZeroes: UInt16 = 6
        /// NBD_CMD_BLOCK_STATUS
        public static let blockStatus: UInt16 = 7
    }

    /// Types of reply chunks.
    public enum Chunk {
        /// NBD_REPLY_FLAG_DONE
        public static let flagDone: UInt16 = 1
        /// NBD_REPLY_TYPE_NONE
        public static let none: UInt16 = 0
        /// NBD_REPLY_TYPE_OFFSET_DATA
        public static let offsetData: UInt16 = 1
        /// NBD_REPLY_TYPE_OFFSET_HOLE
        public static let offsetHole: UInt16 = 2
        /// NBD_REPLY_TYPE_BLOCK_STATUS
        public static let blockStatus: UInt16 = 5
        /// NBD_REPLY_TYPE_BLOCK_STATUS_EXT
        public static let blockStatusExtended: UInt16 = 6
        /// NBD_REPLY_TYPE_ERROR
        public static let error: UInt16 = 1 << 15 | 1
        /// NBD_REPLY_TYPE_ERROR_OFFSET
        public static let errorOffset: UInt16 = 1 << 15 | 2
    }

    /// Error values of replies.
    public enum ErrorValue {
        /// NBD_EPERM
        public static let notPermitted: UInt32 = 1
        /// NBD_EIO
        public static let inputOutput: UInt32 = 5
        /// NBD_ENOMEM
        public static let noMemory: UInt32 = 12
        /// NBD_EINVAL
        public static let invalid: UInt32 = 22
        /// NBD_ENOSPC
        public static let noSpace: UInt32 = 28
        /// NBD_EOVERFLOW
        public static let overflow: UInt32 = 75
        /// NBD_ENOTSUP
        public static let notSupported: UInt32 = 95
        /// NBD_ESHUTDOWN
        public static let shutdown: UInt32 = 108
    }
}
