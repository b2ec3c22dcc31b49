// The one way from an image to the other files it names: its caller decides which of them may be opened.
public import Block

/// A file that is open, with what is needed to go on from it.
public struct ResolvedFile: Sendable {
    /// The file's bytes as they are.
    public let device: any BlockDevice
    /// What the file is, whatever name led to it, for example device and inode number: two files with the same identity
    /// are the same file. A backing chain that comes back to one is a loop.
    public let identity: String
    /// Opens the files that this one names; nil when none may be opened from here.
    public let resolver: (any FileResolver)?
    /// Opens what the file's name leads to now, which is another file where somebody has replaced it; nil where names
    /// lead nowhere else, or the device notices that by itself.
    public let reopen: Reopening?

    /// Opens a file by its name once more.
    public typealias Reopening = @Sendable () throws(BlockError) -> any BlockDevice

    /// An open file.
    public init(
        device: any BlockDevice, identity: String, resolver: (any FileResolver)?, reopen: Reopening? = nil
    ) {
        self.device = device
        self.identity = identity
        self.resolver = resolver
        self.reopen = reopen
    }
}

/// Opens siblings of one image: backing files, data files, extents.
///
/// Names come from inside images and are not to be trusted. An implementation opens nothing outside the directories
/// that the user allowed, by default the image's own.
public protocol FileResolver: Sendable {
    /// Opens a file for reading.
    ///
    /// - Parameter name: as it stands in the image: relative to the image's directory, or absolute. It is not empty and
    ///   has no protocol prefix.
    /// - Throws: `.notFound`, `.denied` when the name leads out of the allowed directories, or what opening throws.
    func open(_ name: String) throws(BlockError) -> ResolvedFile

    /// Opens the LUN that a raw device mapping stands for, for reading. Where there are no such mappings it refuses.
    ///
    /// - Parameter name: of the mapping file, as it stands in the image.
    /// - Throws: as `open`; `.unsupported` where the LUN cannot be told or reached.
    func openMappedDevice(_ name: String) throws(BlockError) -> ResolvedFile
}

extension FileResolver {
    public func openMappedDevice(_ name: String) throws(BlockError) -> ResolvedFile {
        throw BlockError(
            .unsupported,
            "opening the LUN that \(name) maps: which one it is is known on its datastore only "
                + "(san:DATASTORE/...); the LUN itself is san:wwn=NAME")
    }
}

/// Refuses names that are no plain file names, saying why.
func checkSiblingName(_ name: String, _ role: String, of image: String) throws(BlockError) {
    if name.isEmpty { throw BlockError(.corrupt, "opening \(image): the name of its \(role) is empty") }
    // As qemu has it: a colon before any slash starts a protocol or a JSON description.
    let beforeSlash = name.prefix { $0 != "/" }
    guard let colon = beforeSlash.firstIndex(of: ":") else { return }
    throw BlockError(
        .unsupported,
        "opening \(image): its \(role) \"\(name)\" is named by protocol (\(beforeSlash[..<colon]):), and images are "
            + "not allowed to make diskgate connect anywhere; record a file name with "
            + "qemu-img rebase -u -b FILE -F FORMAT")
}
