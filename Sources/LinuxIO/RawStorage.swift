// What regular files and block nodes have in common as disks: where their bytes are, writing, flushing, prefetching.
import Block
import Glibc
import Synchronization

/// An open file or node whose bytes are the disk's bytes.
final class RawStorage: Sendable {
    /// The open file or node.
    let descriptor: Descriptor
    /// Whether it is open for writing.
    let isWriter: Bool
    /// Changes of whole sectors run side by side, changes of parts of sectors alone: a sector that is read, changed and
    /// written back must not lose what others wrote to it meanwhile.
    let sectorLock = SharedLock()
    private let name: String
    private let size: UInt64
    private let shared: FileRef
    private let stable: FileRef
    private let writers: WriterCount
    private let lost = LostWrites()

    /// The storage behind a device with these facts.
    ///
    /// - Parameter traits: what was found out about the file; whether it is stable follows from who writes it.
    init(_ descriptor: Descriptor, status: stat, traits: FileTraits, info: DeviceInfo) {
        self.descriptor = descriptor
        isWriter = !info.isReadOnly
        name = info.name
        size = info.size
        shared = FileRef(descriptor: descriptor.number, traits: traits)
        stable = FileRef(descriptor: descriptor.number, traits: traits.union(.stable))
        writers = OpenFiles.writers(of: status)
        if isWriter { writers.writers.add(1, ordering: .sequentiallyConsistent) }
    }

    deinit {
        if isWriter { writers.writers.subtract(1, ordering: .sequentiallyConsistent) }
    }

    /// One run: the bytes as they are, stable as long as nobody in this process writes the file.
    func map(_ range: Range<UInt64>, into extents: inout ExtentList) -> UInt64 {
        let reference = writers.writers.load(ordering: .relaxed) == 0 ? stable : shared
        let added = extents.append(range.count64, .file(reference, offset: range.lowerBound))
        return added ? range.upperBound : range.lowerBound
    }

    /// Bytes that changes have to be aligned to, or go alone; 1 where they need not.
    var alignment: UInt64 { shared.traits.alignment }

    func requireWritable(_ doing: String) throws(BlockError) {
        if !isWriter { throw BlockError(.readOnly, "\(doing) \(name): it is open for reading only") }
    }

    func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64, durable: Bool) throws(BlockError) {
        try requireWritable("writing to")
        do throws(BlockError) {
            guard durable else { return try write(bytes, at: offset, flags: 0) }
            try lost.guarding(name) { () throws(BlockError) in try write(bytes, at: offset, flags: RWF_DSYNC) }
        } catch { throw error.during("writing to \(name)") }
    }

    private func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64, flags: Int32) throws(BlockError) {
        if shared.traits.contains(.direct) {
            try writeDirect(shared, bytes, at: offset, size: size, flags: flags, lock: sectorLock)
        } else {
            try writeFully(descriptor.number, bytes, at: offset, flags: flags)
        }
    }

    func flush() throws(BlockError) {
        guard isWriter else { return }
        try lost.guarding(name) { () throws(BlockError) in
            if fdatasync(descriptor.number) < 0 { throw BlockError(errno: errno, "flushing \(name)") }
        }
    }

    func prefetch(_ range: Range<UInt64>) {
        posix_fadvise(
            descriptor.number, off_t(truncatingIfNeeded: range.lowerBound),
            off_t(truncatingIfNeeded: range.count64), POSIX_FADV_WILLNEED)
    }
}
