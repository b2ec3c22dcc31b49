// A file of a datastore as a disk: its map points into the LUNs, and it notices when the file is no longer there.
public import Block
import Glibc
import Synchronization

/// What a file was when it was opened. A file that differs in any of these is another one, or has moved.
public struct VMFSFingerprint: Sendable, Equatable {
    /// The address of the file descriptor.
    public let address: UInt32
    /// Counts the files that the descriptor was used for.
    public let generation: UInt32
    /// Bytes.
    public let size: UInt64
    /// Follows from the address of every block.
    public let layout: UInt64
}

/// A file on a VMFS datastore, read-only.
///
/// Other hosts may change the datastore at any time. Only a file that nobody writes can be read: one that is below a
/// snapshot of its VM, or whose VM is off. Even that can be deleted or moved, its blocks given to another VM. So the
/// file's place is compared with what it was when it was opened: its entry in the directory and its descriptor every
/// `VMFSOptions.recheckSeconds` while it is mapped, each pointer block whenever it is read again, and everything in
/// `recheck(.everything)`, which a backup calls before it counts. A change is an error of kind `.changed`, once and for
/// all. LUNs must be open with O_DIRECT, or caches would go on saying what was.
public final class VMFSFile: BlockDevice {
    /// What to compare.
    public enum Depth: Sendable {
        /// The entry in the directory and the descriptor: some reads.
        case descriptor
        /// The pointer blocks, too: some MiB for each TiB.
        case everything
    }

    /// The disk in the file: its own size, the name of its datastore and its path.
    public let info: DeviceInfo
    /// What the file was when it was opened.
    public let fingerprint: VMFSFingerprint
    /// Its path from the datastore's root, without symbolic links.
    public let path: String
    /// Who used the file when it was opened.
    public let lock: VMFSLock
    /// Bytes in blocks that the file has, whether they were written or not.
    public let allocatedBytes: UInt64
    /// Bytes in blocks that were never written: they read as zeros, whatever the LUN has there.
    public let unwrittenBytes: UInt64
    private let volume: VMFSVolume
    private let opened: VMFSDescriptor
    private let layout: VMFSLayout
    /// The lock's token when everything was last seen to be the same.
    private let token: Atomic<UInt64>
    /// What was wrong when the file was found to be changed.
    private let failure = Locked<BlockError?>(nil)
    /// When to look next, in nanoseconds of the coarse monotonic clock; 0 when the file was found to be changed.
    private let nextLook: Atomic<UInt64>
    private let lookInterval: UInt64?

    /// Opens what was found at a path.
    ///
    /// - Throws: `.changed` when it changes while its addresses are read, or what reading them throws.
    init(_ volume: VMFSVolume, _ place: VMFSPlace, name: String) throws(BlockError) {
        self.volume = volume
        opened = place.descriptor
        path = place.path.joined(separator: "/")
        layout = try VMFSLayout(place.descriptor, volume.resources, cacheBytes: volume.options.cacheBytes)
        lock = place.descriptor.lock
        allocatedBytes = layout.allocatedBytes
        unwrittenBytes = layout.unwrittenBytes
        fingerprint = VMFSFingerprint(
            address: opened.address, generation: opened.generation, size: opened.size, layout: layout.digest)
        var info = DeviceInfo(size: opened.size, format: "raw", name: name)
        info.preferredBlock = UInt32(clamping: min(volume.blockSize, 65536))
        info.isRotational = volume.span.info.isRotational
        info.identity = [
            ("datastore", volume.label), ("vmfs", volume.uuid.description), ("path", path),
            ("lun", volume.members.map(\.device.info.name).joined(separator: ", ")),
            // Another file of this name has another; whoever goes on with a copy has to know.
            ("version", "\(fingerprint.address)-\(fingerprint.generation)-\(fingerprint.layout)"),
        ]
        self.info = info
        token = Atomic(lock.token)
        lookInterval = volume.options.recheckSeconds.map { UInt64(min(max($0, 0.001), 1e9) * 1e9) }
        nextLook = Atomic(lookInterval.map { Self.now() &+ $0 } ?? .max)
        // Whoever changed the file while its addresses were read has changed the descriptor, too, by now.
        let again = try volume.find(path).descriptor
        guard again.isSameFile(as: opened, volume.resources.geometry), again.lock.token == lock.token else {
            throw BlockError(.changed, "it changed while it was being opened")
        }
    }

    /// Nanoseconds, some milliseconds old at most: asking costs next to nothing.
    private static func now() -> UInt64 {
        var time = timespec()
        clock_gettime(CLOCK_MONOTONIC_COARSE, &time)
        return UInt64(truncatingIfNeeded: time.tv_sec) &* 1_000_000_000 &+ UInt64(truncatingIfNeeded: time.tv_nsec)
    }

