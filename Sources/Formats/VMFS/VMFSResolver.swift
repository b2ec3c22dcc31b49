// The way from a disk's descriptor file on a datastore to the other files it names, on the same datastore.
public import Block

/// Opens files that an image on a datastore names, in the directories that are allowed.
public struct VMFSResolver: FileResolver {
    private let volume: VMFSVolume
    /// The directory that relative names start from.
    private let directory: [String]
    private let allowed: [[String]]

    /// A resolver for an image in a directory of a datastore.
    ///
    /// - Parameters:
    ///   - directory: the image's directory, from the root; it is allowed always.
    ///   - allowed: other directories that may be opened from, with everything below them.
    public init(_ volume: VMFSVolume, directory: String, allowed: [String] = []) {
        self.init(volume, Self.names(directory), allowed.map(Self.names) + [Self.names(directory)])
    }

    private init(_ volume: VMFSVolume, _ directory: [String], _ allowed: [[String]]) {
        self.volume = volume
        self.directory = directory
        self.allowed = allowed
    }

    private static func names(_ path: String) -> [String] {
        path.split(separator: "/").map(String.init).filter { $0 != "." }
    }

    /// Opens a file by its name relative to the directory, or by its path on an ESXi host, which begins with
    /// /vmfs/volumes and the datastore's UUID or name.
    ///
    /// - Throws: `.denied` when it is not in a directory that is allowed, wherever symbolic links lead; what
    ///   `VMFSVolume.open` throws.
    public func open(_ name: String) throws(BlockError) -> ResolvedFile {
        let file = try volume.open(try path(of: name))
        let parts = Self.names(file.path)
        guard allowed.contains(where: { parts.count > $0.count && parts.starts(with: $0) }) else {
            throw BlockError(
                .denied,
                "opening \(name): \(file.info.name) is in none of the directories that are allowed; allow its directory"
            )
        }
        let identity = "\(volume.uuid)/\(file.fingerprint.address)/\(file.fingerprint.generation)"
        let next = VMFSResolver(volume, parts.dropLast(), allowed)
        return ResolvedFile(device: file, identity: identity, resolver: next)
    }

    /// The path from the datastore's root.
    private func path(of name: String) throws(BlockError) -> String {
        guard name.hasPrefix("/") else { return (directory + [name]).joined(separator: "/") }
        if let inside = volume.pathInside(name) { return inside }
        throw BlockError(.denied, "opening \(name): it is not on the datastore \(volume.label)")
    }
}
