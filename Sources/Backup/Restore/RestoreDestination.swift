// Where a disk is restored to: a new file under a `.partial` name, an existing disk, a block node, an NBD export.
public import Block
import Formats
import Glibc
import LinuxIO
import Transports

/// The receiving end of a restore, open for writing until it is finished.
public final class RestoreDestination: Sendable {
    /// What the user named.
    public let name: String
    /// The disk to write to.
    public let device: any BlockDevice
    /// Whether it is new and reads as zeros.
    public let isBlank: Bool
    private let partial: String?
    private let marker: String?
    /// Whether the marker stays although nothing was written: opening the file has cut or grown it, or an earlier
    /// restore was not finished.
    private let staysMarked: Bool
    /// Keeps another restore from the same `.partial` file.
    private let lock: FileLock?

    private init(
        name: String, device: any BlockDevice, isBlank: Bool, partial: String?, marker: String?,
        staysMarked: Bool = false, lock: FileLock? = nil
    ) {
        self.lock = lock
        self.staysMarked = staysMarked
        self.name = name
        self.device = device
        self.isBlank = isBlank
        self.partial = partial
        self.marker = marker
    }

    /// Opens a destination.
    ///
    /// - Parameters:
    ///   - text: a path of a file or block node, or the URI of an NBD export.
    ///   - size: bytes that will be restored.
    ///   - isDifferential: whether what is there is kept where it is right; a file has to exist then.
    ///   - mayReplace: whether a file of this name may be replaced, a file of another size be cut or grown for
    ///     differences, and a block node be overwritten.
    ///   - repository: where nothing may be restored to.
    /// - Throws: `.invalid` when something is there and may not be replaced, or is not what differences can be written
    ///   to; `.denied` when somebody uses it; `.noSpace` when the destination is too small.
    public static func open(
        _ text: String, size: UInt64, isDifferential: Bool, mayReplace: Bool, outside repository: Repository? = nil
    ) throws(BlockError) -> RestoreDestination {
        let reference = try SourceReference(text)
        if case .hotAdd = reference.kind {
            if !isDifferential && !mayReplace { throw refusal(text, "hot-added disk") }
            return try existing(text, try reference.openHotAddedTarget(), size, marker: nil)
        }
        guard case .path(let path) = reference.kind else {
            guard case .nbd = reference.kind else {
                throw BlockError(
                    .invalid, "restoring to \(text): give a file, a block device, a hotadd: disk or an NBD export")
            }
            var disk = DiskSpecification(reference)
            disk.access = .writable
            return try existing(text, try disk.open(), size, marker: nil)
        }
        if !reference.parameters.isEmpty {
            throw BlockError(.invalid, "restoring to \(text): a destination takes no parameters")
        }
        try repository?.requireOutside(path)
        var status = stat()
        let isThere = stat(path, &status) == 0
        var options = RawOptions()
        options.isWritable = true
        if isThere && status.st_mode & S_IFMT == S_IFBLK {
            // Not while it is mounted, or in use in another way.
            options.isExclusive = true
            if !isDifferential && !mayReplace { throw refusal(text, "block device") }
            return try existing(text, try BlockNodeDevice.open(path, options), size, marker: nil)
        }
        if isThere && status.st_mode & S_IFMT != S_IFREG {
            throw BlockError(.invalid, "restoring to \(text): it is neither a file nor a block device")
        }
        if isDifferential {
            if !isThere { throw BlockError(.notFound, "restoring differences to \(text): there is no such file") }
            return try differential(path, size, options, mayResize: mayReplace)
        }
        if isThere && !mayReplace {
            throw BlockError(
                .invalid,
                "restoring to \(text): there is a file of this name; take another name, replace it (--replace), or "
                    + "write only what differs (--differential)")
        }
        if isThere { try refuseUsed(try Descriptor.open(path, O_RDONLY), path) }
        return try new(path, size, options)
    }

    /// A disk, and where it is to be restored to.
    public struct Wanted: Sendable {
        let disk: String
        let place: String
        let size: UInt64

        /// A disk of so many bytes, and the path or URI of its destination.
        public init(disk: String, place: String, size: UInt64) {
            (self.disk, self.place, self.size) = (disk, place, size)
        }
    }

    /// What a destination is, whatever it is called.
    private enum Place: Hashable {
        case node(dev_t)
        case file(dev_t, ino_t)
        /// Not there yet, or not of this machine.
        case text(String)

