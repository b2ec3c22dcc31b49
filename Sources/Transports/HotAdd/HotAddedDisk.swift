// hotadd: sources: a SCSI disk that somebody has added to this machine, found by who it is, and kept from others.
public import Block
import CLinux
import Glibc
import LinuxIO

/// Finds, claims and opens hot-added disks.
struct HotAddedDisk {
    /// The kind of the obligation to make a node writable again.
    static let kind = "node.read-only"
    /// How long to wait for a disk that was told to come, in seconds.
    static let patience = 15.0

    let selector: DiskSelector
    let isWritable: Bool
    /// Whether it is read and written around the page cache.
    var isDirect = false
    /// Whether it may be opened although this machine's own programs may act on it.
    var isUnprotected = false
    /// Whether people were warned of that already, when it was added.
    var isWarnedOf = false
    let inventory = DiskInventory()

    /// Waits until the disk is there, and opens it. Nobody else can mount, assemble or write it from then on.
    ///
    /// - Parameter seconds: how long to wait for it.
    /// - Throws: `BlockError`: it does not come, several are meant, it is no SCSI disk, somebody holds it, or another
    ///   has taken its place while it was opened.
    func open(seconds: Double = patience) throws(BlockError) -> any BlockDevice {
        let protection = HostProtection()
        if isUnprotected && !isWarnedOf { HostProtection.warn(doing) }
        let kept = isUnprotected ? HostProtection.unprotected : try protection.require(doing)
        let disk = try find(seconds: seconds)
        if !isUnprotected { try protection.confirm(disk, doing) }
        var options = RawOptions()
        options.isWritable = isWritable
        options.isExclusive = true
        options.isDirect = isDirect
        let node = try BlockNodeDevice.openNode(disk.node, options)
        try check(node, is: disk)
        // Another machine may have written to it since this one read it last.
        let result = dg_block_drop_cache(node.number)
        if result < 0 { throw BlockError(errno: -result, "\(doing): dropping what is cached of \(disk.node)") }
        let fact = (key: "kept out", value: kept)
        if isWritable || disk.isReadOnly {
            return HeldDevice(try BlockNodeDevice(node, name: disk.node, options), identity: [fact]) {}
        }
        let lease = try Self.note(disk, node)
        do throws(BlockError) {
            let device = try BlockNodeDevice(node, name: disk.node, options)
            return HeldDevice(device, identity: [fact]) { ProcessLeases.release(lease) }
        } catch {
            ProcessLeases.release(lease)
            throw error
        }
    }

    /// Adds images to this proxy, all in one request, for as long as one of them is open.
    ///
    /// - Parameter isDirect: whether all are read and written around the page cache, and not only those that say so.
    /// - Throws: `BlockError`, which says so if disks stay added.
    static func open(_ images: [HotAddImage], isWritable: Bool, isDirect: Bool) throws(BlockError) -> [any BlockDevice]
    {
        let task = HotAddTask()
        var lease: HotAddLease?
        // Held before the first disk is asked for: a signal may come at any time.
        let disks = try task.attach(images, isWritable: isWritable, isByHand: false) {
            lease = HotAddLease(task, $0)
        }.disks
        let held = lease
        var devices: [any BlockDevice] = []
        do throws(BlockError) {
            for (disk, image) in zip(disks, images) {
                let added = HotAddedDisk(
                    selector: .serial(disk.serial), isWritable: isWritable,
                    isDirect: isDirect || image.isDirect, isUnprotected: disk.isUnprotected == true,
                    isWarnedOf: disk.isUnprotected == true)
                devices.append(HeldDevice(try added.open()) { withExtendedLifetime(held) {} })
            }
            return devices
        } catch {
            devices.removeAll()
            throw error
        }
    }

    private var doing: String { "opening the hot-added disk \(selector)" }

    /// The kernel's read-only switch outlives the process that has set it.
    private static func note(_ disk: AttachedDisk, _ node: Descriptor) throws(BlockError) -> Int {
        let ledger = try RunLedger.begin(stateDirectory: defaultStateDirectory(), machine: "", repository: nil)
        _ = try ledger.intend(
            kind,
            ["node": disk.node, "diskseq": disk.diskSequence.map(String.init) ?? "", "wwn": disk.wwid ?? ""])
        return ProcessLeases.hold { isEnding in
            // Otherwise closing the disk has done it.
            if isEnding { _ = dg_block_make_writable(node.number) }
            for obligation in ledger.obligations { try? ledger.settle(obligation) }
            try? ledger.end()
        }
    }

