// File descriptors of VMFS: a lock block, then what a file is, then the addresses of its blocks or its bytes.
import Block

/// Who uses a file, as its lock says. A reader does not take locks; it only tells.
public struct VMFSLock: Sendable, Equatable {
    /// How a file is locked.
    public enum Mode: Sendable, Equatable, CustomStringConvertible {
        /// By nobody.
        case free
        /// By one host that may write it: a running VM, or a copy that is being made.
        case exclusive
        /// By hosts that read it: the base disks of a running VM with snapshots.
        case readOnly
        /// By several hosts that may all write it.
        case multiWriter
        /// A mode that is not known.
        case unknown(UInt32)

        init(_ value: UInt32) {
            switch value {
            case 0: self = .free
            case 1: self = .exclusive
            case 2: self = .readOnly
            case 3: self = .multiWriter
            default: self = .unknown(value)
            }
        }

        public var description: String {
            switch self {
            case .free: "free"
            case .exclusive: "exclusive"
            case .readOnly: "read-only"
            case .multiWriter: "multi-writer"
            case .unknown(let value): "unknown (\(value))"
            }
        }
    }

    /// How the file is locked.
    public let mode: Mode
    /// The UUID of the host that has, or had, it.
    public let owner: VMFSUUID
    /// Grows with every lock that is taken.
    public let token: UInt64
    /// Where the owner's heartbeat lies on the volume, in bytes.
    let heartbeatOffset: UInt64
    let heartbeatGeneration: UInt64

    /// Nobody's.
    static let none = VMFSLock(
        mode: .free, owner: VMFSUUID(ZeroPage.bytes, at: 0), token: 0, heartbeatOffset: 0, heartbeatGeneration: 0)
}

/// What a file is.
public enum VMFSFileKind: Sendable, Equatable, CustomStringConvertible {
    case directory, file, symbolicLink, system
    /// A raw device mapping: a LUN under the name of a file.
    case rawDevice
    /// A kind that is not known.
    case unknown(UInt32)

    init(_ value: UInt32) {
        switch value {
        case 2: self = .directory
        case 3: self = .file
        case 4: self = .symbolicLink
        case 5: self = .system
        case 6: self = .rawDevice
        default: self = .unknown(value)
        }
    }

    public var description: String {
        switch self {
        case .directory: "directory"
        case .file: "file"
        case .symbolicLink: "symbolic link"
        case .system: "system file"
        case .rawDevice: "raw device mapping"
        case .unknown(let value): "unknown (\(value))"
        }
    }
}

/// A file descriptor.
struct VMFSDescriptor: Sendable {
    /// How a file's bytes are found ("ZLA"). On disk: 1, 2, 3 or 5, 4304, 4305.
    enum Addressing: Sendable, Equatable {
        /// Addresses of file blocks.
        case direct
        /// Addresses of sub-blocks.
        case subBlocks
        /// Addresses of pointer blocks.
        case single
        /// Addresses of pointer blocks with addresses of pointer blocks.
        case double
        /// In the descriptor itself.
        case resident
        /// Nowhere: a raw device mapping.
        case none
    }

    /// The type of the lock block of a descriptor.
    private static let lockType: UInt32 = 0x10C0_0001
    /// The magic number in VMFS 6's metadata.
    private static let magic: UInt32 = 0x6664_6D64
    /// The largest file that is read: a little more than ESXi can make (62 TiB).
    static let sizeMax: UInt64 = 64 << 40

    let address: UInt32
    /// Where the descriptor lies on the volume.
    let position: UInt64
    let lock: VMFSLock
    let generation: UInt32
    let kind: VMFSFileKind
    let size: UInt64
    let blockSize: UInt64
    let blockCount: UInt64
    let modifiedSeconds: UInt32
    let addressing: Addressing
    let unwrittenBlockCount: UInt64
    /// All of it.
    let bytes: [UInt8]

