// The way from a disk's descriptor file on a datastore to the other files it names, on the same datastore.
public import Block

/// Opens files that an image on a datastore names, in the directories that are allowed.
public struct VMFSResolver: FileResolver {
    /// Finds the LUN that a raw device mapping names, and opens it for reading.
    public typealias MappedDeviceOpener = @Sendable (VMFSDiskID) throws(BlockError) -> any BlockDevice

    private let volume: VMFSVolume
    /// The directory that relative names start from.
    private let directory: [String]
    private let allowed: [[String]]
    private let openMapped: MappedDeviceOpener?

    /// A resolver for an image in a directory of a datastore.
    ///
    /// - Parameters:
    ///   - directory: the image's directory, from the root; it is allowed always.
    ///   - allowed: other directories that may be opened from, with everything below them: by their paths from the root
    ///     or on an ESXi host.
    ///   - openMapped: opens the LUNs of raw device mappings; nil refuses them.
    public init(
        _ volume: VMFSVolume, directory: String, allowed: [String] = [], openMapped: MappedDeviceOpener? = nil
    ) {
        let others = allowed.map { Self.names(volume.pathInside($0) ?? $0) }
        self.init(volume, Self.names(directory), others + [Self.names(directory)], openMapped)
    }

    private init(
        _ volume: VMFSVolume, _ directory: [String], _ allowed: [[String]], _ openMapped: MappedDeviceOpener?
    ) {
        self.volume = volume
        self.directory = directory
        self.allowed = allowed
        self.openMapped = openMapped
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
        try checkAllowed(parts, name)
        let identity = "\(volume.uuid)/\(file.fingerprint.address)/\(file.fingerprint.generation)"
        let next = VMFSResolver(volume, parts.dropLast(), allowed, openMapped)
        return ResolvedFile(device: file, identity: identity, resolver: next)
    }

    /// Opens the LUN that a mapping file on the datastore names, by what this was told to open LUNs with.
    ///
    /// - Throws: as `open`; `.invalid` when the file is no mapping, `.unsupported` when LUNs cannot be opened here.
    public func openMappedDevice(_ name: String) throws(BlockError) -> ResolvedFile {
        let path = try path(of: name)
        let place = try volume.retrying { () throws(BlockError) in try volume.find(path) }
        try checkAllowed(place.path, name)
        guard let disk = place.descriptor.diskID(volume.resources.geometry) else {
            throw BlockError(
                .invalid, "opening [\(volume.label)] \(place.path.joined(separator: "/")): it is no raw device mapping")
        }
        guard let openMapped else {
            throw BlockError(
                .unsupported,
                "opening [\(volume.label)] \(place.path.joined(separator: "/")): it maps the LUN \(disk.text), which "
                    + "cannot be opened from here")
        }
        let device = try openMapped(disk)
        return ResolvedFile(device: device, identity: "LUN \(disk.text)", resolver: nil)
    }

    private func checkAllowed(_ path: [String], _ name: String) throws(BlockError) {
        if allowed.contains(where: { path.count > $0.count && path.starts(with: $0) }) { return }
        throw BlockError(
            .denied,
            "opening \(name): [\(volume.label)] \(path.joined(separator: "/")) is in none of the directories that are "
                + "allowed; allow its directory")
    }

    /// The path from the datastore's root.
    private func path(of name: String) throws(BlockError) -> String {
        guard name.hasPrefix("/") else { return (directory + [name]).joined(separator: "/") }
        if let inside = volume.pathInside(name) { return inside }
        throw BlockError(.denied, "opening \(name): it is not on the datastore \(volume.label)")
    }
}
