// The disks of a domain that is powered off: its images themselves, read where they lie.
import Block
import FoundationEssentials
import Glibc
import LinuxIO
import NBD
import Transports

/// A machine that stands still is its own point in time. libvirt makes no checkpoints of it: the one before stays, and
/// is asked for again by the next run.
final class LibvirtImages: SnapshotSession {
    let disks: [SnapshotDisk]
    let consistency = Consistency.offline
    let freezeSeconds: Double? = nil
    let time: Double
    let warnings: [String]

    private let place: LibvirtPlace
    private let images: [(path: String, modified: timespec)]
    private let asked = Locked(monotonicSeconds())

    init(_ place: LibvirtPlace, _ domain: LibvirtDomain, _ request: SnapshotRequest) throws(BlockError) {
        let doing = "reading the powered-off machine \(place.name)"
        guard place.isLocal else {
            throw BlockError(.unsupported, "\(doing): its images lie on another machine: start it, or back it up there")
        }
        var disks: [SnapshotDisk] = []
        var images: [(path: String, modified: timespec)] = []
        for wanted in request.disks {
            guard let disk = domain.disks.first(where: { $0.target == wanted.id }) else {
                throw BlockError(.notFound, "\(doing): there is no disk \(wanted.id)")
            }
            if let obstacle = disk.obstacle ?? (disk.path.isEmpty ? "its image is no file of this machine" : nil) {
                throw BlockError(.unsupported, "\(doing): the disk \(disk.target) cannot be backed up: \(obstacle)")
            }
            let path = NBDURI.encoded(disk.path)
            let source = try SourceReference("file://\(path)?format=\(disk.format)")
            let known = try source.open().info.dirtyBitmaps
            var offered = SnapshotDisk(id: disk.target, size: disk.size, source: source)
            if let since = wanted.since.map(OwnName.checkpoint) {
                if try Self.hasBacking(disk.path) {
                    // After an external snapshot, changes of before it are in the bitmaps of the images below.
                    offered.downgrade =
                        "\(disk.target) is read whole: its image has a backing file, so the bitmap \(since) may not "
                        + "tell all changes while the machine is off"
                } else if disk.checkpoints.contains(since), known.contains(since) {
                    offered.changedContext = "qemu:dirty-bitmap:\(since)"
                    offered.checkpoint = since
                } else {
                    offered.downgrade =
                        "\(disk.target) is read whole: its image has no usable bitmap \(since) while the machine is off"
                }
            }
            images.append((disk.path, try Self.modified(disk.path)))
            disks.append(offered)
        }
        self.place = place
        self.disks = disks
        self.images = images
        time = Date().timeIntervalSince1970
        warnings = [
            "the machine is powered off: no new checkpoint can be made; the next run asks for the same one again"
        ]
    }

    func check(isLast: Bool) throws(BlockError) {
        for image in images {
            let now = try Self.modified(image.path)
            if now.tv_sec != image.modified.tv_sec || now.tv_nsec != image.modified.tv_nsec {
                throw changed("its image \(image.path) has changed")
            }
        }
        let isDue = asked.withLock { last in
            guard isLast || monotonicSeconds() - last > 2 else { return false }
            last = monotonicSeconds()
            return true
        }
        if isDue { try requireStopped() }
    }

    func finish(adopting: Bool) throws(BlockError) {}

    private func requireStopped() throws(BlockError) {
        let state = try place.virsh.run(["domstate", place.domain])
        if !state.hasPrefix("shut off") && !state.hasPrefix("crashed") { throw changed("it was started") }
    }

    private func changed(_ what: String) -> BlockError {
        BlockError(
            .inputOutput,
            "reading the powered-off machine \(place.name): \(what) meanwhile: what was read is of no point in time; "
                + "run the backup again")
    }

    /// Whether a qcow2 image has a backing file: its header says where that one's name stands (docs/interop/qcow2).
    private static func hasBacking(_ path: String) throws(BlockError) -> Bool {
        let file = try Descriptor.open(path, O_RDONLY)
        var bytes = [UInt8](repeating: 0, count: 16)
        if pread(file.number, &bytes, bytes.count, 0) != bytes.count {
            throw BlockError(.inputOutput, "reading the header of \(path): it is too short, or cannot be read")
        }
        return bytes[..<4] == [0x51, 0x46, 0x49, 0xFB] && bytes[8...].contains { $0 != 0 }
    }

    private static func modified(_ path: String) throws(BlockError) -> timespec {
        var status = stat()
        if stat(path, &status) < 0 { throw BlockError(errno: errno, "looking at \(path)") }
        return status.st_mtim
    }
}
