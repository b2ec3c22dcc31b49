// The client's side of the handshake as a state machine without I/O: bytes of the server in, bytes and an outcome out.
public import Block

/// The client's side of fixed newstyle negotiation (NBD protocol, "Fixed newstyle negotiation").
///
/// It believes nothing: every length is bounded before anything is kept, every reply must belong to the option that was
/// sent, and their number is limited.
public struct ClientHandshake: Sendable {
    /// What the handshake is for.
    public enum Goal: Sendable, Equatable {
        /// To use an export. The contexts are those that block status will be asked for; nil for all that there are.
        case enter(export: String, contexts: [String]?)
        /// To learn which exports there are.
        case list
    }

    /// What comes after the bytes that were taken.
    public enum Outcome: Equatable {
        /// The output is sent; more bytes from the server are needed.
        case more
        /// TLS begins with the next byte in both directions; `tlsStarted(into:)` goes on behind it.
        case startTLS
        /// The transmission phase begins.
        case ready(ClientAgreement)
        /// The list is complete. The output is sent, then the connection is closed.
        case listed([ExportListing])
    }

    /// The longest reply to an option, in bytes: two strings with room.
    public static let replyLengthMax: UInt32 = 16384
    /// The most replies to one option, but for the list of exports.
    public static let replyCountMax = 1024
    /// The most exports of a list.
    public static let exportCountMax = 10_000

    enum State: Equatable {
        case greeting
        case flags
        case option(UInt32)
        case beforeTLS
        case exportName
        case finished
    }

    let goal: Goal
    private let wantsTLS: Bool
    private var isEncrypted = false
    private var state = State.greeting
    private var noZeroes = false
    private var replyCount = 0
    var mode = HeaderMode.simple
    var contexts: [NegotiatedContext] = []
    var wantedContexts: [String] = []
    var listings: [ExportListing] = []
    var facts: (size: UInt64, flags: NBD.TransmissionFlags)?
    var blockSizes = BlockSizes()
    var exportTitle: String?
    var exportDescription: String?

    /// A handshake that has not begun.
    ///
    /// - Parameter usesTLS: whether nothing but STARTTLS is to be said in clear text. A server that refuses it is an
    ///   error.
    public init(_ goal: Goal, usesTLS: Bool = false) {
        self.goal = goal
        wantsTLS = usesTLS
    }

    /// Takes what has arrived, as far as it is complete, and appends what is to be sent.
    ///
    /// - Returns: the number of bytes taken from the start of the input, and what comes next. Bytes that were not taken
    ///   are given again, with more behind them.
    /// - Throws: `BlockError` that says what the server did; the connection is then of no use.
    public mutating func receive(_ input: UnsafeRawBufferPointer, into output: inout [UInt8]) throws(BlockError)
        -> (consumed: Int, outcome: Outcome)
    {
        var consumed = 0
        while true {
            let rest = UnsafeRawBufferPointer(rebasing: input[consumed...])
            let taken: Int
            var outcome: Outcome?
            switch state {
            case .greeting: taken = try takeGreeting(rest)
            case .flags: taken = try takeFlags(rest, into: &output)
            case .option(let option): (taken, outcome) = try takeReply(rest, option, into: &output)
            case .exportName: (taken, outcome) = try takeExportName(rest)
            case .beforeTLS, .finished: return (consumed, .more)
            }
            consumed += taken
            if let outcome {
                // In clear text anybody may have put these bytes there; behind an agreement nobody asked for them.
                if consumed < input.count {
                    throw BlockError(
                        .corrupt, "\(input.count - consumed) bytes came that nobody asked for, behind the handshake")
                }
                return (consumed, outcome)
            }
            if taken == 0 { return (consumed, .more) }
        }
    }

    /// Goes on after TLS was established. All that was said before is void.
    public mutating func tlsStarted(into output: inout [UInt8]) {
        guard state == .beforeTLS else { return }
        isEncrypted = true
        begin(into: &output)
    }

