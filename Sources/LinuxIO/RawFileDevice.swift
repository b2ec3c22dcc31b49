// A regular file as a disk: one .file run, holes asked of the file system only where allocation is the question.
public import Block
import CLinux
import Glibc
import Synchronization

/// How a file or block node is opened.
public struct RawOptions: Sendable {
    /// Whether it may be changed.
    public var isWritable = false
    /// Whether the page cache is gone around (O_DIRECT).
    public var isDirect = false
    /// Block nodes only: O_EXCL, which keeps mounts and other exclusive users away, and, opened for reading, the
    /// kernel's read-only switch (BLKROSET) for as long as it is open.
    public var isExclusive = false

    /// Read-only, through the page cache, shared.
    public init() {}
}

/// A regular file as a disk.
public final class RawFileDevice: BlockDevice {
    public let info: DeviceInfo
    private let storage: RawStorage
    // Whether the file system has refused SEEK_DATA; then everything is data.
    private let seekRefused = Atomic<Bool>(false)

    /// Opens a path.
    ///
    /// - Throws: `BlockError`: it cannot be opened, is no regular file, or does not take O_DIRECT though asked to.
    public static func open(_ path: String, _ options: RawOptions = RawOptions()) throws(BlockError) -> RawFileDevice {
        var flags = options.isWritable ? O_RDWR : O_RDONLY
        if options.isDirect { flags |= O_DIRECT }
        // Without waiting: opening a pipe for reading would last until somebody writes into it.
        let file = try Descriptor.open(path, flags | O_NONBLOCK)
        file.makeBlocking()
        return try RawFileDevice(file, name: path, options)
    }

    /// A device over an open regular file, which it keeps open.
    ///
    /// - Throws: `BlockError`: no regular file, or no O_DIRECT though asked for.
    public init(_ file: Descriptor, name: String, _ options: RawOptions = RawOptions()) throws(BlockError) {
        let status = try file.status()
        guard status.st_mode & S_IFMT == S_IFREG else {
            throw BlockError(.invalid, "opening \(name) as a disk: it is neither a regular file nor a block device")
        }
        var info = DeviceInfo(size: UInt64(clamping: status.st_size), format: "raw", name: name)
        info.isReadOnly = !options.isWritable
        info.preferredBlock = UInt32(clamping: max(4096, min(status.st_blksize, 1 << 20))).powerOfTwo
        info.writesArePrompt = options.isWritable && !options.isDirect
        info.canZeroFast = options.isWritable
        info.canDiscard = options.isWritable
        var traits: FileTraits = probeTryable(file.number) && !options.isDirect ? .tryable : []
        if !options.isDirect && dg_is_in_memory(file.number) { traits.insert(.memory) }
        if options.isDirect {
            let alignment = try directAlignment(file.number, name: name)
            traits = traits.union(.direct).aligned(to: alignment)
            info.preferredBlock = max(info.preferredBlock, alignment)
        }
        self.info = info
        storage = RawStorage(file, status: status, traits: traits, info: info)
    }

    public func map(_ range: Range<UInt64>, _ patience: Patience, into extents: inout ExtentList) throws(BlockError)
        -> UInt64
    { storage.map(range, into: &extents) }

    public func status(_ context: StatusContext, of range: Range<UInt64>, into list: inout StatusList)
        throws(BlockError) -> UInt64
    {
        switch context {
        case .depth: return list.append(range.count64, 1) ? range.upperBound : range.lowerBound
        case .dirtyBitmap:
            throw BlockError(.invalid, "asking \(info.name) for a dirty bitmap: a raw file has none")
        case .allocation: return try allocation(of: range, into: &list)
        }
    }

