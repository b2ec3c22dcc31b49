// The seam that hypervisors implement for hot-adding: disks onto this proxy's own virtual machine, and off it again.
public import Block

/// A disk that is to be added to the proxy.
public struct HotAddRequest: Sendable, Equatable {
    /// What the hypervisor is to call the disk, from which it can be told from those of others.
    public var id: String
    /// The serial number that the disk is to have, where the hypervisor lets us choose it.
    public var serial: String
    /// What the hypervisor calls the disk's content: for QEMU a path on its machine.
    public var image: String
    /// The content's format there: raw, qcow2.
    public var format: String
    /// Whether the proxy may change it.
    public var isWritable: Bool

    /// A request.
    public init(id: String, serial: String, image: String, format: String, isWritable: Bool) {
        self.id = id
        self.serial = serial
        self.image = image
        self.format = format
        self.isWritable = isWritable
    }
}

/// A disk that diskgate has added to the proxy, as the hypervisor sees it.
public struct HotAddedDevice: Sendable, Equatable, Codable {
    /// What the hypervisor calls it.
    public var id: String
    /// The serial number that the proxy's kernel will tell.
    public var serial: String
    /// The adapter, as the hypervisor calls it.
    public var controller: String
    /// Its place on the adapter.
    public var target: Int
    public var unit: Int

    /// A disk in its place.
    public init(id: String, serial: String, controller: String, target: Int, unit: Int) {
        self.id = id
        self.serial = serial
        self.controller = controller
        self.target = target
        self.unit = unit
    }
}

/// Adds disks to the virtual machine that this proxy runs in. One task at a time uses it: `HotAddTask` sees to that.
public protocol HotAddController: AnyObject, Sendable {
    /// As the user names it.
    var name: String { get }

    /// Places that are free on the proxy's SCSI adapters.
    ///
    /// - Throws: `BlockError` when the hypervisor cannot be asked.
    func freeSlots() throws(BlockError) -> Int

    /// Adds all of the disks, or none.
    ///
    /// - Throws: `.noSpace` when there are not enough places, or what the hypervisor says.
    func attach(_ requests: [HotAddRequest]) throws(BlockError) -> [HotAddedDevice]

    /// Takes disks off, by their ids. Those that are not there need nothing.
    ///
    /// - Throws: `BlockError` when one stays.
    func detach(_ ids: [String]) throws(BlockError)

    /// The disks that diskgate has added, whichever process it was.
    ///
    /// - Throws: `BlockError` when the hypervisor cannot be asked.
    func list() throws(BlockError) -> [HotAddedDevice]
}

/// Who opens controllers by their URIs: a module above this one.
public enum HotAddControllers {
    /// Opens a controller.
    public typealias Opener = @Sendable (String) throws(BlockError) -> any HotAddController

    private static let opener = Locked<Opener?>(nil)

    /// Says who opens controllers in this process. Called once, at its start.
    public static func open(with opener: @escaping Opener) { Self.opener.withLock { $0 = opener } }

    /// Opens a controller.
    ///
    /// - Throws: `.unsupported` when nobody opens controllers here, or what opening it throws.
    static func open(_ uri: String) throws(BlockError) -> any HotAddController {
        guard let opener = Self.opener.withLock({ $0 }) else {
            throw BlockError(.unsupported, "opening the hot-add controller \(uri): this program opens none")
        }
        return try opener(uri)
    }
}