    /// Changes when the LUNs are written through this process.
    public var mapVersion: UInt64 { volume.span.mapVersion }

    /// Says where the bytes of a range live on the LUNs. Every `VMFSOptions.recheckSeconds` it looks first whether the
    /// file is still there, for which it may have to wait.
    ///
    /// - Throws: `.changed` when the file is no longer what was opened.
    public func map(_ range: Range<UInt64>, _ patience: Patience, into extents: inout ExtentList) throws(BlockError)
        -> UInt64
    {
        if nextLook.load(ordering: .relaxed) != .max, try !isFresh(patience) { return range.lowerBound }
        var position = range.lowerBound
        while position < range.upperBound {
            guard let run = try layout.run(at: position, limit: range.upperBound, patience) else { break }
            let end = position &+ run.length
            switch run.kind {
            case .data:
                let place = run.place..<(run.place &+ run.length)
                position = position &+ (try volume.span.map(place, patience, into: &extents) &- run.place)
                if position < end { return position }
            case .hole: if !extents.append(run.length, .zeros(allocated: false)) { return position }
            case .unwritten: if !extents.append(run.length, .zeros(allocated: true)) { return position }
            }
            position = end
        }
        return position
    }

    /// Starts reading the blocks of a range, as far as their addresses are in memory.
    public func prefetch(_ range: Range<UInt64>) {
        var position = range.lowerBound
        while position < range.upperBound {
            let found = try? layout.run(at: position, limit: range.upperBound, .resident)
            guard let run = found ?? nil else { return }
            if run.kind == .data { volume.span.prefetch(run.place..<(run.place &+ run.length)) }
            position = position &+ run.length
        }
    }
}

// MARK: - Whether it is still there

extension VMFSFile {
    /// Looks whether the file is still there when it is time.
    ///
    /// - Returns: false, with `.resident`, when it is time: looking may have to wait.
    @inline(__always)
    private func isFresh(_ patience: Patience) throws(BlockError) -> Bool {
        let due = nextLook.load(ordering: .relaxed)
        if Self.now() < due { return true }
        return try look(due, patience)
    }

    @inline(never)
    private func look(_ due: UInt64, _ patience: Patience) throws(BlockError) -> Bool {
        if let failure = failure.withLock({ $0 }) { throw failure }
        guard patience == .blocking, let lookInterval else { return false }
        // One of those who come now looks; the others go on, as they would have a moment ago.
        let next = Self.now() &+ lookInterval
        if nextLook.compareExchange(expected: due, desired: next, ordering: .relaxed).exchanged {
            try recheck(.descriptor)
        }
        return true
    }

    /// Compares the file with what it was when it was opened. May block.
    ///
    /// - Throws: `.changed` when it was moved, deleted or written to, from now on for every map, too; or what reading
    ///   throws.
    public func recheck(_ depth: Depth) throws(BlockError) {
        if let failure = failure.withLock({ $0 }) { throw failure }
        do throws(BlockError) {
            try volume.retrying { () throws(BlockError) in try compare(depth) }
        } catch {
            let error = error.during("looking whether \(info.name) is still what was opened")
            if error.kind == .changed {
                failure.withLock { $0 = $0 ?? error }
                nextLook.store(0, ordering: .relaxed)
            }
            throw error
        }
    }

    public func confirm() throws(BlockError) { try recheck(.everything) }

    private func compare(_ depth: Depth) throws(BlockError) {
        let geometry = volume.resources.geometry
        let now: VMFSDescriptor
        do throws(BlockError) {
            now = try volume.find(path).descriptor
        } catch  where error.kind == .notFound {
            throw BlockError(.changed, "it was deleted or moved: \(error)")
        }
        guard now.isSameFile(as: opened, geometry) else {
            throw BlockError(.changed, "it is another file now, or its size or its blocks have changed")
        }
        // Whoever takes the lock may have changed something: then everything is compared.
        let isLockedSince = now.lock.token != token.load(ordering: .relaxed)
        guard depth == .everything || isLockedSince else { return }
        guard try VMFSLayout(now, volume.resources).digest == layout.digest else {
            throw BlockError(.changed, "its blocks are not where they were")
        }
        let after = try volume.find(path).descriptor
        guard after.isSameFile(as: opened, geometry), after.lock.token == now.lock.token else {
            throw BlockError(.changed, "it changed while it was being looked at")
        }
        token.store(now.lock.token, ordering: .relaxed)
    }
}
