// Targets of a copy that are disks themselves: files, block nodes and NBD exports, and a stream.
public import Block
import CLinux
import Glibc
import LinuxIO
import Synchronization

/// A writable disk as a copy's target.
public final class DeviceTarget: CopyTarget {
    public let name: String
    public let size: UInt64
    public let granularity: UInt64
    public let isSequential = false
    public let readsAsZeros: Bool
    public let pieceBytes: Int
    public let waitsForStorage: Bool
    /// The disk.
    public let device: any BlockDevice
    private let isFile: Bool
    /// What is behind the disk, byte by byte, where it is a file or node.
    private let file: FileRef?
    private let canClone: Atomic<Bool>
    private let direct: DirectWriter?

    /// A target over a disk that is open for writing.
    ///
    /// - Parameters:
    ///   - readsAsZeros: whether the disk is new, so that all of it reads as zeros.
    ///   - isDurable: whether all of it is to be on the storage in the end; if not, it stays in memory while it may.
    public init(_ device: any BlockDevice, readsAsZeros: Bool = false, isDurable: Bool = true) {
        self.device = device
        self.readsAsZeros = readsAsZeros
        name = device.info.name
        size = device.info.size
        // Holes of less than a page are none.
        granularity = UInt64(max(device.info.minimumBlock, 4096))
        isFile = device is RawFileDevice
        canClone = Atomic(isFile)
        let place = Self.openFile(of: device)
        file = isFile || place?.traits.contains(.blockNode) == true ? place : nil
        direct = isFile && isDurable ? file.flatMap { DirectWriter($0.descriptor) } : nil
        waitsForStorage = direct != nil || file?.traits.contains(.direct) == true
        // Storage is fastest with large pieces; file systems find new memory by the MiB at the least cost.
        pieceBytes = waitsForStorage ? 4 << 20 : isFile && !isDurable ? 1 << 20 : 256 << 10
    }

    public func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws(BlockError) {
        do throws(BlockError) {
            if let direct, try direct.write(bytes, at: offset) { return }
        } catch { throw error.during("writing to \(name)") }
        try device.write(bytes, at: offset, durable: false)
    }

    public func zero(_ range: Range<UInt64>) throws(BlockError) { try device.zero(range, .mayPunch) }

    public func flush() throws(BlockError) { try device.flush() }

    private static func openFile(of device: any BlockDevice) -> FileRef? {
        let all = 0..<device.info.size
        var extents = ExtentList(capacity: 1)
        guard !all.isEmpty, let end = try? device.map(all, .blocking, into: &extents), end == all.upperBound,
            case .file(let file, 0) = extents[0].place
        else { return nil }
        return file
    }

    public func clone(_ file: FileRef, from offset: UInt64, to range: Range<UInt64>) -> Bool {
        guard let own = self.file, canClone.load(ordering: .relaxed), !file.traits.contains(.blockNode) else {
            return false
        }
        let result = dg_clone_range(file.descriptor, offset, range.count64, own.descriptor, range.lowerBound)
        // What is refused for its alignment says nothing about the rest.
        if result < 0 && result != -EINVAL { canClone.store(false, ordering: .relaxed) }
        return result == 0
    }

    public func startFlushing() {
        guard isFile, let file else { return }
        _ = sync_file_range(file.descriptor, 0, 0, UInt32(SYNC_FILE_RANGE_WRITE))
    }

    /// Lets the system forget what it keeps of the file, which is durable, so that reading it again tells what the
    /// storage has.
    func dropCache() {
        guard let file else { return }
        if isFile {
            posix_fadvise(file.descriptor, 0, 0, POSIX_FADV_DONTNEED)
        } else {
            _ = dg_block_drop_cache(file.descriptor)
        }
    }
}

/// A descriptor that takes bytes one after the other, as a pipe does.
public final class StreamTarget: CopyTarget {
    public let name: String
    public let size: UInt64
    public let granularity: UInt64 = 1
    public let isSequential = true
    private let descriptor: Int32
    private let position = Locked<UInt64>(0)

    /// A target over an open descriptor, which stays the caller's.
    ///
    /// - Parameter size: the bytes that will be written.
    public init(_ descriptor: Int32, name: String, size: UInt64) {
        self.descriptor = descriptor
        self.name = name
        self.size = size
    }

    public func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws(BlockError) {
        try position.withLock { (position) throws(BlockError) in
            guard position == offset else {
                throw BlockError(
                    .invalid, "writing to \(name): bytes at \(offset) cannot follow those up to \(position)")
            }
            try put(bytes)
            position += UInt64(bytes.count)
        }
    }

    public func zero(_ range: Range<UInt64>) throws(BlockError) {
        var start = range.lowerBound
        while start < range.upperBound {
            let count = Int(min(UInt64(ZeroPage.count), range.upperBound - start))
            try write(UnsafeRawBufferPointer(rebasing: ZeroPage.bytes[..<count]), at: start)
            start += UInt64(count)
        }
    }

    private func put(_ bytes: UnsafeRawBufferPointer) throws(BlockError) {
        var done = 0
        while done < bytes.count {
            let written = Glibc.write(descriptor, bytes.baseAddress?.advanced(by: done), bytes.count - done)
            if written > 0 {
                done += written
            } else if errno == EAGAIN {
                var poll = pollfd(fd: descriptor, events: Int16(POLLOUT), revents: 0)
                _ = Glibc.poll(&poll, 1, 1000)
            } else if errno != EINTR {
                throw BlockError(errno: errno, "writing to \(name)")
            }
        }
    }

    /// A pipe keeps nothing that could be flushed; a file behind the descriptor does.
    public func flush() throws(BlockError) {
        if fdatasync(descriptor) < 0, ![EINVAL, EROFS, ENOTSUP].contains(errno) {
            throw BlockError(errno: errno, "flushing \(name)")
        }
    }
}
