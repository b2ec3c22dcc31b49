// A disk of a restore point as a block device, which keeps the point from being removed while it is open.
public import Block
import LinuxIO
import Transports

/// A disk of a restore point.
final class PointDevice: BlockDevice {
    let info: DeviceInfo
    private let image: any BlockDevice
    private let lock: FileLock?

    init(_ image: any BlockDevice, of point: RestorePoint, disk: String, lock: FileLock?) {
        var info = image.info
        info.name = "disk \(disk) of \(point.description)"
        info.isReadOnly = true
        info.identity = [
            ("machine", point.machine.name), ("point", String(point.sequence)), ("uuid", point.uuid),
            ("time", point.time.description), ("disk", disk),
        ]
        self.info = info
        self.image = image
        self.lock = lock
    }

    func map(_ range: Range<UInt64>, _ patience: Patience, into extents: inout ExtentList) throws(BlockError) -> UInt64
    {
        try image.map(range, patience, into: &extents)
    }
    var mapVersion: UInt64 { image.mapVersion }
    func status(_ context: StatusContext, of range: Range<UInt64>, into list: inout StatusList) throws(BlockError)
        -> UInt64
    { try image.status(context, of: range, into: &list) }
    func prefetch(_ range: Range<UInt64>) { image.prefetch(range) }
}

extension Repository {
    /// Opens a disk of a point. The point cannot be removed while the device is open.
    ///
    /// - Parameter disk: its id; nil for the only one.
    /// - Throws: `.notFound` when there is no such disk, naming file and point when one of the chain is missing;
    ///   `.denied` while the point is being removed.
    public func open(_ point: RestorePoint, disk: String?) throws(BlockError) -> any BlockDevice {
        let lock = try lockPoint(point)
        let names = try lockNames(of: point.machine)
        defer { withExtendedLifetime(names) {} }
        // It may have been written anew while an earlier point was removed.
        let point = try self.point(inManifest: point.path, of: point.machine)
        let id: String
        if let disk { id = disk } else { id = try onlyDisk(of: point) }
        guard let top = try chain(of: id, at: point).first?.data else {
            throw BlockError(.notFound, "opening disk \(id) of \(point.description): its data is missing")
        }
        var image = try DiskSpecification(try SourceReference(top)).open()
        // The size of a qcow2 image is a multiple of 512.
        let size = point.manifest.disk(id)?.size ?? image.info.size
        if image.info.size != size {
            guard image.info.size == (size + 511) & ~511 else {
                throw BlockError(
                    .corrupt,
                    "opening disk \(id) of \(point.description): \(top) has \(image.info.size) bytes instead of \(size)"
                )
            }
            image = try ResizedDevice(image, size: size)
        }
        return PointDevice(image, of: point, disk: id, lock: lock)
    }

    /// The id of the only disk of a point.
    ///
    /// - Throws: `.invalid` when there are several.
    func onlyDisk(of point: RestorePoint) throws(BlockError) -> String {
        let disks = point.manifest.disks
        if disks.count == 1 { return disks[0].id }
        throw BlockError(
            .invalid,
            "opening \(point.description): it has \(disks.count) disks; name one of "
                + disks.map(\.id).joined(separator: ", "))
    }

    /// Lets `point:` sources be opened in this process. Called once, at its start.
    public static func openPointSources() {
        PointReference.open { (reference) throws(BlockError) in
            let repository = try open(at: reference.repository)
            let machine = try repository.machine(named: reference.machine)
            return try repository.open(try repository.find(reference.point, of: machine), disk: reference.disk)
        }
    }
}
