// The server's side of the handshake as a state machine without I/O: bytes in, bytes and an outcome out.
import Block
import LinuxIO

/// What client and server agreed on when the transmission phase begins.
public struct Session: Sendable {
    /// The export that was chosen.
    public let export: Export
    /// How messages are framed.
    public let mode: HeaderMode
    /// Ids of the contexts that BLOCK_STATUS answers: indices of `export.contexts`, in the order of the client's
    /// queries.
    public let contexts: [UInt32]
    /// Whether the client may not write, even where the export lets others write.
    public let isReadOnly: Bool

    /// An agreement.
    public init(export: Export, mode: HeaderMode, contexts: [UInt32], isReadOnly: Bool = false) {
        self.isReadOnly = isReadOnly
        self.export = export
        self.mode = mode
        self.contexts = contexts
    }
}

/// The server's side of fixed newstyle negotiation (NBD protocol, "Fixed newstyle negotiation").
public struct ServerHandshake {
    /// What comes after the bytes that were taken.
    public enum Outcome {
        /// More bytes from the client are needed.
        case more
        /// The output is sent, then the connection is closed.
        case close
        /// The output is sent, then the transmission phase begins with the next byte.
        case transmission(Session)
        /// The output is sent, then TLS begins, and `secured` is called before the next byte.
        case startTLS
    }

    /// The longest option that is looked at, in bytes: a name and as many queries as a client can mean in earnest.
    public static let optionLengthMax: UInt32 = 32768
    /// The longest option that is skipped with an answer; a client that announces more is disconnected.
    public static let optionSkipMax: UInt32 = 1 << 20
    /// The most options that a client may send.
    public static let optionCountMax = 256
    /// Bytes of replies after which they are sent before another option is answered.
    public static let outputMax = 65536
    /// The most contexts that a session may have: each costs memory in every block status reply.
    public static let sessionContextsMax = 16
    /// The most queries in one option about meta contexts.
    public static let queryCountMax: UInt32 = 1024

    private enum State {
        case clientFlags
        case options
        case skipping(UInt32)
    }

    private let directory: any ExportDirectory
    private var client: Credentials
    private let tls: TLSPolicy
    private var state = State.clientFlags
    private var hasNoZeroes = false
    private var mode = HeaderMode.simple
    private var optionCount = 0
    /// Whether the client ended the handshake as the protocol has it.
    private(set) var wasAborted = false
    /// What the client was refused last, if anything.
    private(set) var refusal: RefusalReason?
    /// The export's name of the last SET_META_CONTEXT, and the ids it was given.
    private var contextsSet: (export: String, ids: [UInt32])?

    /// A handshake that has not begun.
    public init(directory: any ExportDirectory, client: Credentials, tls: TLSPolicy = .off) {
        self.directory = directory
        self.client = client
        self.tls = tls
    }

    /// Goes on after TLS has begun. Nothing that the client asked for before counts any more: anybody could have said
    /// it in its place. (Only its flags stay, since the protocol has it send them once; all they say is whether 124
    /// zeros follow the answer to NBD_OPT_EXPORT_NAME.)
    public mutating func secured(_ identity: TLSIdentity) {
        client.tls = identity
        refusal = nil
        mode = .simple
        contextsSet = nil
        state = .options
    }

    private var isSecure: Bool { client.tls != nil }

    /// Why an option was refused, where it was TLS that was missing.
    private static let tlsRequired =
        "this server takes connections with TLS only: use nbds:// (QEMU: tls-creds; nbd-client: -x)"
    private static let tlsMissing =
        "this server offers no TLS: use nbd:// if clear text will do, or have it started with --tls"

    /// What the server sends first.
    public static var greeting: [UInt8] {
        var bytes: [UInt8] = []
        bytes.appendBigEndian(NBD.initMagic)
        bytes.appendBigEndian(NBD.optionMagic)
        bytes.appendBigEndian(NBD.HandshakeFlags.fixedNewstyle | NBD.HandshakeFlags.noZeroes)
        return bytes
    }

