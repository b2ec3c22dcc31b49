// The manifest: one JSON file for all disks of a machine at one point in time. While it is not there, nothing is.
import Block
import FoundationEssentials
public import Hypervisors
import LinuxIO

/// What a restore point is, as its manifest says.
public struct PointManifest: Codable, Sendable {
    /// How much of a disk a point holds.
    public enum Level: String, Codable, Sendable {
        /// Everything.
        case full
        /// What has changed since the point before.
        case incremental
    }

    /// Whose point it is.
    public struct Machine: Codable, Sendable, Equatable {
        /// The hypervisor's id of the machine.
        public var id: String
        /// Its name when the point was made.
        public var name: String
    }

    /// The point that this one was made on top of, as it was then.
    public struct Parent: Codable, Sendable, Equatable {
        public var uuid: String
        public var sequence: Int
        public var root: String
    }

    /// A file with its digest.
    public struct File: Codable, Sendable, Equatable {
        /// Its name in its directory.
        public var file: String
        /// Its length.
        public var bytes: UInt64
        /// The SHA-256 of its content, in hexadecimal.
        public var sha256: String
    }

    /// A disk at the point.
    public struct Disk: Codable, Sendable {
        /// What the hypervisor calls it within the machine.
        public var id: String
        /// The directory below `disks/`.
        public var directory: String
        /// Bytes on the disk.
        public var size: UInt64
        /// How much of the disk the point's own file holds.
        public var level: Level
        /// Why it was not incremental, or what else decided on the level; empty where there is nothing to say.
        public var reason: String
        /// The file with the data, in the disk's directory.
        public var file: String
        /// The sequence number of the point that has what this one does not; nil where nothing is missing. It changes
        /// when that point is removed.
        public var base: Int?
        /// The sidecar with the hashes of what the file holds.
        public var hashes: File
        /// The SHA-256 of the sidecar that the point was sealed with; the root is made of it.
        public var sealedHashes: String
        /// Where the disk was read, and how.
        public var source: String
        public var transport: String
        /// The hypervisor's checkpoint of this moment, since which the next point can ask for changes.
        public var checkpoint: String?
        /// Bytes read from the source, and bytes of the disk that were stored, zeros not counted.
        public var bytesRead: UInt64
        public var bytesWritten: UInt64
        /// Bytes that were read again to find changes that had not been told.
        public var bytesVerified: UInt64
        /// The share of the unchanged chunks that was looked at again, as places of the disk's rotation.
        public var checkedFrom: UInt64?
        public var checkedTo: UInt64?

        /// The same as a range; nil where nothing was looked at.
        var checked: Range<UInt64>? {
            guard let checkedFrom, let checkedTo, checkedFrom <= checkedTo else { return nil }
            return checkedFrom..<checkedTo
        }
    }

    /// A document with the machine's configuration.
    public struct Document: Codable, Sendable, Equatable {
        /// Its name to people and hypervisor.
        public var name: String
        /// The file below `documents/`.
        public var content: File
    }

    /// A point that was removed, what it held having come here.
    public struct Merged: Codable, Sendable, Equatable {
        public var uuid: String
        public var sequence: Int
        public var time: UTCTime
    }

    /// The version of the manifest's format: 1.
    public var format: Int
    /// The point's UUID, in lower case. It never changes.
    public var uuid: String
    /// Its number: greater than those of all points made before, whatever the clock said.
    public var sequence: Int
    /// The point in time of the disks.
    public var time: UTCTime
    public var machine: Machine
    /// The run that made it.
    public var run: String
    /// The program that made it.
    public var tool: String
    public var level: Level
    public var parent: Parent?
    /// SHA-256 over the parent's root, the disks' sidecars and the documents, see Docs/Repository.md.
    public var root: String
    public var disks: [Disk]
    public var documents: [Document]
    public var consistency: Consistency
    /// How long the guest's file systems were frozen; nil where they were not.
    public var freezeSeconds: Double?
    /// What the user was told when it was made.
    public var warnings: [String]
    /// Points that were removed, the oldest first.
    public var merged: [Merged]
    /// SHA-256 of this manifest with an empty text here.
    public var checksum: String

