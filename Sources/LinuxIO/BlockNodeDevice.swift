// A block node (/dev/sdb, a LUN, a loop device) as a disk: sizes and limits by ioctl, identity from sysfs.
public import Block
import CLinux
import Glibc
import Synchronization

/// A block node as a disk.
public final class BlockNodeDevice: BlockDevice {
    public let info: DeviceInfo
    private let storage: RawStorage
    private let restoreWritable: Bool
    private let sector: UInt64
    /// What the LUN behind the node tells of its storage, once it was asked; nil where there is nobody to ask.
    private let provisioning = Locked<ProvisioningMap??>(nil)
    private let mayTellStorage: Bool

    /// Opens a block node.
    ///
    /// - Throws: `BlockError`: it cannot be opened (with `isExclusive` also: it is mounted or held by another), is no
    ///   block node, or tells no size.
    public static func open(_ path: String, _ options: RawOptions = RawOptions()) throws(BlockError)
        -> BlockNodeDevice
    {
        try BlockNodeDevice(openNode(path, options), name: path, options)
    }

    /// Opens a block node's descriptor as the options ask.
    ///
    /// - Throws: as `open`.
    public static func openNode(_ path: String, _ options: RawOptions) throws(BlockError) -> Descriptor {
        var flags = options.isWritable ? O_RDWR : O_RDONLY
        if options.isDirect { flags |= O_DIRECT }
        if options.isExclusive || options.isWritable { flags |= O_EXCL }
        do throws(BlockError) {
            return try Descriptor.open(path, flags)
        } catch  where error.message.contains(systemErrorText(EBUSY)) {
            throw BlockError(
                error.kind,
                "\(error.message): it is mounted, or held by LVM, RAID, multipath or another program; release it first "
                    + "(lsblk \(path) shows by whom)")
        }
    }

    /// A device over an open block node, which it keeps open.
    ///
    /// - Throws: `BlockError`: it is no block node, tells no size, or cannot be had as the options ask.
    public init(_ node: Descriptor, name: String, _ options: RawOptions) throws(BlockError) {
        let status = try node.status()
        guard status.st_mode & S_IFMT == S_IFBLK else {
            throw BlockError(.invalid, "opening \(name) as a block device: it is none")
        }
        let limits = try NodeLimits(node.number, name: name)
        if options.isWritable && limits.isReadOnly {
            throw BlockError(.readOnly, "opening \(name) for writing: the kernel holds it read-only (blockdev --setrw)")
        }
        var info = DeviceInfo(size: limits.size, format: "raw", name: name)
        info.isReadOnly = !options.isWritable
        info.minimumBlock = limits.logicalSector
        info.preferredBlock = limits.preferred
        info.writesArePrompt = options.isWritable && !options.isDirect
        info.canDiscard = options.isWritable
        var isWholeUnit = false
        if let disk = try? DiskInventory().disk(of: node) {
            info.isRotational = disk.isRotational
            info.identity = disk.identity
            let number = UInt64(status.st_rdev)
            isWholeUnit =
                (disk.address != nil || disk.isMultipathMap) && disk.major == dg_device_major(number)
                && disk.minor == dg_device_minor(number)
        }
        var diskSequence: UInt64 = 0
        if dg_block_disk_sequence(node.number, &diskSequence) == 0 {
            info.identity.append(("diskseq", String(diskSequence)))
        }
        var traits: FileTraits = .blockNode
        if options.isDirect {
            traits = traits.union(.direct).aligned(to: try directAlignment(node.number, name: name))
        } else if probeTryable(node.number) {
            traits.formUnion(.tryable)
        }
        var madeReadOnly = false
        if options.isExclusive && !options.isWritable && !limits.isReadOnly {
            let result = dg_block_guard(node.number)
            if result < 0 { throw BlockError(errno: -result, "making \(name) read-only in the kernel (BLKROSET)") }
            madeReadOnly = true
        }
        self.info = info
        // What was written here may still be in the page cache, of which the unit knows nothing.
        mayTellStorage = isWholeUnit && !options.isWritable
        storage = RawStorage(node, status: status, traits: traits, info: info)
        restoreWritable = madeReadOnly
        sector = UInt64(limits.logicalSector)
    }

