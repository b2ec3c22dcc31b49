// A small NBD client that believes nothing: it parses every reply strictly and throws at the first violation.
import Block
import Glibc
import LinuxIO
import NBD

/// What a server may not do, or that it has gone.
struct Violation: Error, CustomStringConvertible {
    let description: String
    init(_ text: String) { description = text }
}

/// A reply to an option.
struct OptionAnswer: Equatable {
    var type: UInt32
    var payload: [UInt8]
}

/// What NBD_INFO_EXPORT, or NBD_OPT_EXPORT_NAME, tells.
struct ExportFacts: Equatable {
    var size: UInt64
    var flags: NBD.TransmissionFlags
}

/// A client over a connected socket. Requests may be in flight in any number; every reply must belong to one of them.
final class TestClient {
    let socket: Descriptor
    var mode = HeaderMode.simple
    /// Ids of the negotiated contexts by name.
    var contexts: [String: UInt32] = [:]
    /// Requests without a complete answer, and what has come for them.
    var pending: [UInt64: Partial] = [:]

    init(_ socket: Descriptor) {
        self.socket = socket
        var limit = timeval(tv_sec: 30, tv_usec: 0)
        for option in [SO_RCVTIMEO, SO_SNDTIMEO] {
            setsockopt(socket.number, SOL_SOCKET, option, &limit, socklen_t(MemoryLayout<timeval>.size))
        }
    }

    // MARK: - Bytes

    func send(_ bytes: [UInt8]) throws {
        var done = 0
        while done < bytes.count {
            let sent = bytes.withUnsafeBytes {
                Glibc.send(socket.number, $0.baseAddress?.advanced(by: done), bytes.count - done, Int32(MSG_NOSIGNAL))
            }
            if sent < 0 && errno == EINTR { continue }
            if sent <= 0 { throw Violation("sending: \(systemErrorText(errno))") }
            done += sent
        }
    }

    /// Receives exactly so many bytes.
    func receive(_ count: Int) throws -> [UInt8] {
        var buffer = [UInt8](repeating: 0, count: count)
        var done = 0
        while done < count {
            let got = buffer.withUnsafeMutableBytes {
                recv(socket.number, $0.baseAddress?.advanced(by: done), count - done, 0)
            }
            if got < 0 && errno == EINTR { continue }
            if got < 0 { throw Violation("receiving: \(systemErrorText(errno))") }
            if got == 0 { throw Violation("the server closed after \(done) of \(count) bytes") }
            done += got
        }
        return buffer
    }

    /// Whether the server closes without another byte.
    func isClosed() -> Bool {
        var byte: UInt8 = 0
        while true {
            let got = recv(socket.number, &byte, 1, 0)
            if got < 0 && errno == EINTR { continue }
            return got == 0 || (got < 0 && errno == ECONNRESET)
        }
    }

    /// Everything until the server closes.
    func receiveAll() throws -> [UInt8] {
        var all: [UInt8] = []
        var piece = [UInt8](repeating: 0, count: 65536)
        while true {
            let got = recv(socket.number, &piece, piece.count, 0)
            if got < 0 && errno == EINTR { continue }
            if got < 0 && errno != ECONNRESET { throw Violation("receiving: \(systemErrorText(errno))") }
            if got <= 0 { return all }
            all += piece[..<got]
        }
    }

    // MARK: - Handshake

    /// Takes the greeting and answers it.
    func greet(_ flags: UInt32 = 3) throws {
        let greeting = try receive(18)
        guard greeting == bytes(NBD.initMagic, NBD.optionMagic, UInt16(3)) else {
            throw Violation("the greeting is \(greeting)")
        }
        try send(flags.wire)
    }

    static func option(_ option: UInt32, _ payload: [UInt8] = []) -> [UInt8] {
        bytes(NBD.optionMagic, option, UInt32(payload.count), payload)
    }