    /// Takes what has arrived, as far as it is complete, and appends what is to be sent.
    ///
    /// - Returns: the number of bytes taken from the start of the input, and what comes next. Bytes that were not taken
    ///   are given again, with more behind them; at once when some were taken and the output has been sent.
    public mutating func receive(_ input: UnsafeRawBufferPointer, into output: inout [UInt8])
        -> (consumed: Int, outcome: Outcome)
    {
        var consumed = 0
        while true {
            let rest = UnsafeRawBufferPointer(rebasing: input[consumed...])
            switch state {
            case .clientFlags:
                guard rest.count >= 4 else { return (consumed, .more) }
                consumed += 4
                let flags = rest.bigEndian(0, as: UInt32.self)
                let known = UInt32(NBD.HandshakeFlags.fixedNewstyle | NBD.HandshakeFlags.noZeroes)
                if flags & ~known != 0 { return (consumed, .close) }
                hasNoZeroes = flags & UInt32(NBD.HandshakeFlags.noZeroes) != 0
                state = .options
            case .skipping(let left):
                if rest.isEmpty && left > 0 { return (consumed, .more) }
                let now = min(UInt32(clamping: rest.count), left)
                consumed += Int(now)
                state = left == now ? .options : .skipping(left - now)
            case .options:
                guard rest.count >= 16 else { return (consumed, .more) }
                guard rest.bigEndian(0, as: UInt64.self) == NBD.optionMagic else { return (consumed, .close) }
                let option = rest.bigEndian(8, as: UInt32.self)
                let length = rest.bigEndian(12, as: UInt32.self)
                // Every option counts where it is taken, be it skipped or answered.
                let isOneTooMany = optionCount >= Self.optionCountMax
                if length > Self.optionLengthMax {
                    consumed += 16
                    if option == NBD.Option.exportName || length > Self.optionSkipMax || isOneTooMany {
                        return (consumed, .close)
                    }
                    optionCount += 1
                    refuse(option, NBD.OptionReply.errorTooBig, "the option is too long", into: &output)
                    state = .skipping(length)
                    continue
                }
                guard rest.count >= 16 + Int(length) else { return (consumed, .more) }
                consumed += 16 + Int(length)
                if isOneTooMany { return (consumed, .close) }
                optionCount += 1
                let payload = UnsafeRawBufferPointer(rebasing: rest[16..<(16 + Int(length))])
                if let outcome = answer(option, payload, into: &output) {
                    // A client waits for the answer before it starts TLS. What comes with the request already was put
                    // there by somebody else, to be taken for the client's words under TLS (CVE-2021-3716).
                    if case .startTLS = outcome, consumed < input.count { return (consumed, .close) }
                    return (consumed, outcome)
                }
                // What was asked for is sent before more is answered, or a few requests could fill the memory.
                if output.count > Self.outputMax { return (consumed, .more) }
            }
        }
    }

    /// Answers one option; nil when the handshake goes on.
    private mutating func answer(_ option: UInt32, _ payload: UnsafeRawBufferPointer, into output: inout [UInt8])
        -> Outcome?
    {
        if tls == .require && !isSecure && option != NBD.Option.abort && option != NBD.Option.startTLS {
            refusal = .tls
            // There is no other answer to this one than to close.
            if option == NBD.Option.exportName { return .close }
            refuse(option, NBD.OptionReply.errorTLSRequired, Self.tlsRequired, into: &output)
            return nil
        }
        switch option {
        case NBD.Option.exportName: return exportName(payload, into: &output)
        case NBD.Option.abort:
            wasAborted = true
            reply(option, NBD.OptionReply.ack, [], into: &output)
            return .close
        case NBD.Option.startTLS: return startTLS(payload, into: &output)
        case NBD.Option.list: list(payload, into: &output)
        case NBD.Option.info, NBD.Option.go: return informOrGo(option, payload, into: &output)
        case NBD.Option.structuredReply: negotiate(.structured, option, payload, into: &output)
        case NBD.Option.extendedHeaders: negotiate(.extended, option, payload, into: &output)
        case NBD.Option.listMetaContext, NBD.Option.setMetaContext: metaContexts(option, payload, into: &output)
        default: refuse(option, NBD.OptionReply.errorUnsupported, "this option is not known here", into: &output)
        }
        return nil
    }

    /// NBD_OPT_STARTTLS.
    private mutating func startTLS(_ payload: UnsafeRawBufferPointer, into output: inout [UInt8]) -> Outcome? {
        let option = NBD.Option.startTLS
        if isSecure || !payload.isEmpty {
            let text = isSecure ? "TLS is in use already" : "the option has no data"
            refuse(option, NBD.OptionReply.errorInvalid, text, into: &output)
        } else if tls == .off {
            refusal = .tls
            refuse(option, NBD.OptionReply.errorPolicy, Self.tlsMissing, into: &output)
        } else {
            reply(option, NBD.OptionReply.ack, [], into: &output)
            return .startTLS
        }
        return nil
    }

