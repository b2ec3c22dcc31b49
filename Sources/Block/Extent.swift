// Where the bytes of a disk live: the vocabulary of every map ("a disk is a map").

/// What can be said of an open file that extents point into.
@frozen public struct FileTraits: OptionSet, BitwiseCopyable, Sendable {
    public let rawValue: UInt32
    @inlinable public init(rawValue: UInt32) { self.rawValue = rawValue }

    /// Nobody in this process writes the file while it is open here, so its pages may be sent by reference (sendfile).
    @inlinable public static var stable: FileTraits { FileTraits(rawValue: 1) }
    /// Opened with O_DIRECT: reads need aligned offsets and memory, and are never tried inline.
    @inlinable public static var direct: FileTraits { FileTraits(rawValue: 2) }
    /// preadv2 with RWF_NOWAIT works on it (tmpfs, for one, refuses), so a read can be tried without blocking.
    @inlinable public static var tryable: FileTraits { FileTraits(rawValue: 4) }
    /// A file of a file system in memory: reading it never waits, even where RWF_NOWAIT is not known.
    @inlinable public static var memory: FileTraits { FileTraits(rawValue: 16) }
    /// A block node, where single sectors may fail to read.
    @inlinable public static var blockNode: FileTraits { FileTraits(rawValue: 8) }

    /// Traits with the alignment that `.direct` reads need, a power of two of at most 2^31 bytes.
    @inlinable public func aligned(to bytes: UInt32) -> FileTraits {
        let log2 = bytes <= 1 ? 0 : UInt32(31 - bytes.leadingZeroBitCount)
        return FileTraits(rawValue: (rawValue & 0x00FF_FFFF) | (log2 << 24))
    }
    /// The alignment in bytes that `.direct` reads need; 1 where none is needed.
    @inlinable public var alignment: UInt64 { 1 << UInt64((rawValue >> 24) & 31) }
}

/// An open file or block node that extents point into. It owns nothing: the device that made it keeps it open.
@frozen public struct FileRef: BitwiseCopyable, Sendable, Equatable {
    /// An open file descriptor.
    public let descriptor: Int32
    /// What can be said of the file.
    public let traits: FileTraits

    /// A reference to an open descriptor.
    @inlinable public init(descriptor: Int32, traits: FileTraits) {
        self.descriptor = descriptor
        self.traits = traits
    }
}

/// The place where the bytes of an extent live.
@frozen public enum Place: BitwiseCopyable {
    /// As they are in an open file, from this offset in bytes.
    case file(FileRef, offset: UInt64)
    /// Nowhere: they read as zeros. `allocated` tells whether storage is set aside for them.
    case zeros(allocated: Bool)
    /// Only a source can produce them, from this offset in bytes of the source's own numbering.
    case source(SourceRef, offset: UInt64)

    /// The place of the bytes `distance` further on.
    @inlinable public func advanced(by distance: UInt64) -> Place {
        switch self {
        case .file(let file, let offset): .file(file, offset: offset &+ distance)
        case .zeros: self
        case .source(let source, let offset): .source(source, offset: offset &+ distance)
        }
    }

    /// Whether bytes at `next` continue those at this place after `length` bytes.
    @inlinable func continues(after length: UInt64, with next: Place) -> Bool {
        switch (self, next) {
        case (.file(let a, let from), .file(let b, let to)): a == b && from &+ length == to
        case (.zeros(let a), .zeros(let b)): a == b
        case (.source(let a, let from), .source(let b, let to)): a == b && from &+ length == to
        default: false
        }
    }
}

/// A run of bytes at one place. It has no range: its position is the sum of the lengths before it in its list.
@frozen public struct Extent: BitwiseCopyable {
    /// Bytes in the run, never 0.
    public var length: UInt64
    /// Where the bytes live.
    public var place: Place

    /// A run of `length` bytes at one place.
    @inlinable public init(length: UInt64, place: Place) {
        self.length = length
        self.place = place
    }
}

/// Extents in order, joined where they continue each other, in storage of a fixed capacity.
public struct ExtentList: ~Copyable {
    @usableFromInline let extents: UnsafeMutablePointer<Extent>
    /// The most extents the list can hold.
    public let capacity: Int
    @usableFromInline var storedCount = 0
    @usableFromInline var storedLength: UInt64 = 0

    /// The extents in the list.
    @inlinable public var count: Int { storedCount }
    /// The bytes that the extents cover.
    @inlinable public var length: UInt64 { storedLength }

    /// An empty list with room for `capacity` extents, at least 1.
    public init(capacity: Int) {
        precondition(capacity > 0)
        self.capacity = capacity
        extents = .allocate(capacity: capacity)
    }

    deinit { extents.deallocate() }

    /// The extent at an index below `count`.
    @inlinable public subscript(index: Int) -> Extent {
        precondition(index >= 0 && index < count)
        return extents[index]
    }

    /// Empties the list.
    @inlinable public mutating func removeAll() {
        storedCount = 0
        storedLength = 0
    }

    /// Adds a run, joined to the last one where it continues it. Adding no bytes changes nothing.
    ///
    /// - Returns: false, and nothing added, when the list is full.
    @inlinable public mutating func append(_ runLength: UInt64, _ place: Place) -> Bool {
        if runLength == 0 { return true }
        if count > 0 {
            let last = extents + (count - 1)
            if last.pointee.place.continues(after: last.pointee.length, with: place) {
                last.pointee.length &+= runLength
                storedLength &+= runLength
                return true
            }
        }
        if count == capacity { return false }
        (extents + count).initialize(to: Extent(length: runLength, place: place))
        storedCount &+= 1
        storedLength &+= runLength
        return true
    }
}
