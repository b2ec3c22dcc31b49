// QEMU's guest agent (docs/interop/qemu-ga-ref): freezing and thawing the guest's file systems over its own socket.
import Block
import LinuxIO

/// A connection to the agent in a guest. Used by one thread.
final class GuestAgent {
    private let lines: JSONLines
    private let path: String

    /// Connects and waits until the agent answers: what was said on this socket before does not matter then.
    ///
    /// - Throws: `BlockError` when there is no agent, or it does not answer until the deadline.
    init(_ path: String, deadline: Double) throws(BlockError) {
        self.path = path
        let socket = try connect(to: .unix(path: path), deadline: deadline)
        lines = JSONLines(socket, name: "the guest agent at \(path)")
        // 0xFF ends whatever an earlier client left half-said (guest-sync-delimited).
        let id = Int64(truncatingIfNeeded: monotonicNanoseconds() & 0x7FFF_FFFF)
        let request: JSONValue = ["execute": "guest-sync-delimited", "arguments": ["id": .integer(id)]]
        try lines.send([0xFF] + request.encoded + [UInt8(ascii: "\n")], deadline: deadline)
        while true {
            let line = try lines.line(deadline: deadline)
            let last = line.split(separator: 0xFF, omittingEmptySubsequences: false).last ?? []
            if JSONValue(parsing: last)?["return"] == .integer(id) { return }
        }
    }

    /// Whether an agent answers.
    static func answers(at path: String, seconds: Double) -> Bool {
        (try? GuestAgent(path, deadline: monotonicSeconds() + seconds)) != nil
    }

    private func execute(_ command: String, deadline: Double) throws(BlockError) -> JSONValue {
        let request: JSONValue = ["execute": .text(command)]
        try lines.send(request.encoded + [UInt8(ascii: "\n")], deadline: deadline)
        guard let answer = JSONValue(parsing: try lines.line(deadline: deadline)) else {
            throw BlockError(.corrupt, "\(command) by the guest agent at \(path): the answer is no JSON")
        }
        if let value = answer["return"] { return value }
        let reason = answer["error"]?["desc"]?.string ?? "it does not say why"
        let isUnknown = answer["error"]?["class"]?.string == "CommandNotFound"
        throw BlockError(isUnknown ? .unsupported : .inputOutput, "\(command) by the guest agent at \(path): \(reason)")
    }

    /// Freezes all file systems.
    ///
    /// - Returns: how many.
    /// - Throws: `.unsupported` when the agent does not know how: then nothing is frozen.
    func freeze(deadline: Double) throws(BlockError) -> Int64 {
        try execute("guest-fsfreeze-freeze", deadline: deadline).whole ?? 0
    }

    /// Thaws all file systems, and makes sure of it.
    ///
    /// - Returns: whether there were frozen ones until now.
    func thaw(deadline: Double) throws(BlockError) -> Bool {
        // The agent does one thing after the other: a freeze that was asked for before is over by now.
        if try execute("guest-fsfreeze-status", deadline: deadline).string == "thawed" { return false }
        let count = try execute("guest-fsfreeze-thaw", deadline: deadline).whole
        let status = try execute("guest-fsfreeze-status", deadline: deadline).string
        if status != "thawed" {
            throw BlockError(.inputOutput, "thawing by the guest agent at \(path): it says \(status ?? "nothing")")
        }
        return count != 0
    }
}