        init(_ text: String, _ reference: SourceReference) {
            var status = stat()
            guard case .path(let path) = reference.kind, stat(path, &status) == 0 else {
                self = .text(text)
                return
            }
            let isNode = status.st_mode & S_IFMT == S_IFBLK
            self = isNode ? .node(status.st_rdev) : .file(status.st_dev, status.st_ino)
        }
    }

    /// Opens the destinations of several disks. Images that have to be hot-added for it come in one request.
    ///
    /// - Returns: the destinations in the order of the disks.
    /// - Throws: as opening one; `.invalid` also when two disks have the same. Nothing stays open then.
    public static func open(
        _ wanted: [Wanted], isDifferential: Bool, mayReplace: Bool, outside repository: Repository? = nil
    ) throws(BlockError) -> [RestoreDestination] {
        var takers: [Place: Wanted] = [:]
        var (hotAdded, references): ([Int], [SourceReference]) = ([], [])
        for (index, one) in wanted.enumerated() {
            let reference = try SourceReference(one.place)
            // One file may have several names, and a later disk would overwrite an earlier one.
            if let other = takers.updateValue(one, forKey: Place(one.place, reference)) {
                throw BlockError(
                    .invalid,
                    "restoring disk \(one.disk): \(one.place) is another disk's already: \(other.disk) goes to "
                        + other.place)
            }
            guard case .hotAdd = reference.kind else { continue }
            if !isDifferential && !mayReplace { throw refusal(one.place, "hot-added disk") }
            hotAdded.append(index)
            references.append(reference)
        }
        var opened: [Int: RestoreDestination] = [:]
        do throws(BlockError) {
            for (index, one) in wanted.enumerated() where !hotAdded.contains(index) {
                opened[index] = try open(
                    one.place, size: one.size, isDifferential: isDifferential, mayReplace: mayReplace,
                    outside: repository)
            }
            for (index, device) in zip(hotAdded, try SourceReference.openTogether(references, asTargets: true)) {
                opened[index] = try existing(wanted[index].place, device, wanted[index].size, marker: nil)
            }
        } catch {
            for destination in opened.values { destination.abandon(isUntouched: true) }
            throw error
        }
        return opened.sorted { $0.key < $1.key }.map(\.value)
    }

    private static func refusal(_ text: String, _ kind: String) -> BlockError {
        BlockError(
            .invalid,
            "restoring to \(text): all that is on the \(kind) would be lost; add --replace to overwrite it, or "
                + "--differential to write only what differs")
    }

    /// Refuses a file that QEMU has open: it locks bytes 100 and 200 and those behind them (block/file-posix.c).
    private static func refuseUsed(_ file: Descriptor, _ path: String) throws(BlockError) {
        // F_OFD_GETLK of fcntl(2), which the C library shows only to those who ask for all of Linux.
        let ask: Int32 = 36
        for start: off_t in [100, 200] {
            var probe = flock()
            probe.l_type = Int16(F_WRLCK)
            probe.l_whence = Int16(SEEK_SET)
            probe.l_start = start
            probe.l_len = 10
            if fcntl(file.number, ask, &probe) < 0 { continue }
            if probe.l_type != Int16(F_UNLCK) {
                throw BlockError(
                    .denied,
                    "restoring to \(path): a virtual machine or a program of QEMU uses it; stop that first")
            }
        }
    }

    private static func existing(
        _ name: String, _ device: any BlockDevice, _ size: UInt64, marker: String?, staysMarked: Bool = false
    ) throws(BlockError) -> RestoreDestination {
        if device.info.size < size {
            throw BlockError(.noSpace, "restoring to \(name): it has \(device.info.size) bytes, the disk \(size)")
        }
        return RestoreDestination(
            name: name, device: device, isBlank: false, partial: nil, marker: marker, staysMarked: staysMarked)
    }

