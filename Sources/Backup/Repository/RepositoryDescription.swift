// The file that makes a directory a repository: format version, feature flags, and how points are stored in it.
import Block
import FoundationEssentials
import LinuxIO

/// How the disks of restore points are stored.
public enum StorageDriver: String, Sendable, Codable, CaseIterable {
    /// One qcow2 image for each disk of each point, backed by that of the point before.
    case qcow2
    /// One raw file for each disk of each point, which shares unchanged blocks with the one before (XFS, Btrfs).
    case reflink
}

/// How data is stored in qcow2 images.
public enum PointCompression: String, Sendable, Codable, CaseIterable {
    /// As it is.
    case none
    /// Each cluster by Zstandard, where that makes it smaller.
    case zstd
}

/// What stands in `diskgate-repository.json`.
struct RepositoryDescription: Codable {
    /// The name of the file that makes a directory a repository.
    static let fileName = "diskgate-repository.json"
    /// The version of the format that this program reads and writes.
    static let currentFormat = 1
    /// Feature flags that this program knows: none yet.
    static let knownFeatures: Set<String> = []

    /// Version of the format: what cannot be read by a program of an older version has a greater one.
    var format: Int
    /// Names of additions to the format that a reader has to know.
    var features: [String]
    /// The repository's UUID, in lower case.
    var id: String
    var driver: StorageDriver
    var compression: PointCompression
    var created: UTCTime

    init(driver: StorageDriver, compression: PointCompression) {
        format = Self.currentFormat
        features = []
        id = UUID().uuidString.lowercased()
        self.driver = driver
        self.compression = compression
        created = .now
    }

    /// Only what is needed to tell whether the rest can be understood.
    private struct Versions: Decodable {
        var format: Int
        var features: [String]
        var driver: String
    }

    /// Reads the description of a repository.
    ///
    /// - Throws: `.notFound` when there is no repository, `.unsupported` for a format, feature or driver that is not
    ///   known here.
    static func read(from root: String) throws(BlockError) -> RepositoryDescription {
        let path = "\(root)/\(fileName)"
        let bytes: [UInt8]
        do throws(BlockError) { bytes = try readSmallFile(path) } catch {
            guard error.kind == .notFound else { throw error.during("opening the repository \(root)") }
            throw BlockError(
                .notFound,
                "opening the repository \(root): it has no \(fileName); make a repository with "
                    + "`diskgate create-repository \(root)`")
        }
        let versions = try parseJSON(Versions.self, bytes, path)
        if versions.format != currentFormat {
            throw BlockError(
                .unsupported,
                "opening the repository \(root): its format is \(versions.format), this version of diskgate knows "
                    + "\(currentFormat); use a newer one")
        }
        if let unknown = versions.features.first(where: { !knownFeatures.contains($0) }) {
            throw BlockError(
                .unsupported,
                "opening the repository \(root): it uses the feature \"\(unknown)\", which this version of diskgate "
                    + "does not know; use a newer one")
        }
        if StorageDriver(rawValue: versions.driver) == nil {
            throw BlockError(
                .unsupported,
                "opening the repository \(root): its points are stored by \"\(versions.driver)\", which this version "
                    + "of diskgate does not know")
        }
        return try parseJSON(Self.self, bytes, path)
    }
}