    /// The disk that is meant, once it is there.
    private func find(seconds: Double) throws(BlockError) -> AttachedDisk {
        let found = try DiskWatch(inventory).wait(seconds: seconds) { (disks) throws(BlockError) in
            let matching = disks.filter { selector.matches($0) }
            // Device mapper repeats the names of what it lies on.
            let scsi = matching.filter { $0.address != nil }
            if scsi.isEmpty, let other = matching.first {
                throw BlockError(
                    .unsupported,
                    "\(doing): \(other.node) is no SCSI disk; name it by its path, or take it over nbd: from its host")
            }
            return try choose(scsi)
        }
        guard let found else {
            throw BlockError(
                .notFound,
                "\(doing): no such disk has come within \(Int(seconds)) s; diskgate disks shows those that are there")
        }
        return found
    }

    private func choose(_ disks: [AttachedDisk]) throws(BlockError) -> AttachedDisk? {
        if disks.count <= 1 { return disks.first }
        let places = disks.map { "\($0.node) at \($0.address.map { "hctl=\($0)" } ?? "an unknown address")" }
        if let map = disks[0].multipath, disks.allSatisfy({ $0.multipath == map }) {
            throw BlockError(
                .denied,
                "\(doing): \(places.joined(separator: ", ")) are paths of \(map.title ?? map.name): multipath has "
                    + "taken it; it is a LUN, not a hot-added disk: name it by /dev/mapper")
        }
        throw BlockError(
            .invalid,
            "\(doing): \(disks.count) disks answer to that: \(places.joined(separator: ", ")); name one by its hctl=")
    }

    /// Looks at who was opened, whatever its name has come to mean since.
    private func check(_ node: Descriptor, is disk: AttachedDisk) throws(BlockError) {
        let opened = try inventory.disk(of: node)
        guard opened.address == disk.address, opened.names == disk.names, opened.serial == disk.serial,
            opened.size == disk.size, opened.diskSequence == disk.diskSequence
        else {
            throw BlockError(
                .invalid,
                "\(doing): \(disk.node) became another disk while it was opened (\(opened.wwid ?? "without a name") "
                    + "instead of \(disk.wwid ?? "one without a name")); try again")
        }
    }
}

/// What a task has added, until nobody uses it any more, or the process ends.
private final class HotAddLease: Sendable {
    private let id: Int

    init(_ task: HotAddTask, _ ledger: RunLedger) {
        id = ProcessLeases.hold { isEnding in
            // Nobody but this process can have them open.
            do throws(BlockError) { try task.release(ledger, force: isEnding) } catch {
                // Nobody is left who could be told otherwise; the ledger still knows of the disk. Perhaps the
                // machine's own volume manager was faster.
                let text =
                    "diskgate: \(error.message); diskgate doctor --fix takes it off, or diskgate detach --force\n"
                _ = text.withCString { write(STDERR_FILENO, $0, strlen($0)) }
                ProcessLeases.noteLeft()
            }
        }
    }

    deinit { ProcessLeases.release(id) }
}

extension Obligation {
    /// Makes a node writable again that a process has kept from being written when it was killed.
    ///
    /// - Throws: the system's reason. A disk that is gone, or another by now, needs nothing.
    public func makeNodeWritable() throws(BlockError) {
        guard let path = details["node"] else { return }
        let file: Descriptor
        do throws(BlockError) { file = try Descriptor.open(path, O_RDONLY | O_NONBLOCK | O_EXCL) } catch {
            if error.kind == .notFound { return }
            throw error
        }
        guard let disk = try? DiskInventory().disk(of: file),
            disk.diskSequence.map(String.init) ?? "" == details["diskseq"], disk.wwid ?? "" == details["wwn"]
        else { return }
        let result = dg_block_make_writable(file.number)
        if result < 0 { throw BlockError(errno: -result, "making \(path) writable again (BLKROSET)") }
    }
}