    /// Receives the replies to an option up to its last one.
    func receiveAnswers(_ option: UInt32) throws -> [OptionAnswer] {
        var answers: [OptionAnswer] = []
        while true {
            let header = try receive(20)
            guard header.number(0) == NBD.optionReplyMagic, header.number(8) == option else {
                throw Violation("a reply to option \(option) begins with \(header)")
            }
            let type: UInt32 = header.number(12)
            answers.append(OptionAnswer(type: type, payload: try receive(Int(header.number(16, as: UInt32.self)))))
            if type == NBD.OptionReply.ack || type & 1 << 31 != 0 { return answers }
        }
    }

    func ask(option: UInt32, _ payload: [UInt8] = []) throws -> [OptionAnswer] {
        try send(Self.option(option, payload))
        return try receiveAnswers(option)
    }

    /// Goes through the handshake in the usual order.
    @discardableResult
    func enter(_ mode: HeaderMode, export: String = "", contexts: [String] = []) throws -> ExportFacts {
        try greet()
        self.mode = mode
        if mode != .simple {
            let option = mode == .extended ? NBD.Option.extendedHeaders : NBD.Option.structuredReply
            guard try ask(option: option).map(\.type) == [NBD.OptionReply.ack] else {
                throw Violation("no \(mode) mode")
            }
        }
        if !contexts.isEmpty {
            for answer in try ask(option: NBD.Option.setMetaContext, Payload.contexts(export, contexts)).dropLast() {
                self.contexts[String(decoding: answer.payload.dropFirst(4), as: UTF8.self)] = answer.payload.number(0)
            }
        }
        let answers = try ask(option: NBD.Option.go, Payload.go(export))
        guard answers.last?.type == NBD.OptionReply.ack,
            let facts = answers.first(where: { $0.payload.number(0) == NBD.Info.export && $0.payload.count == 12 })
        else { throw Violation("going to \"\(export)\": \(answers)") }
        return ExportFacts(size: facts.payload.number(2), flags: .init(rawValue: facts.payload.number(10)))
    }

    // MARK: - Requests

    /// Sends a request, with its payload, and expects an answer to it.
    func submit(_ request: Request, _ payload: [UInt8] = []) throws {
        pending[request.cookie] = Partial(request)
        var message: [UInt8] = []
        request.encode(mode, into: &message)
        try send(message + payload)
    }

    /// Sends one request and waits for its answer.
    func ask(_ request: Request, _ payload: [UInt8] = []) throws -> Answer {
        try submit(request, payload)
        let (cookie, answer) = try receiveAnswer()
        guard cookie == request.cookie else { throw Violation("\(cookie) was answered, not \(request.cookie)") }
        return answer
    }

    func read(_ offset: UInt64, _ length: UInt64, _ flags: NBD.CommandFlags = [], cookie: UInt64 = 7) throws -> Answer {
        try ask(Request(NBD.Command.read, flags: flags, cookie: cookie, offset: offset, length: length))
    }

    func write(_ offset: UInt64, _ data: [UInt8], _ flags: NBD.CommandFlags = [], cookie: UInt64 = 8) throws -> Answer {
        let flags = mode == .extended ? flags.union(.payloadLength) : flags
        let request = Request(
            NBD.Command.write, flags: flags, cookie: cookie, offset: offset, length: UInt64(data.count))
        return try ask(request, data)
    }

    /// Answers to all requests that are in flight.
    func receiveAll(_ count: Int) throws -> [UInt64: Answer] {
        var answers: [UInt64: Answer] = [:]
        for _ in 0..<count {
            let (cookie, answer) = try receiveAnswer()
            answers[cookie] = answer
        }
        return answers
    }

    /// Disconnects in the orderly way and expects the server to close.
    func leave() throws {
        var message: [UInt8] = []
        Request(NBD.Command.disconnect, cookie: 0).encode(mode, into: &message)
        try send(message)
        if !isClosed() { throw Violation("the server did not close after NBD_CMD_DISC") }
    }
}