    // MARK: - Greeting

    private mutating func takeGreeting(_ input: UnsafeRawBufferPointer) throws(BlockError) -> Int {
        guard input.count >= 8 else { return 0 }
        guard input.bigEndian(0) == NBD.initMagic else { throw BlockError(.corrupt, "it is no NBD server") }
        guard input.count >= 16 else { return 0 }
        let magic = input.bigEndian(8, as: UInt64.self)
        if magic == NBD.oldstyleMagic {
            throw BlockError(.unsupported, "it speaks the oldstyle handshake, which has no TLS and no names")
        }
        guard magic == NBD.optionMagic else { throw BlockError(.corrupt, "it is no NBD server") }
        state = .flags
        return 16
    }

    private mutating func takeFlags(_ input: UnsafeRawBufferPointer, into output: inout [UInt8]) throws(BlockError)
        -> Int
    {
        guard input.count >= 2 else { return 0 }
        let flags = input.bigEndian(0, as: UInt16.self)
        guard flags & NBD.HandshakeFlags.fixedNewstyle != 0 else {
            throw BlockError(.unsupported, "it does not speak the fixed newstyle handshake")
        }
        noZeroes = flags & NBD.HandshakeFlags.noZeroes != 0
        output.appendBigEndian(
            UInt32(NBD.HandshakeFlags.fixedNewstyle | (noZeroes ? NBD.HandshakeFlags.noZeroes : 0)))
        if wantsTLS { send(NBD.Option.startTLS, [], into: &output) } else { begin(into: &output) }
        return 2
    }

    /// Sends the first option after the greeting, or after TLS was established.
    private mutating func begin(into output: inout [UInt8]) {
        switch goal {
        case .list: send(NBD.Option.list, [], into: &output)
        case .enter: send(NBD.Option.extendedHeaders, [], into: &output)
        }
    }

    /// Sends an option, whose replies are expected next.
    mutating func send(_ option: UInt32, _ payload: [UInt8], into output: inout [UInt8]) {
        output.appendBigEndian(NBD.optionMagic)
        output.appendBigEndian(option)
        output.appendBigEndian(UInt32(truncatingIfNeeded: payload.count))
        output.append(contentsOf: payload)
        state = option == NBD.Option.exportName ? .exportName : .option(option)
        replyCount = 0
    }

    // MARK: - Replies

    private mutating func takeReply(
        _ input: UnsafeRawBufferPointer, _ option: UInt32, into output: inout [UInt8]
    ) throws(BlockError) -> (Int, Outcome?) {
        guard input.count >= 20 else { return (0, nil) }
        guard input.bigEndian(0) == NBD.optionReplyMagic else {
            throw BlockError(.corrupt, "a reply to \(optionName(option)) has the wrong magic number")
        }
        let answered = input.bigEndian(8, as: UInt32.self)
        guard answered == option else {
            throw BlockError(.corrupt, "it answered option \(answered) when \(optionName(option)) was asked")
        }
        let type = input.bigEndian(12, as: UInt32.self)
        let length = input.bigEndian(16, as: UInt32.self)
        guard length <= Self.replyLengthMax else {
            throw BlockError(.corrupt, "a reply of \(length) bytes to \(optionName(option)) is too long")
        }
        guard input.count >= 20 + Int(length) else { return (0, nil) }
        replyCount += 1
        guard replyCount <= (option == NBD.Option.list ? Self.exportCountMax + 1 : Self.replyCountMax) else {
            throw BlockError(.corrupt, "it gave more than \(replyCount - 1) replies to \(optionName(option))")
        }
        let payload = UnsafeRawBufferPointer(rebasing: input[20..<(20 + Int(length))])
        if type == NBD.OptionReply.errorTLSRequired && !isEncrypted {
            throw BlockError(
                .denied, "it wants TLS: write nbds instead of nbd in the URI\(said(payload))")
        }
        let outcome: Outcome?
        if type == NBD.OptionReply.ack {
            guard payload.isEmpty else {
                throw BlockError(.corrupt, "its consent to \(optionName(option)) has bytes behind it")
            }
            outcome = try acknowledged(option, into: &output)
        } else if type >> 31 == 1 {
            outcome = try refused(option, type, payload, into: &output)
        } else {
            try take(option, type, payload)
            outcome = nil
        }
        return (20 + Int(length), outcome)
    }

