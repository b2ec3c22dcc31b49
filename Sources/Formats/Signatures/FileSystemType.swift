// Which file system a disk begins with, and the options that mount it as it is.
public import Block

/// A file system that Linux mounts, as its first bytes tell.
public struct FileSystemType: Sendable, Equatable {
    /// The kernel's name of it.
    public let name: String
    /// Whether it has a journal that would be replayed.
    public let hasJournal: Bool

    /// Recognises a file system; nil when it is none that is known here.
    ///
    /// - Throws: `BlockError` when the disk cannot be read.
    public static func recognised(on device: any BlockDevice) throws(BlockError) -> FileSystemType? {
        let count = Int(min(device.info.size, 128 << 10))
        if count < 2048 { return nil }
        let buffer = Buffer(count: count)
        try device.read(into: buffer.bytes, at: 0)
        let bytes = buffer.readable
        func has(_ text: StaticString, at offset: Int) -> Bool {
            let magic = UnsafeRawBufferPointer(start: text.utf8Start, count: text.utf8CodeUnitCount)
            return offset + magic.count <= count && bytes[offset..<(offset + magic.count)].elementsEqual(magic)
        }
        if bytes.littleEndian(1080, as: UInt16.self) == 0xEF53 {
            // s_feature_compat and s_feature_incompat of the superblock at 1024: a journal, extents.
            let hasJournal = bytes.littleEndian(1024 + 0x5C, as: UInt32.self) & 4 != 0
            let hasExtents = bytes.littleEndian(1024 + 0x60, as: UInt32.self) & 0x40 != 0
            return FileSystemType(name: hasExtents ? "ext4" : hasJournal ? "ext3" : "ext2", hasJournal: hasJournal)
        }
        if has("XFSB", at: 0) { return FileSystemType(name: "xfs", hasJournal: true) }
        if has("_BHRfS_M", at: 65600) { return FileSystemType(name: "btrfs", hasJournal: true) }
        if has("NTFS    ", at: 3) { return FileSystemType(name: "ntfs3", hasJournal: false) }
        if has("FAT1", at: 54) || has("FAT32   ", at: 82) { return FileSystemType(name: "vfat", hasJournal: false) }
        if has("CD001", at: 32769) { return FileSystemType(name: "iso9660", hasJournal: false) }
        if has("hsqs", at: 0) { return FileSystemType(name: "squashfs", hasJournal: false) }
        return nil
    }

    /// Options for mount(8). Read-only means that nothing is written, not even a journal back; XFS is to be mounted
    /// beside another one with the same UUID, as the machine's own disk may be.
    public func options(isReadOnly: Bool) -> String {
        switch (name, isReadOnly) {
        case ("xfs", true): "ro,norecovery,nouuid"
        case ("xfs", false): "rw,nouuid"
        case ("btrfs", true): "ro,rescue=nologreplay"
        case (_, true): hasJournal ? "ro,noload" : "ro"
        case (_, false): "rw"
        }
    }
}
