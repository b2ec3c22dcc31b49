// libvirt through virsh: a process of its own can be ended when it hangs, and no library is loaded into everything.
import Block
import LinuxIO

/// A connection URI of libvirt, and the program that speaks to it. One virsh is started for all commands, with the
/// first of them: nearly all that a virsh costs is its start.
final class Virsh: Sendable, Equatable {
    /// What became of a command.
    struct Answer {
        let isGood: Bool
        /// Its standard output, without the blank lines around it.
        let output: String
        /// What it has complained of, without `error:`.
        let errors: String
    }

    /// For virsh -c.
    let uri: String
    private let shell = Locked<VirshShell?>(nil)

    /// Seconds that a command has by default.
    static let commandSeconds = 60.0
    /// Messages are looked at, so they have to be in English, and what reads commands must not know other keys.
    static let environment = ["LC_ALL=C", "TERM=dumb", "INPUTRC=/dev/null", "VIRSH_DEBUG=4"]

    /// Nothing is started yet.
    init(uri: String) { self.uri = uri }

    static func == (one: Virsh, other: Virsh) -> Bool { one.uri == other.uri }

    /// Runs a command that must succeed.
    ///
    /// - Returns: its standard output.
    /// - Throws: `BlockError` with what virsh has said.
    func run(_ words: [String], seconds: Double = commandSeconds) throws(BlockError) -> String {
        let answer = try attempt(words, seconds: seconds)
        guard answer.isGood else {
            throw BlockError(
                Self.kind(of: answer.errors),
                "virsh \(words.prefix(2).joined(separator: " ")) at \(uri): \(answer.errors)")
        }
        return answer.output
    }

    private static func kind(of errors: String) -> BlockError.Kind {
        if errors.contains("failed to get domain") || errors.contains("Domain not found") { return .notFound }
        // Of freezing: there is nobody who could have frozen anything.
        let absent = ["agent is not configured", "agent is not connected", "domain is not running"]
        return absent.contains(where: errors.contains) ? .unsupported : .inputOutput
    }

    /// Runs a command that may fail.
    ///
    /// - Throws: `BlockError` when virsh cannot be started or does not answer in time.
    func attempt(_ words: [String], seconds: Double = commandSeconds) throws(BlockError) -> Answer {
        if !VirshShell.canSay(words) { return try attemptAlone(words, seconds: seconds) }
        return try shell.withLock { (shell) throws(BlockError) in
            let now: VirshShell
            if let shell, shell.isFit { now = shell } else { now = try VirshShell(uri) }
            shell = now
            return try now.attempt(words, seconds: seconds)
        }
    }

    /// Runs a command with a virsh of its own.
    private func attemptAlone(_ words: [String], seconds: Double) throws(BlockError) -> Answer {
        let result = try Self.starting { () throws(BlockError) in
            try ChildProgram.run(["virsh", "-c", uri] + words, seconds: seconds, environment: Self.environment)
        }
        return Answer(
            isGood: result.status == 0, output: Self.output(result.output[...]), errors: Self.text(of: result.errors))
    }

    /// Starts virsh, and tells what to do where there is none.
    static func starting<R>(_ body: () throws(BlockError) -> R) throws(BlockError) -> R {
        do throws(BlockError) { return try body() } catch {
            guard error.kind == .notFound else { throw error }
            throw BlockError(.notFound, "starting virsh: it is not installed (Debian package libvirt-clients)")
        }
    }

    /// Whether virsh's standard error tells of a command that has failed, and not only of something remarkable.
    static func isError(_ complaint: [UInt8]) -> Bool {
        complaint.split(separator: UInt8(ascii: "\n")).contains { $0.starts(with: "error:".utf8) }
    }

    /// What a command has written, without the blank lines that virsh puts around it.
    static func output(_ bytes: ArraySlice<UInt8>) -> String {
        let newline = UInt8(ascii: "\n")
        guard let last = bytes.lastIndex(where: { $0 != newline }) else { return "" }
        return String(decoding: bytes[...last].drop { $0 == newline }, as: UTF8.self) + "\n"
    }

    /// virsh's standard error, for people.
    static func text(of complaint: [UInt8]) -> String {
        var text = String(decoding: complaint, as: UTF8.self).split(separator: "\n").joined(separator: "; ")
        if text.hasPrefix("error: ") { text.removeFirst("error: ".count) }
        return text
    }
}
