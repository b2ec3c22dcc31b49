// What a backup run tells when it is over: for people, for programs, and for hooks.
import Block
public import Hypervisors
public import Transports

/// The outcome of a backup run and how it came to be.
public struct RunReport: Codable, Sendable {
    /// How a run ended.
    public enum Outcome: String, Codable, Sendable {
        /// As it was asked for.
        case done
        /// The restore point is whole, but something was not as asked for: `downgrades` says what.
        case downgraded
        /// There is no restore point of this run.
        case failed
        /// Nothing was done: the plan was asked for.
        case planned
    }

    /// How the run ended.
    public var outcome: Outcome
    /// The run's UUID.
    public var run: String
    /// The machine as the user named it.
    public var machine: String
    /// The machine's own name; nil where it was not reached.
    public var machineName: String?
    /// The repository's path.
    public var repository: String
    /// The restore point; nil where there is none.
    public var point: Point?
    /// When the run began, in seconds since 1970.
    public var started: Double
    /// How long it took, in seconds.
    public var seconds: Double = 0
    /// How consistent the point is.
    public var consistency: Consistency?
    /// How long file systems were frozen, in seconds; nil where they were not.
    public var freezeSeconds: Double?
    /// The disks that took part.
    public var disks: [Disk] = []
    /// Disks that did not take part, and why.
    public var leftOut: [LeftOut] = []
    /// What was not as asked for.
    public var downgrades: [String] = []
    /// What else the user should know.
    public var warnings: [String] = []
    /// Points that were removed because no rule keeps them.
    public var removed: [Int] = []
    /// Why the run failed.
    public var error: String?

    /// A restore point as a report names it.
    public struct Point: Codable, Sendable {
        /// Its number in its machine's row of points.
        public var sequence: Int
        /// Its UUID.
        public var id: String
        /// The path of its manifest.
        public var manifest: String
    }

    /// A disk that did not take part.
    public struct LeftOut: Codable, Sendable {
        /// The disk's id.
        public var id: String
        /// Why.
        public var reason: String
    }

    /// What was done for a disk.
    public struct Disk: Codable, Sendable {
        /// The disk's id.
        public var id: String
        /// Bytes on the disk.
        public var size: UInt64
        /// full or incremental.
        public var level: String
        /// Why it is full.
        public var reason: String?
        /// How the disk was reached.
        public var transport: String
        /// Which of its sources that is, and why not those before it; nil where there was but one.
        public var choice: TransportChoice?
        /// Bytes that had to be looked at: those that changed, or that are allocated.
        public var planned: UInt64 = 0
        /// Bytes read from the disk.
        public var read: UInt64 = 0
        /// Bytes of data written to the restore point, before compression.
        public var written: UInt64 = 0
        /// Bytes recorded as zeros.
        public var zeroed: UInt64 = 0
        /// Seconds that copying took.
        public var seconds: Double = 0
        /// The check of what was said to be unchanged.
        public var sample: Sample?
    }

    /// A check of chunks that are said to be unchanged.
    public struct Sample: Codable, Sendable {
        /// Chunks read again and compared with the points before.
        public var chunks: UInt64
        /// Chunks that are said to be unchanged.
        public var clean: UInt64
        /// Chunks that had changed all the same.
        public var mismatches: UInt64
    }

    /// A run that has just begun.
    init(run: String, machine: String, repository: String, started: Double) {
        outcome = .failed
        self.run = run
        self.machine = machine
        self.repository = repository
        self.started = started
    }
}

extension RunReport {
    /// The report as people read it, in lines.
    public var text: String {
        var lines = ["\(headline)"]
        if let point { lines.append("point:       \(point.sequence), \(point.id)") }
        if let consistency {
            let frozen = freezeSeconds.map { ", frozen for \(decimals($0, 3)) s" } ?? ""
            lines.append("consistency: \(consistency.rawValue)\(frozen)")
        }
        for disk in disks { lines += describe(disk) }
        for other in leftOut { lines.append("left out:    \(other.id): \(other.reason)") }
        if !removed.isEmpty { lines.append("removed:     points " + removed.map(String.init).joined(separator: ", ")) }
        for downgrade in downgrades { lines.append("downgraded:  \(downgrade)") }
        for warning in warnings { lines.append("warning:     \(warning)") }
        if let error { lines.append("error:       \(error)") }
        return lines.joined(separator: "\n")
    }

    private var headline: String {
        let name = machineName ?? machine
        return switch outcome {
        case .done: "backup of \(name): done in \(decimals(seconds, 1)) s"
        case .downgraded: "backup of \(name): done in \(decimals(seconds, 1)) s, but not as asked for"
        case .failed: "backup of \(name): failed after \(decimals(seconds, 1)) s, without a restore point"
        case .planned: "backup of \(name): what a run would do"
        }
    }

    private func describe(_ disk: Disk) -> [String] {
        let reason = disk.reason.map { " (\($0))" } ?? ""
        var lines = ["disk \(disk.id): ".padded(13) + "\(disk.level)\(reason), over \(disk.transport)"]
        if outcome == .planned { return lines }
        let rate = disk.seconds > 0 ? ", \(readable(UInt64(Double(disk.read) / disk.seconds)))/s" : ""
        lines.append(
            "             read \(readable(disk.read)) of \(readable(disk.size)), wrote "
                + "\(readable(disk.written)), zeros \(readable(disk.zeroed))\(rate)")
        if let sample = disk.sample {
            lines.append(
                "             checked \(sample.chunks) of \(sample.clean) unchanged chunks: "
                    + (sample.mismatches == 0 ? "all unchanged" : "\(sample.mismatches) HAD CHANGED"))
        }
        return lines
    }
}