    private func reply(_ option: UInt32, _ type: UInt32, _ payload: [UInt8], into output: inout [UInt8]) {
        output.appendBigEndian(NBD.optionReplyMagic)
        output.appendBigEndian(option)
        output.appendBigEndian(type)
        output.appendBigEndian(UInt32(payload.count))
        output.append(contentsOf: payload)
    }

    private func refuse(_ option: UInt32, _ type: UInt32, _ text: String, into output: inout [UInt8]) {
        reply(option, type, Array(text.utf8), into: &output)
    }

    /// NBD_OPT_STRUCTURED_REPLY and NBD_OPT_EXTENDED_HEADERS: extended headers take precedence once negotiated.
    private mutating func negotiate(
        _ wanted: HeaderMode, _ option: UInt32, _ payload: UnsafeRawBufferPointer, into output: inout [UInt8]
    ) {
        if !payload.isEmpty {
            refuse(option, NBD.OptionReply.errorInvalid, "the option has no data", into: &output)
        } else if mode == wanted {
            refuse(option, NBD.OptionReply.errorInvalid, "negotiated already", into: &output)
        } else if mode == .extended {
            refuse(
                option, NBD.OptionReply.errorExtendedHeadersRequired, "extended headers are negotiated already",
                into: &output)
        } else {
            mode = wanted
            reply(option, NBD.OptionReply.ack, [], into: &output)
        }
    }

    /// NBD_OPT_EXPORT_NAME: it cannot be refused but by closing.
    private mutating func exportName(_ payload: UnsafeRawBufferPointer, into output: inout [UInt8]) -> Outcome {
        guard mode != .extended, payload.count <= NBD.stringLengthMax,
            let name = String(validating: payload, as: UTF8.self),
            let export = directory.export(named: name, for: client)
        else {
            refusal = .export
            return .close
        }
        output.appendBigEndian(export.info.size)
        output.appendBigEndian(flags(export).rawValue)
        if !hasNoZeroes { output.append(contentsOf: repeatElement(0, count: 124)) }
        return .transmission(session(export, name))
    }

    private func flags(_ export: Export) -> NBD.TransmissionFlags {
        export.transmissionFlags(mode, isReadOnly: export.admission(of: client) == .readOnly)
    }

    private func session(_ export: Export, _ name: String) -> Session {
        // Contexts hold for the export they were chosen on, under the name it was asked for.
        let ids = contextsSet?.export == name ? contextsSet?.ids ?? [] : []
        return Session(
            export: export, mode: mode, contexts: ids.filter { Int($0) < export.contexts.count },
            isReadOnly: export.options.isReadOnly || export.admission(of: client) == .readOnly)
    }

    private func list(_ payload: UnsafeRawBufferPointer, into output: inout [UInt8]) {
        if !payload.isEmpty {
            return refuse(NBD.Option.list, NBD.OptionReply.errorInvalid, "the option has no data", into: &output)
        }
        if !directory.mayList(client) {
            let text = "this server does not list its exports to you: name the one you want"
            return refuse(NBD.Option.list, NBD.OptionReply.errorPolicy, text, into: &output)
        }
        for export in directory.exports(for: client) {
            var item: [UInt8] = []
            item.appendBigEndian(UInt32(export.name.utf8.count))
            item.append(contentsOf: export.name.utf8)
            item.append(contentsOf: export.description.utf8)
            reply(NBD.Option.list, NBD.OptionReply.server, item, into: &output)
        }
        reply(NBD.Option.list, NBD.OptionReply.ack, [], into: &output)
    }

    /// The string with a 32-bit length at an offset, or nil if it is malformed or longer than a name may be.
    private func string(_ payload: UnsafeRawBufferPointer, at offset: Int) -> (text: String, end: Int)? {
        guard offset <= payload.count, payload.count - offset >= 4 else { return nil }
        let length = payload.bigEndian(offset, as: UInt32.self)
        guard length <= UInt32(NBD.stringLengthMax), payload.count - offset - 4 >= Int(length) else { return nil }
        let end = offset + 4 + Int(length)
        let bytes = UnsafeRawBufferPointer(rebasing: payload[(offset + 4)..<end])
        guard let text = String(validating: bytes, as: UTF8.self) else { return nil }
        return (text, end)
    }

