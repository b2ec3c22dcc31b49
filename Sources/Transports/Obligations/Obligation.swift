// Something that was made outside this process and has to be given back, whatever happens to the process.

/// A promise to give something back: a bitmap, an export, a scratch file, a frozen guest, a half-made restore point.
public struct Obligation: Codable, Sendable, Equatable {
    /// Its number in its run, from 1, in the order of making: giving back goes the other way.
    public var id: Int
    /// What kind of thing it is; it begins with the name of the part that can give it back and a point: `qemu.bitmap`,
    /// `repository.partial`.
    public var kind: String
    /// All that is needed to find it and give it back.
    public var details: [String: String]
}

/// Whose obligations a ledger has.
public struct RunIdentity: Codable, Sendable, Equatable {
    /// The run's UUID in lower case.
    public var id: String
    /// The virtual machine as the user named it; empty where there is none.
    public var machine: String
    /// The repository's path; nil where there is none.
    public var repository: String?
    /// When the run began, in seconds since 1970.
    public var started: Double
    /// The machine that runs diskgate, and its boot: other boots have other processes.
    public var host: String
    public var boot: String
    /// The process.
    public var process: Int32
}