    /// The option was done.
    private mutating func acknowledged(_ option: UInt32, into output: inout [UInt8]) throws(BlockError) -> Outcome? {
        switch option {
        case NBD.Option.startTLS:
            state = .beforeTLS
            return .startTLS
        case NBD.Option.extendedHeaders:
            mode = .extended
            askForContexts(into: &output)
        case NBD.Option.structuredReply:
            mode = .structured
            askForContexts(into: &output)
        case NBD.Option.listMetaContext: chooseContexts(into: &output)
        case NBD.Option.setMetaContext: sendGo(into: &output)
        case NBD.Option.go:
            guard let facts else {
                throw BlockError(.corrupt, "it agreed to the export without telling its size")
            }
            return ready(facts.size, facts.flags)
        case NBD.Option.list:
            // So that the server need not guess why the connection ends. Nobody waits for the reply.
            send(NBD.Option.abort, [], into: &output)
            state = .finished
            return .listed(listings)
        default: throw BlockError(.corrupt, "it agreed to \(optionName(option))")
        }
        return nil
    }

    /// The option was refused: another way is tried where there is one.
    private mutating func refused(
        _ option: UInt32, _ type: UInt32, _ payload: UnsafeRawBufferPointer, into output: inout [UInt8]
    ) throws(BlockError) -> Outcome? {
        switch option {
        case NBD.Option.extendedHeaders:
            if type == NBD.OptionReply.errorShutdown { break }
            send(NBD.Option.structuredReply, [], into: &output)
            return nil
        case NBD.Option.structuredReply:
            if type == NBD.OptionReply.errorShutdown { break }
            sendGo(into: &output)
            return nil
        case NBD.Option.listMetaContext, NBD.Option.setMetaContext:
            // Nothing is negotiated then. An unknown export is told of by the option that follows.
            if type == NBD.OptionReply.errorShutdown { break }
            contexts = []
            if type == NBD.OptionReply.errorTooBig && wantedContexts.count > 1 {
                wantedContexts = ["base:allocation"]
                sendContexts(NBD.Option.setMetaContext, wantedContexts, into: &output)
            } else {
                sendGo(into: &output)
            }
            return nil
        case NBD.Option.go:
            guard type == NBD.OptionReply.errorUnsupported, mode != .extended else { break }
            send(NBD.Option.exportName, Array(exportName.utf8), into: &output)
            return nil
        default: break
        }
        throw refusal(option, type, payload)
    }

    /// The agreement with all that was learned on the way.
    private mutating func ready(_ size: UInt64, _ flags: NBD.TransmissionFlags) -> Outcome {
        state = .finished
        var agreement = ClientAgreement(size: size, flags: flags, mode: mode)
        agreement.blockSizes = blockSizes
        agreement.contexts = contexts
        agreement.name = exportTitle
        agreement.exportDescription = exportDescription
        return .ready(agreement)
    }

    /// The answer to NBD_OPT_EXPORT_NAME: no header, and no way to refuse but closing.
    private mutating func takeExportName(_ input: UnsafeRawBufferPointer) throws(BlockError) -> (Int, Outcome?) {
        let length = 10 + (noZeroes ? 0 : 124)
        guard input.count >= length else { return (0, nil) }
        let size = try checkedSize(input.bigEndian(0))
        return (length, ready(size, NBD.TransmissionFlags(rawValue: input.bigEndian(8))))
    }
}