    /// The disk of an id.
    public func disk(_ id: String) -> Disk? { disks.first { $0.id == id } }
}

extension PointManifest {
    static let currentFormat = 1

    /// The root of the point's content and of all that it was made on.
    ///
    /// - Throws: `.unsupported` without OpenSSL.
    func computedRoot() throws(BlockError) -> String {
        var text = "diskgate point\nparent \(parent?.root ?? "-")\nuuid \(uuid)\n"
        for disk in disks.sorted(by: { $0.id < $1.id }) {
            text += "disk \(disk.sealedHashes) \(disk.size) \(disk.id)\n"
        }
        for document in documents.sorted(by: { $0.name < $1.name }) {
            text += "document \(document.content.sha256) \(document.name)\n"
        }
        return try sha256(Array(text.utf8))
    }

    /// The manifest as bytes, with its checksum.
    mutating func encoded() throws(BlockError) -> [UInt8] {
        checksum = ""
        checksum = try sha256(try readableJSON(self, "a manifest"))
        return try readableJSON(self, "a manifest")
    }

    /// Reads a manifest and looks whether it can be worked with; whether it was changed is `verify`'s question.
    ///
    /// - Throws: `.corrupt` or `.unsupported` with the file's name.
    static func read(_ path: String) throws(BlockError) -> PointManifest {
        let bytes = try readSmallFile(path, limit: 64 << 20)
        struct Version: Decodable { var format: Int }
        let format = try parseJSON(Version.self, bytes, path).format
        if format != currentFormat {
            throw BlockError(
                .unsupported,
                "reading \(path): its format is \(format), this version of diskgate knows \(currentFormat)")
        }
        let manifest = try parseJSON(Self.self, bytes, path)
        try manifest.checkNames(path)
        return manifest
    }

    /// Names in a manifest may come from a hostile hand, and files are opened and removed by them.
    private func checkNames(_ path: String) throws(BlockError) {
        func check(_ name: String, _ what: String) throws(BlockError) {
            if name.isEmpty || name == "." || name == ".." || name.utf8.contains(UInt8(ascii: "/"))
                || name.utf8.contains(0)
            {
                throw BlockError(.corrupt, "reading \(path): \"\(name)\" is no name of \(what)")
            }
        }
        for disk in disks {
            try check(disk.directory, "a disk's directory")
            try check(disk.file, "a disk's file")
            try check(disk.hashes.file, "a sidecar")
            if let base = disk.base, base >= sequence {
                throw BlockError(.corrupt, "reading \(path): disk \(disk.id) is based on point \(base), a later one")
            }
            if disk.size == 0 || disk.size > UInt64(Int64.max) {
                throw BlockError(.corrupt, "reading \(path): disk \(disk.id) has \(disk.size) bytes")
            }
        }
        for document in documents { try check(document.content.file, "a document's file") }
        if sequence < 1 || sequence > 999_999_999_999 {
            throw BlockError(.corrupt, "reading \(path): \(sequence) is no number of a point")
        }
    }

    /// What of the manifest is not as it was written.
    ///
    /// - Throws: `.unsupported` without OpenSSL.
    func damages() throws(BlockError) -> [String] {
        var damages: [String] = []
        if try !hasValidChecksum() {
            damages.append("the manifest was changed after it was written: its checksum is not that of its content")
        }
        if try computedRoot() != root {
            damages.append("the root is not that of the sidecars, documents and parent")
        }
        for disk in disks where merged.isEmpty && disk.sealedHashes != disk.hashes.sha256 {
            damages.append("the sidecar of disk \(disk.id) is not the one that it was sealed with")
        }
        return damages
    }

    /// Whether the checksum is that of the content.
    func hasValidChecksum() throws(BlockError) -> Bool {
        var copy = self
        _ = try copy.encoded()
        return copy.checksum == checksum
    }
}
