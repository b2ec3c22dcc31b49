// Where a disk is restored to: a new file under a `.partial` name, an existing disk, a block node, an NBD export.
public import Block
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

    private init(name: String, device: any BlockDevice, isBlank: Bool, partial: String?, marker: String?) {
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
    ///   - mayReplace: whether a file of this name may be replaced.
    /// - Throws: `.invalid` when a file is there and may not be replaced, `.noSpace` when the destination is too small.
    public static func open(_ text: String, size: UInt64, isDifferential: Bool, mayReplace: Bool) throws(BlockError)
        -> RestoreDestination
    {
        let reference = try SourceReference(text)
        guard case .path(let path) = reference.kind else {
            guard case .nbd = reference.kind else {
                throw BlockError(.invalid, "restoring to \(text): give a file, a block device or an NBD export")
            }
            var disk = DiskSpecification(reference)
            disk.access = .writable
            return try existing(text, try disk.open(), size, marker: nil)
        }
        if !reference.parameters.isEmpty {
            throw BlockError(.invalid, "restoring to \(text): a destination takes no parameters")
        }
        var status = stat()
        let isThere = stat(path, &status) == 0
        var options = RawOptions()
        options.isWritable = true
        if isThere && status.st_mode & S_IFMT == S_IFBLK {
            // Not while it is mounted, or in use in another way.
            options.isExclusive = true
            return try existing(text, try BlockNodeDevice.open(path, options), size, marker: nil)
        }
        if isThere && status.st_mode & S_IFMT != S_IFREG {
            throw BlockError(.invalid, "restoring to \(text): it is neither a file nor a block device")
        }
        if isDifferential {
            if !isThere { throw BlockError(.notFound, "restoring differences to \(text): there is no such file") }
            return try differential(path, size, options)
        }
        if isThere && !mayReplace {
            throw BlockError(
                .invalid,
                "restoring to \(text): there is a file of this name; take another name, replace it (--replace), or "
                    + "write only what differs (--differential)")
        }
        return try new(path, size, options)
    }

    private static func existing(_ name: String, _ device: any BlockDevice, _ size: UInt64, marker: String?)
        throws(BlockError) -> RestoreDestination
    {
        if device.info.size < size {
            throw BlockError(.noSpace, "restoring to \(name): it has \(device.info.size) bytes, the disk \(size)")
        }
        return RestoreDestination(name: name, device: device, isBlank: false, partial: nil, marker: marker)
    }

    private static func differential(_ path: String, _ size: UInt64, _ options: RawOptions) throws(BlockError)
        -> RestoreDestination
    {
        let file = try Descriptor.open(path, O_RDWR)
        // Until it is whole again, nobody is to take it for what it was, or for what it will be.
        let marker = "\(path).incomplete"
        try writeDurably(marker, Array("a restore to \(path) was not finished: restore again\n".utf8))
        if ftruncate(file.number, off_t(truncatingIfNeeded: size)) < 0 {
            throw BlockError(errno: errno, "sizing \(path) to \(size) bytes")
        }
        return try existing(path, try RawFileDevice(file, name: path, options), size, marker: marker)
    }

    private static func new(_ path: String, _ size: UInt64, _ options: RawOptions) throws(BlockError)
        -> RestoreDestination
    {
        let partial = "\(path).partial"
        let file = try Descriptor.open(partial, O_RDWR | O_CREAT | O_TRUNC)
        if ftruncate(file.number, off_t(truncatingIfNeeded: size)) < 0 {
            let reason = errno
            unlink(partial)
            throw BlockError(errno: reason, "sizing \(partial) to \(size) bytes")
        }
        return RestoreDestination(
            name: path, device: try RawFileDevice(file, name: partial, options), isBlank: true, partial: partial,
            marker: nil)
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
    public func abandon() {
        if let partial { unlink(partial) }
    }
}