    deinit {
        if restoreWritable { dg_block_unguard(storage.descriptor.number) }
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
            throw BlockError(.invalid, "asking \(info.name) for a dirty bitmap: a block device has none")
        case .allocation:
            // What another program of this machine has written is not on the unit before it is flushed.
            guard let map = storageMap(), map.isTelling, fdatasync(storage.descriptor.number) == 0 else {
                return list.append(range.count64, AllocationFlags.data) ? range.upperBound : range.lowerBound
            }
            return try map.status(of: range, into: &list)
        }
    }

    /// The map of the unit's storage; asks the unit the first time.
    private func storageMap() -> ProvisioningMap? {
        guard mayTellStorage else { return nil }
        return provisioning.withLock { known in
            if let known { return known }
            let path = SCSINode(node: storage.descriptor, unitName: info.name)
            let facts = try? LogicalUnitFacts(capacityOf: path)
            let map = facts.flatMap { $0.size == info.size ? ProvisioningMap(path, $0) : nil }
            known = .some(map)
            return map
        }
    }

    public func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64, durable: Bool) throws(BlockError) {
        try storage.write(bytes, at: offset, durable: durable)
    }

    /// The whole sectors inside a range; empty when there is none.
    private func wholeSectors(_ range: Range<UInt64>) -> Range<UInt64> {
        let start = (range.lowerBound + sector - 1) / sector * sector
        let end = range.upperBound / sector * sector
        return start..<max(start, end)
    }

    public func zero(_ range: Range<UInt64>, _ options: ZeroOptions) throws(BlockError) {
        try storage.requireWritable("zeroing a range of")
        if options.contains(.fastOnly) {
            // BLKZEROOUT falls back to writing without a word, so speed cannot be promised.
            throw BlockError(.unsupported, "zeroing a range of \(info.name) fast: a block device cannot promise it")
        }
        let whole = wholeSectors(range)
        if whole.isEmpty {
            try writeZeros(to: self, range)
        } else {
            let head = range.lowerBound..<whole.lowerBound
            let tail = whole.upperBound..<range.upperBound
            if !head.isEmpty { try writeZeros(to: self, head) }
            if !tail.isEmpty { try writeZeros(to: self, tail) }
            let result = storage.sectorLock.withLock(alone: false) {
                dg_block_zero_out(storage.descriptor.number, whole.lowerBound, whole.count64)
            }
            if result == -EOPNOTSUPP || result == -EINVAL {
                try writeZeros(to: self, whole)
            } else if result < 0 {
                throw BlockError(
                    errno: -result, "zeroing \(whole.count64) bytes at \(whole.lowerBound) of \(info.name)")
            }
        }
        if options.contains(.durable) { try flush() }
    }

    public func discard(_ range: Range<UInt64>, durable: Bool) throws(BlockError) {
        try storage.requireWritable("discarding a range of")
        let whole = wholeSectors(range)
        if whole.isEmpty { return }
        let result = dg_block_discard(storage.descriptor.number, whole.lowerBound, whole.count64)
        // Discarding is advice: a device that does not know it is left as it is.
        if result < 0 && result != -EOPNOTSUPP && result != -EINVAL {
            throw BlockError(errno: -result, "discarding \(whole.count64) bytes at \(whole.lowerBound) of \(info.name)")
        }
        if durable { try flush() }
    }

    public func flush() throws(BlockError) { try storage.flush() }

    public func prefetch(_ range: Range<UInt64>) { storage.prefetch(range) }
}

/// Sizes and limits that the kernel tells of a block node.
private struct NodeLimits {
    let size: UInt64
    let logicalSector: UInt32
    let preferred: UInt32
    let isReadOnly: Bool

    init(_ descriptor: Int32, name: String) throws(BlockError) {
        var bytes: UInt64 = 0
        let result = dg_block_size64(descriptor, &bytes)
        if result < 0 { throw BlockError(errno: -result, "asking for the size of \(name) (BLKGETSIZE64)") }
        var logical: UInt32 = 0
        var physical: UInt32 = 0
        var best: UInt32 = 0
        var readOnly = false
        _ = dg_block_logical_size(descriptor, &logical)
        _ = dg_block_physical_size(descriptor, &physical)
        _ = dg_block_io_opt(descriptor, &best)
        _ = dg_block_read_only_get(descriptor, &readOnly)
        logicalSector = min(max(logical.powerOfTwo, 512), 65536)
        // A loop device may end inside a sector, which the kernel then neither reads nor writes.
        size = bytes / UInt64(logicalSector) * UInt64(logicalSector)
        if size == 0 {
            throw BlockError(.invalid, "opening \(name): the device reports no bytes; it has no medium, or is gone")
        }
        // An optimal size that is no power of two (RAID stripes) cannot be told over NBD; the physical sector can.
        let wanted = best.nonzeroBitCount == 1 ? max(best, physical) : physical
        preferred = min(max(wanted.powerOfTwo, 4096, logicalSector), 1 << 20)
        isReadOnly = readOnly
    }
}