    private static func differential(
        _ path: String, _ size: UInt64, _ options: RawOptions, mayResize: Bool
    ) throws(BlockError) -> RestoreDestination {
        let file = try Descriptor.open(path, O_RDWR)
        let present = UInt64(clamping: try file.status().st_size)
        if present != size && !mayResize {
            throw BlockError(
                .invalid,
                "restoring differences to \(path): it has \(present) bytes, the disk \(size), so it is another disk; "
                    + "add --replace if it is to be this one all the same")
        }
        try refuseImage(file, path)
        try refuseUsed(file, path)
        // Until it is whole again, nobody is to take it for what it was, or for what it will be.
        let marker = "\(path).incomplete"
        let staysMarked = present != size || access(marker, F_OK) == 0
        try writeDurably(marker, Array("a restore to \(path) was not finished: restore again\n".utf8))
        if ftruncate(file.number, off_t(truncatingIfNeeded: size)) < 0 {
            throw BlockError(errno: errno, "sizing \(path) to \(size) bytes")
        }
        return try existing(
            path, try RawFileDevice(file, name: path, options), size, marker: marker, staysMarked: staysMarked)
    }

    /// Refuses a file that begins like an image, which would not be one any more: the disk is written as it is.
    private static func refuseImage(_ file: Descriptor, _ path: String) throws(BlockError) {
        let name = path.lowercased()
        if name.hasSuffix(".raw") || name.hasSuffix(".img") { return }
        let start = Buffer(count: 512)
        let got = pread(file.number, start.bytes.baseAddress, 512, 0)
        if got < 0 { throw BlockError(errno: errno, "reading \(path)") }
        let format = ImageFormat.recognised(by: UnsafeRawBufferPointer(rebasing: start.readable[..<got]))
        guard let format, format != .luks else { return }
        throw BlockError(
            .invalid,
            "restoring differences to \(path): it begins like a \(format.rawValue) image, and the disk would be "
                + "written over it as raw bytes; if it is a raw disk, name it .raw or .img")
    }

    private static func new(_ path: String, _ size: UInt64, _ options: RawOptions) throws(BlockError)
        -> RestoreDestination
    {
        let partial = "\(path).partial"
        let (file, lock) = try openPartial(partial)
        // What an earlier restore has left is zeros again.
        if ftruncate(file.number, 0) < 0 || ftruncate(file.number, off_t(truncatingIfNeeded: size)) < 0 {
            let reason = errno
            unlink(partial)
            throw BlockError(errno: reason, "sizing \(partial) to \(size) bytes")
        }
        return RestoreDestination(
            name: path, device: try RawFileDevice(file, name: partial, options), isBlank: true, partial: partial,
            marker: nil, lock: lock)
    }

    /// Makes the file that gets the name at the end, or takes over what a restore that is over has left of it.
    private static func openPartial(_ path: String) throws(BlockError) -> (Descriptor, FileLock) {
        var status = stat()
        let isThere = lstat(path, &status) == 0
        if isThere && status.st_mode & S_IFMT != S_IFREG {
            throw BlockError(.invalid, "restoring: \(path) is in the way, and it is no file; remove it")
        }
        let file = try Descriptor.open(path, O_RDWR | O_NOFOLLOW | (isThere ? 0 : O_CREAT | O_EXCL))
        guard let lock = try FileLock.take(file, path: path), lstat(path, &status) == 0,
            try file.status().st_ino == status.st_ino, try file.status().st_mode & S_IFMT == S_IFREG
        else {
            throw BlockError(.denied, "restoring: another restore is writing \(path); wait for its end")
        }
        return (file, lock)
    }

    /// Gives the finished disk its name.
    ///
    /// - Throws: `BlockError` of the system's reason.
    public func finish() throws(BlockError) {
        try device.flush()
        Step.reached("restore.flushed")
        if let partial {
            try renameDurably(partial, to: name)
            // Of an earlier restore that was not finished.
            try removeDurably("\(name).incomplete")
        }
        if let marker { try removeDurably(marker) }
    }

    /// Removes a file that was not finished. What was there before stays as it is now.
    ///
    /// - Parameter isUntouched: whether nothing was written yet.
    public func abandon(isUntouched: Bool = false) {
        if let partial { unlink(partial) }
        if isUntouched, !staysMarked, let marker { unlink(marker) }
    }
}

extension Repository {
    /// Refuses places in the repository: what is restored there would be taken for a part of it, or destroy one.
    ///
    /// - Throws: `.invalid`.
    public func requireOutside(_ place: String) throws(BlockError) {
        var known = place
        while true {
            if let real = realpath(known, nil) {
                defer { free(real) }
                let text = String(cString: real)
                if text != path && !text.utf8.starts(with: (path == "/" ? "/" : "\(path)/").utf8) { return }
                throw BlockError(
                    .invalid, "restoring to \(place): it lies in the repository \(path); take another place")
            }
            let above = directoryName(known)
            if above == known { return }
            known = above
        }
    }
}
