// What a rule has found about a transport and a disk, and what came of all findings: the choice, with its reasons.
public import Block

/// What a rule says of a transport for a disk.
public struct Finding: Codable, Sendable, Equatable {
    /// What follows from it.
    public enum Verdict: String, Codable, Sendable, Comparable {
        /// The rule is kept.
        case ok
        /// It works, or may work, with something to be known.
        case warning
        /// The transport cannot be used for this disk.
        case excluded

        private var rank: Int { self == .ok ? 0 : self == .warning ? 1 : 2 }
        public static func < (left: Self, right: Self) -> Bool { left.rank < right.rank }
    }

    /// The rule: the transport, a point, and what is looked at: `san.datastore-type`.
    public var rule: String
    /// What follows.
    public var verdict: Verdict
    /// Why, with the values that decided it.
    public var reason: String
    /// What to do so that the transport can be used; nil where nothing has to be, or can be done.
    public var remedy: String?

    /// A finding.
    public init(_ rule: String, _ verdict: Verdict, _ reason: String, remedy: String? = nil) {
        self.rule = rule
        self.verdict = verdict
        self.reason = reason
        self.remedy = remedy
    }
}

/// A transport that a disk might be read over, with everything that is known for and against it.
public struct TransportCandidate: Codable, Sendable, Equatable {
    /// The transport; nil for sources that have none (a restore point).
    public var transport: TransportKind?
    /// The source, where there is one that names the disk over this transport.
    public var source: String?
    /// All findings, those of rules first, then what came of trying it.
    public var findings: [Finding]

    /// A candidate.
    public init(_ transport: TransportKind?, source: String? = nil, findings: [Finding] = []) {
        self.transport = transport
        self.source = source
        self.findings = findings
    }

    /// The worst that was found.
    public var verdict: Finding.Verdict { findings.map(\.verdict).max() ?? .ok }

    /// How people call it.
    public var name: String { transport?.rawValue ?? source ?? "unknown" }

    /// Why it cannot be used; nil when it can.
    public var exclusion: String? {
        let reasons = findings.filter { $0.verdict == .excluded }.map(\.reason)
        return reasons.isEmpty ? nil : reasons.joined(separator: "; ")
    }
}

/// Which transport a disk is read over, and why not over those that were wanted more.
public struct TransportChoice: Codable, Sendable, Equatable {
    /// The disk, as people call it.
    public var disk: String
    /// The transport that was taken; nil when none can be used, or the source that was taken has none.
    public var chosen: TransportKind?
    /// Its place among the candidates, from 1; nil when none can be used.
    public var position: Int?
    /// Every candidate in the order of preference. Those behind the chosen one may not have been tried.
    public var candidates: [TransportCandidate]

    /// A choice.
    public init(disk: String, position: Int?, candidates: [TransportCandidate]) {
        self.disk = disk
        self.position = position
        self.candidates = candidates
        chosen = position.flatMap { candidates.indices.contains($0 - 1) ? candidates[$0 - 1].transport : nil }
    }

    /// Whether another than the first was taken, or none.
    public var isDowngraded: Bool { position != 1 }

    /// Why the candidates before the chosen one were not taken, or all of them where none was: `san: ...`.
    public var reasons: [String] {
        candidates.prefix(position.map { $0 - 1 } ?? candidates.count).map { candidate in
            "\(candidate.name): \(candidate.exclusion ?? "not taken")"
        }
    }

    /// In one line: `nbd (2nd of 3; san: ...)`.
    public var summary: String {
        guard let position, candidates.indices.contains(position - 1) else {
            return "none of \(candidates.count) (\(reasons.joined(separator: "; ")))"
        }
        let name = candidates[position - 1].name
        if candidates.count == 1 { return name }
        return "\(name) (\(([Self.ordinal(position) + " of \(candidates.count)"] + reasons).joined(separator: "; ")))"
    }

    /// The error of a disk for which there is none.
    public var failure: BlockError {
        BlockError(.notFound, "choosing a transport for \(disk): none can be used: \(reasons.joined(separator: "; "))")
    }

    private static func ordinal(_ number: Int) -> String {
        let isTeen = (11...13).contains(number % 100)
        let endings = [1: "st", 2: "nd", 3: "rd"]
        return "\(number)\(isTeen ? "th" : endings[number % 10] ?? "th")"
    }
}
