// point: sources: named here with all other sources, opened by whoever knows repositories, which is above this module.
public import Block

/// A disk of a restore point as a user names it: `point:POINT?repository=DIRECTORY&vm=VM&disk=DISK`.
public struct PointReference: Sendable, Equatable {
    /// `latest`, a sequence number, the beginning of a UUID, or a time.
    public var point: String
    /// The repository's directory.
    public var repository: String
    /// The machine; nil for the only one.
    public var machine: String?
    /// The disk; nil for the only one.
    public var disk: String?

    /// A disk of a restore point.
    public init(point: String, repository: String, machine: String?, disk: String?) {
        self.point = point
        self.repository = repository
        self.machine = machine
        self.disk = disk
    }

    /// Opens a disk of a restore point for reading.
    public typealias Opener = @Sendable (PointReference) throws(BlockError) -> any BlockDevice

    private static let opener = Locked<Opener?>(nil)

    /// Says who opens restore points in this process. Called once, at its start.
    public static func open(with opener: @escaping Opener) { Self.opener.withLock { $0 = opener } }

    /// Opens the disk.
    ///
    /// - Throws: `.unsupported` when nobody opens restore points here, or what opening it throws.
    func open() throws(BlockError) -> any BlockDevice {
        guard let opener = Self.opener.withLock({ $0 }) else {
            throw BlockError(
                .unsupported, "opening point \(point) of \(repository): this program opens no repositories")
        }
        return try opener(self)
    }
}