    /// Takes a descriptor apart.
    ///
    /// - Parameters:
    ///   - address: what it was looked up by.
    ///   - position: where it was read from.
    /// - Throws: `.corrupt` when it does not belong there or cannot be right.
    init(_ bytes: [UInt8], address: UInt32, at position: UInt64, _ geometry: VMFSGeometry) throws(BlockError) {
        func corrupt(_ what: String) -> BlockError {
            BlockError(.corrupt, "the file descriptor 0x\(hexadecimal(address, 8)) at \(position) \(what)")
        }
        guard bytes.count == geometry.descriptorSize else { throw corrupt("is cut short") }
        self.bytes = bytes
        self.address = address
        self.position = position
        let fields = bytes.withUnsafeBytes { Fields($0, metadata: geometry.metadataOffset) }
        guard fields.lockType == Self.lockType, fields.ownPosition == position else {
            throw corrupt("does not begin with its lock")
        }
        guard fields.ownAddress == address, !geometry.isVMFS6 || fields.magic == Self.magic else {
            throw corrupt("is another's, or none")
        }
        lock = fields.lock
        generation = fields.generation
        kind = VMFSFileKind(fields.type)
        size = fields.size
        blockSize = fields.blockSize
        blockCount = fields.blockCount
        modifiedSeconds = fields.modified
        unwrittenBlockCount = fields.unwritten
        guard size <= Self.sizeMax || kind == .rawDevice else { throw corrupt("is of a file of \(size) bytes") }
        switch fields.addressing {
        case 1: addressing = .direct
        case 2: addressing = .subBlocks
        case 3, 5: addressing = .single
        case 0x10D0: addressing = .double
        case 0x10D1: addressing = .resident
        case 0 where kind == .rawDevice: addressing = .none
        case let other: throw corrupt("has addresses of an unknown kind, \(other)")
        }
        let unit = addressing == .subBlocks ? geometry.subBlockSize : geometry.blockSize
        guard addressing == .none || addressing == .resident || blockSize == unit else {
            throw corrupt("claims blocks of \(blockSize) bytes where blocks have \(unit)")
        }
        guard addressing != .resident || size <= UInt64(geometry.residentSize) else {
            throw corrupt("claims \(size) bytes in itself")
        }
    }

    private struct Fields {
        let lockType: UInt32
        let ownPosition: UInt64
        let lock: VMFSLock
        let ownAddress: UInt32
        let generation: UInt32
        let type: UInt32
        let size: UInt64
        let blockSize: UInt64
        let blockCount: UInt64
        let modified: UInt32
        let addressing: UInt32
        let unwritten: UInt64
        let magic: UInt32

        init(_ bytes: UnsafeRawBufferPointer, metadata: Int) {
            lockType = bytes.littleEndian(0)
            ownPosition = bytes.littleEndian(4)
            lock = VMFSLock(
                mode: VMFSLock.Mode(bytes.littleEndian(0x24)), owner: VMFSUUID(bytes, at: 0x28),
                token: bytes.littleEndian(0x1C), heartbeatOffset: bytes.littleEndian(0x0C),
                heartbeatGeneration: bytes.littleEndian(0x14))
            ownAddress = bytes.littleEndian(metadata)
            generation = bytes.littleEndian(metadata + 0x04)
            type = bytes.littleEndian(metadata + 0x0C)
            size = bytes.littleEndian(metadata + 0x14)
            blockSize = bytes.littleEndian(metadata + 0x1C)
            blockCount = bytes.littleEndian(metadata + 0x24)
            modified = bytes.littleEndian(metadata + 0x2C)
            addressing = bytes.littleEndian(metadata + 0x44)
            let low: UInt32 = bytes.littleEndian(metadata + 0x48)
            let high: UInt32 = bytes.littleEndian(metadata + 0x54)
            unwritten = UInt64(high) << 32 | UInt64(low)
            magic = bytes.littleEndian(metadata + 0x64)
        }
    }

    /// The addresses in the descriptor, 32-bit ones widened.
    func addresses(_ geometry: VMFSGeometry) -> [UInt64] {
        bytes.withUnsafeBytes { bytes in
            (0..<geometry.addressCount).map { index in
                let offset = geometry.addressOffset + index * geometry.addressSize
                return geometry.isVMFS6
                    ? bytes.littleEndian(offset) : UInt64(bytes.littleEndian(offset, as: UInt32.self))
            }
        }
    }

    /// The disk that a raw device mapping names.
    func diskID(_ geometry: VMFSGeometry) -> VMFSDiskID? {
        guard kind == .rawDevice, geometry.residentSize >= VMFSDiskID.length else { return nil }
        return bytes.withUnsafeBytes { VMFSDiskID($0, at: geometry.residentOffset) }
    }

    /// Whether another reading of the same descriptor is of the same file with the same bytes at the same places.
    func isSameFile(as other: VMFSDescriptor, _ geometry: VMFSGeometry) -> Bool {
        guard address == other.address, position == other.position, generation == other.generation,
            kind == other.kind, size == other.size, blockSize == other.blockSize, addressing == other.addressing,
            unwrittenBlockCount == other.unwrittenBlockCount
        else { return false }
        let payload = min(geometry.addressOffset, geometry.residentOffset)
        return bytes[payload...] == other.bytes[payload...]
    }
}
