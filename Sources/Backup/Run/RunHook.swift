// The command that is told how a run has ended.
import Block
import FoundationEssentials
import Glibc
import LinuxIO

/// Runs a user's shell command at the end of a run.
public enum RunHook {
    /// Seconds that the command may take.
    public static let secondsMax = 300.0

    /// Runs the command: DISKGATE_RESULT is how the run ended (done, downgraded, failed), the report comes as JSON on
    /// standard input, and what the command writes goes where diskgate's own messages go.
    ///
    /// - Returns: what went wrong with the command; nil when it ended with status 0 in time.
    public static func run(_ command: String, _ report: RunReport, secondsMax: Double = secondsMax) -> String? {
        do throws(BlockError) {
            let input = try namelessInput(report)
            let process = try ChildProgram.start(
                ["/bin/sh", "-c", command], input: input.number, output: STDERR_FILENO, errors: nil,
                environment: ["DISKGATE_RESULT=\(report.outcome.rawValue)"])
            let deadline = monotonicSeconds() + secondsMax
            while monotonicSeconds() < deadline {
                if let status = ChildProgram.reapIfEnded(process) {
                    return status == 0 ? nil : "the hook \(command) ended with status \(status)"
                }
                usleep(10_000)
            }
            kill(-process, SIGKILL)
            ChildProgram.reap(process)
            return "the hook \(command) did not end within \(Int(secondsMax)) s and was killed"
        } catch { return "the hook \(command): \(error.message)" }
    }

    private static func namelessInput(_ report: RunReport) throws(BlockError) -> Descriptor {
        let bytes: Data
        do { bytes = try JSONEncoder().encode(report) } catch {
            throw BlockError(.invalid, "writing the report: \(error)")
        }
        return try ChildProgram.input(Array(bytes))
    }
}
