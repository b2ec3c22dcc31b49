// QEMU's monitor (QMP, docs/interop/qmp-spec): commands and their answers, one at a time, each with a deadline.
import Block
import CLinux
import LinuxIO

/// A connection to the monitor of a QEMU.
final class QMPClient: Sendable {
    /// Seconds that a command has by default.
    let commandSeconds: Double
    /// Events that are kept until somebody asks for them.
    private static let eventsMax = 1000

    /// What went wrong with a command that QEMU has refused, told apart from a lost connection.
    struct Refusal: Error {
        /// QEMU's class of the error: GenericError, DeviceNotFound, CommandNotFound, ...
        let kind: String
        let description: String
    }

    private struct State {
        let lines: JSONLines
        var next: Int64 = 1
        var events: [JSONValue] = []
        /// Why the connection cannot be used any more.
        var failure: BlockError?
    }

    private let state: Locked<State>
    /// Who is at the other end, for people.
    let name: String
    /// The process at the other end of a Unix socket, and its user and group; nil where that cannot be told.
    let peer: (process: Int32, user: UInt32, group: UInt32)?

    private init(_ socket: Descriptor, name: String, commandSeconds: Double) {
        self.commandSeconds = commandSeconds
        state = Locked(State(lines: JSONLines(socket, name: name)))
        self.name = name
        var (process, user, group): (Int32, UInt32, UInt32) = (0, 0, 0)
        peer = dg_unix_peer(socket.number, &process, &user, &group) == 0 ? (process, user, group) : nil
    }

    /// Connects, and leaves the monitor's negotiation.
    ///
    /// - Throws: `BlockError` when nobody answers there as QEMU does.
    static func connect(
        to address: ServerAddress, seconds: Double = 10, commandSeconds: Double = 30
    ) throws(BlockError) -> QMPClient {
        let deadline = monotonicSeconds() + seconds
        let name = "QEMU's monitor at \(address)"
        let socket = try LinuxIO.connect(to: address, deadline: deadline)
        let client = QMPClient(socket, name: name, commandSeconds: commandSeconds)
        let greeting: [UInt8]
        do throws(BlockError) {
            greeting = try client.state.withLock { (state) throws(BlockError) in
                try state.lines.line(deadline: deadline)
            }
        } catch {
            throw BlockError(
                error.kind,
                "\(error.message) (a monitor talks to one program at a time, give diskgate one of its own; one that "
                    + "wants TLS is not spoken to: put it behind an SSH tunnel)")
        }
        guard let value = JSONValue(parsing: greeting), value["QMP"] != nil else {
            throw BlockError(.invalid, "talking to \(name): it does not greet as QEMU's monitor does")
        }
        _ = try client.execute("qmp_capabilities", seconds: max(deadline - monotonicSeconds(), 1))
        return client
    }

    /// Whether the connection can still be used.
    var isUsable: Bool { state.withLock { $0.failure == nil } }

    /// Runs a command.
    ///
    /// - Returns: what it returned.
    /// - Throws: `.invalid` when QEMU refuses it; `.shutdown` or `.inputOutput` when QEMU is gone or silent, after
    ///   which the connection is of no use.
    @discardableResult
    func execute(_ command: String, _ arguments: JSONValue = [:], seconds: Double? = nil)
        throws(BlockError) -> JSONValue
    {
        switch try attempt(command, arguments, seconds: seconds) {
        case .success(let value): return value
        case .failure(let refusal):
            let kind: BlockError.Kind =
                switch refusal.kind {
                case "DeviceNotFound": .notFound
                case "CommandNotFound": .unsupported
                default: .invalid
                }
            throw BlockError(kind, "\(command) at \(name): \(refusal.description)")
        }
    }

    /// Runs a command that QEMU may refuse.
    ///
    /// - Throws: `BlockError` when QEMU is gone or silent.
    func attempt(_ command: String, _ arguments: JSONValue = [:], seconds: Double? = nil)
        throws(BlockError) -> Result<JSONValue, Refusal>
    {
        try state.withLock { (state) throws(BlockError) in
            if let failure = state.failure { throw failure }
            do throws(BlockError) {
                return try Self.exchange(
                    &state, command, arguments, deadline: monotonicSeconds() + (seconds ?? commandSeconds))
            } catch {
                // An answer that comes late would be taken for the next command's.
                state.failure = error.during(command)
                throw error.during(command)
            }
        }
    }

    private static func exchange(
        _ state: inout State, _ command: String, _ arguments: JSONValue, deadline: Double
    ) throws(BlockError) -> Result<JSONValue, Refusal> {
        let id = state.next
        state.next += 1
        let request: JSONValue = ["execute": .text(command), "arguments": arguments, "id": .integer(id)]
        try state.lines.send(request.encoded + [UInt8(ascii: "\n")], deadline: deadline)
        while true {
            guard let answer = JSONValue(parsing: try state.lines.line(deadline: deadline)) else {
                throw BlockError(.corrupt, "the answer is no JSON")
            }
            if answer["event"] != nil {
                if state.events.count < eventsMax { state.events.append(answer) }
                continue
            }
            // Errors of the parser have no id; they cannot be about anything else than this command.
            if let other = answer["id"], other != .integer(id) {
                throw BlockError(.corrupt, "the answer is one to another command")
            }
            if let value = answer["return"] { return .success(value) }
            guard let error = answer["error"] else { throw BlockError(.corrupt, "the answer is neither good nor bad") }
            return .failure(
                Refusal(
                    kind: error["class"]?.string ?? "", description: error["desc"]?.string ?? "QEMU does not say why"))
        }
    }

    /// Lets go of the monitor, so that others can talk to it. Commands fail from now on.
    func close() {
        state.withLock { state in
            if state.failure == nil { state.failure = BlockError(.shutdown, "the connection to \(name) is closed") }
            state.lines.shut()
        }
    }

    /// The events that have come with answers so far; they are told once.
    func takeEvents() -> [JSONValue] {
        state.withLock { state in
            defer { state.events = [] }
            return state.events
        }
    }
}
