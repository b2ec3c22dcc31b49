// libvirt through virsh: a process of its own can be ended when it hangs, and no library is loaded into everything.
import Block
import LinuxIO

/// A connection URI of libvirt, and the program that speaks to it.
struct Virsh: Sendable {
    /// For virsh -c.
    let uri: String

    /// Seconds that a command has by default.
    static let commandSeconds = 60.0

    /// Runs a command that must succeed.
    ///
    /// - Returns: its standard output.
    /// - Parameter isQuiet: whether to leave out what is for people only.
    /// - Throws: `BlockError` with what virsh has said.
    func run(_ words: [String], seconds: Double = commandSeconds, isQuiet: Bool = true) throws(BlockError) -> String {
        let result = try attempt(words, seconds: seconds, isQuiet: isQuiet)
        guard result.status == 0 else {
            throw BlockError(
                Self.kind(of: result.errors),
                "virsh \(words.prefix(2).joined(separator: " ")) at \(uri): \(result.errors)")
        }
        return result.output
    }

    private static func kind(of errors: String) -> BlockError.Kind {
        if errors.contains("failed to get domain") || errors.contains("Domain not found") { return .notFound }
        // Of freezing: there is nobody who could have frozen anything.
        let absent = ["agent is not configured", "agent is not connected", "domain is not running"]
        return absent.contains(where: errors.contains) ? .unsupported : .inputOutput
    }

    /// Runs a command that may fail.
    ///
    /// - Throws: `BlockError` when virsh cannot be started or does not end.
    func attempt(_ words: [String], seconds: Double = commandSeconds, isQuiet: Bool = true) throws(BlockError) -> (
        status: Int32, output: String, errors: String
    ) {
        // Messages are looked at, so they have to be in English.
        let call = ["env", "LC_ALL=C", "virsh"] + (isQuiet ? ["-q"] : []) + ["-c", uri] + words
        let result = try ChildProgram.run(call, seconds: seconds)
        if result.status == 127 {
            throw BlockError(.notFound, "starting virsh: it is not installed (Debian package libvirt-clients)")
        }
        var errors = String(decoding: result.errors, as: UTF8.self).split(separator: "\n").joined(separator: "; ")
        if errors.hasPrefix("error: ") { errors.removeFirst("error: ".count) }
        return (result.status, String(decoding: result.output, as: UTF8.self), errors)
    }
}