    private func allocation(of range: Range<UInt64>, into list: inout StatusList) throws(BlockError) -> UInt64 {
        var position = range.lowerBound
        while position < range.upperBound {
            let data = try seek(position, SEEK_DATA, limit: range.upperBound)
            if data > position {
                let hole = AllocationFlags.hole | AllocationFlags.zero
                if !list.append(data - position, hole) { return position }
                position = data
                if position == range.upperBound { break }
            }
            let end = try seek(position, SEEK_HOLE, limit: range.upperBound)
            // Somebody may punch or write between the two questions: whatever is unclear is data.
            let length = max(end, position + 1) - position
            if !list.append(length, AllocationFlags.data) { return position }
            position += length
        }
        return position
    }

    /// The next offset of data or of a hole from `position`, at most `limit`.
    private func seek(_ position: UInt64, _ what: Int32, limit: UInt64) throws(BlockError) -> UInt64 {
        let unknown = what == SEEK_DATA ? position : limit
        if seekRefused.load(ordering: .relaxed) { return unknown }
        let found = lseek(storage.descriptor.number, off_t(truncatingIfNeeded: position), what)
        if found >= 0 { return min(max(UInt64(found), position), limit) }
        switch errno {
        case ENXIO:
            // No data from here to the end of the file. A file that has shrunk has lost data, not got a hole.
            if UInt64(clamping: try storage.descriptor.status().st_size) >= limit { return limit }
            throw BlockError(
                .inputOutput, "looking for holes at \(position) of \(info.name): it is shorter than when it was opened")
        case EINVAL, EOPNOTSUPP:
            seekRefused.store(true, ordering: .relaxed)
            return unknown
        default: throw BlockError(errno: errno, "looking for holes at \(position) of \(info.name)")
        }
    }

    public func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64, durable: Bool) throws(BlockError) {
        try storage.write(bytes, at: offset, durable: durable)
    }

    public func zero(_ range: Range<UInt64>, _ options: ZeroOptions) throws(BlockError) {
        try storage.requireWritable("zeroing a range of")
        var done = false
        if options.contains(.mayPunch) { done = try allocate(FALLOC_FL_PUNCH_HOLE, range) }
        if !done { done = try allocate(FALLOC_FL_ZERO_RANGE, range) }
        if !done {
            if options.contains(.fastOnly) {
                throw BlockError(.unsupported, "zeroing a range of \(info.name) fast: its file system cannot")
            }
            try writeZeros(to: self, range)
        }
        if options.contains(.durable) { try flush() }
    }

    public func discard(_ range: Range<UInt64>, durable: Bool) throws(BlockError) {
        try storage.requireWritable("discarding a range of")
        if try allocate(FALLOC_FL_PUNCH_HOLE, range), durable { try flush() }
    }

    /// fallocate(2) on a range that stays inside the file; false when the file system does not know the operation.
    private func allocate(_ operation: Int32, _ range: Range<UInt64>) throws(BlockError) -> Bool {
        let parts = (range.lowerBound | range.count64) & (storage.alignment - 1) != 0
        while true {
            // Only writes with O_DIRECT read parts of sectors and write them back.
            let error = storage.sectorLock.withLock(alone: parts) {
                let result = fallocate(
                    storage.descriptor.number, operation | FALLOC_FL_KEEP_SIZE,
                    off_t(truncatingIfNeeded: range.lowerBound),
                    off_t(truncatingIfNeeded: range.count64))
                return result == 0 ? 0 : errno
            }
            if error == 0 { return true }
            switch error {
            case EINTR: continue
            case EOPNOTSUPP, ENOSYS: return false
            default:
                throw BlockError(errno: error, "zeroing \(range.count64) bytes at \(range.lowerBound) of \(info.name)")
            }
        }
    }

    public func flush() throws(BlockError) { try storage.flush() }

    public func prefetch(_ range: Range<UInt64>) { storage.prefetch(range) }
}

extension UInt32 {
    /// The largest power of two that is not greater; 1 for 0.
    var powerOfTwo: UInt32 { self == 0 ? 1 : 1 << UInt32(31 - leadingZeroBitCount) }
}
