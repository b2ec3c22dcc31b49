// A machine of a repository, and a restore point of it: what the manifest says, and where its files are.
import Block

/// A machine that a repository has points of.
public struct RepositoryMachine: Sendable, Hashable {
    /// The hypervisor's id of the machine.
    public let id: String
    /// Its name when the last point was made.
    public let name: String
    /// Its directory below `vms/`.
    public let directory: String
}

/// A restore point: all disks of a machine at one point in time.
public struct RestorePoint: Sendable {
    /// What the manifest says.
    public let manifest: PointManifest
    /// Whose point it is.
    public let machine: RepositoryMachine
    /// The manifest's path.
    public let path: String

    /// Its number: later points have greater ones.
    public var sequence: Int { manifest.sequence }
    /// Its name for life, in lower case.
    public var uuid: String { manifest.uuid }
    /// The point in time of its disks.
    public var time: UTCTime { manifest.time }

    /// What people are told: web, point 42 of 2026-11-21T04:20:00Z.
    public var description: String { "\(machine.name), point \(sequence) of \(time)" }
}

/// Something that was said of a point after it was made.
public struct PointMark: Codable, Sendable {
    /// What is said.
    public enum Kind: String, Codable, Sendable, CaseIterable {
        /// It is not to be removed.
        case pinned
        /// Changes were not told when it was made: some of its data may be older than it.
        case suspect
    }

    /// What is said.
    public var kind: Kind
    /// Why.
    public var reason: String
    /// Since when.
    public var since: UTCTime
}