    private mutating func informOrGo(_ option: UInt32, _ payload: UnsafeRawBufferPointer, into output: inout [UInt8])
        -> Outcome?
    {
        guard let (name, end) = string(payload, at: 0), payload.count - end >= 2,
            payload.count - end - 2 == 2 * Int(payload.bigEndian(end, as: UInt16.self))
        else {
            refuse(option, NBD.OptionReply.errorInvalid, "the request is malformed", into: &output)
            return nil
        }
        guard let export = directory.export(named: name, for: client) else {
            refusal = .export
            refuse(option, NBD.OptionReply.errorUnknown, "there is no such export", into: &output)
            return nil
        }
        let wanted = stride(from: end + 2, to: payload.count, by: 2).map { payload.bigEndian($0, as: UInt16.self) }
        sendInfo(option, export, wanted: wanted, into: &output)
        reply(option, NBD.OptionReply.ack, [], into: &output)
        return option == NBD.Option.go ? .transmission(session(export, name)) : nil
    }

    private func sendInfo(_ option: UInt32, _ export: Export, wanted: [UInt16], into output: inout [UInt8]) {
        var item: [UInt8] = []
        item.appendBigEndian(NBD.Info.export)
        item.appendBigEndian(export.info.size)
        item.appendBigEndian(flags(export).rawValue)
        reply(option, NBD.OptionReply.info, item, into: &output)
        if wanted.contains(NBD.Info.name) {
            item = []
            item.appendBigEndian(NBD.Info.name)
            item.append(contentsOf: export.name.utf8)
            reply(option, NBD.OptionReply.info, item, into: &output)
        }
        if wanted.contains(NBD.Info.description), !export.description.isEmpty {
            item = []
            item.appendBigEndian(NBD.Info.description)
            item.append(contentsOf: export.description.utf8)
            reply(option, NBD.OptionReply.info, item, into: &output)
        }
        item = []
        item.appendBigEndian(NBD.Info.blockSize)
        item.appendBigEndian(export.info.minimumBlock)
        // The protocol allows no preferred size below 512.
        item.appendBigEndian(max(export.info.preferredBlock, export.info.minimumBlock, 512))
        item.appendBigEndian(Export.advertisedPayloadMax)
        reply(option, NBD.OptionReply.info, item, into: &output)
    }

    private mutating func metaContexts(
        _ option: UInt32, _ payload: UnsafeRawBufferPointer, into output: inout [UInt8]
    ) {
        let isSetting = option == NBD.Option.setMetaContext
        if isSetting { contextsSet = nil }
        if mode == .simple {
            return refuse(
                option, NBD.OptionReply.errorInvalid, "negotiate structured replies first", into: &output)
        }
        guard let (name, queries) = contextQueries(payload) else {
            return refuse(option, NBD.OptionReply.errorInvalid, "the request is malformed", into: &output)
        }
        guard let export = directory.export(named: name, for: client) else {
            return refuse(option, NBD.OptionReply.errorUnknown, "there is no such export", into: &output)
        }
        let exact = Set(queries)
        let spaces = exact.filter { $0.hasSuffix(":") }
        let chosen = export.contexts.enumerated().filter { _, context in
            if isSetting { return exact.contains(context.name) }
            return queries.isEmpty || exact.contains(context.name) || spaces.contains { context.isListed(by: $0) }
        }
        if isSetting && chosen.count > Self.sessionContextsMax {
            return refuse(
                option, NBD.OptionReply.errorTooBig, "at most \(Self.sessionContextsMax) contexts at once",
                into: &output)
        }
        for (id, context) in chosen {
            var item: [UInt8] = []
            item.appendBigEndian(isSetting ? UInt32(id) : 0)
            item.append(contentsOf: context.name.utf8)
            reply(option, NBD.OptionReply.metaContext, item, into: &output)
        }
        if isSetting { contextsSet = (name, chosen.map { UInt32($0.offset) }) }
        reply(option, NBD.OptionReply.ack, [], into: &output)
    }

    /// The export's name and the queries of a meta context option, or nil if it is malformed.
    private func contextQueries(_ payload: UnsafeRawBufferPointer) -> (String, [String])? {
        guard let (name, end) = string(payload, at: 0), payload.count - end >= 4 else { return nil }
        let count = payload.bigEndian(end, as: UInt32.self)
        guard count <= Self.queryCountMax else { return nil }
        var queries: [String] = []
        var position = end + 4
        for _ in 0..<count {
            guard let (query, next) = string(payload, at: position) else { return nil }
            queries.append(query)
            position = next
        }
        return position == payload.count ? (name, queries) : nil
    }
}
