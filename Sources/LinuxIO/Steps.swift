// Named steps of work that has to survive a crash at any moment: tests list them, and kill the process at each.
import Block
import Glibc

/// Marks the moments between which a crash leaves different things behind.
///
/// Off, and next to free, unless the environment asks for it when the process starts:
/// `DISKGATE_STEP_LOG=FILE` appends the name of each step reached, one in a line;
/// `DISKGATE_STEP_KILL=NAME[:COUNT]` kills the process (SIGKILL) when it reaches that step for the COUNTth time.
public enum Step {
    /// Says that a step is reached.
    ///
    /// - Parameter name: lower case words joined by dashes and points, for example `seal.manifest-renamed`.
    public static func reached(_ name: StaticString) {
        guard let watch else { return }
        watch.reached(name.description)
    }

    private static let watch: StepWatch? = {
        let log = getenv("DISKGATE_STEP_LOG").map { String(cString: $0) }
        let kill = getenv("DISKGATE_STEP_KILL").map { String(cString: $0) }
        return log == nil && kill == nil ? nil : StepWatch(log: log, kill: kill)
    }()
}

private final class StepWatch: Sendable {
    private let log: String?
    private let name: String?
    private let left: Locked<Int>

    init(log: String?, kill: String?) {
        self.log = log
        let parts = (kill ?? "").split(separator: ":", maxSplits: 1)
        name = parts.first.map(String.init)
        left = Locked(parts.count == 2 ? Int(parts[1]) ?? 1 : 1)
    }

    func reached(_ step: String) {
        if let log, let file = fopen(log, "ae") {
            fputs(step + "\n", file)
            fclose(file)
        }
        guard step == name else { return }
        let isLast = left.withLock { (count) -> Bool in
            count -= 1
            return count == 0
        }
        if isLast { Glibc.kill(getpid(), SIGKILL) }
    }
}
