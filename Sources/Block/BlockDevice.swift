// The contract that every disk fulfils, whatever its transport and format.

/// How long a map may take.
@frozen public enum Patience: Sendable {
    /// Reads metadata from storage where it has to.
    case blocking
    /// Never waits: stops short where metadata is not in memory.
    case resident
}

/// What a device is, fixed while it is open.
public struct DeviceInfo: Sendable {
    /// Bytes on the device.
    public var size: UInt64
    /// The smallest unit that can be addressed, a power of two from 1 to 65536 bytes.
    public var minimumBlock: UInt32 = 1
    /// The unit below which access gets slow, a power of two of at least `minimumBlock` bytes.
    public var preferredBlock: UInt32 = 4096
    /// Whether writes are refused.
    public var isReadOnly = true
    /// Whether `write` of cached data returns without waiting for storage, so that it may run on a connection's thread.
    public var writesArePrompt = false
    /// Whether `zero` can be asked to be fast and will refuse rather than write zeros (NBD_CMD_FLAG_FAST_ZERO).
    public var canZeroFast = false
    /// Whether `discard` gives storage back.
    public var canDiscard = false
    /// Whether the storage seeks (false: solid state or unknown).
    public var isRotational = false
    /// Names of the dirty bitmaps, for `StatusContext.dirtyBitmap` by index.
    public var dirtyBitmaps: [String] = []
    /// Whether `status(.depth)` says more than 1 everywhere.
    public var hasLayers = false
    /// The format as users name it: raw, qcow2, pattern.
    public var format: String
    /// What the device is to people: a path, a node, a URI.
    public var name: String
    /// How the device is known on this machine, for example serial, wwn, diskseq; in the order to print them.
    public var identity: [(key: String, value: String)] = []

    /// A read-only device of a size and format.
    public init(size: UInt64, format: String, name: String) {
        self.size = size
        self.format = format
        self.name = name
    }
}

/// How bytes are to be zeroed.
public struct ZeroOptions: OptionSet, Sendable {
    public let rawValue: UInt8
    public init(rawValue: UInt8) { self.rawValue = rawValue }

    /// Storage may be given back (NBD: NBD_CMD_FLAG_NO_HOLE not set).
    public static let mayPunch = ZeroOptions(rawValue: 1)
    /// Refuse with `.unsupported` where zeroing would be no faster than writing (NBD_CMD_FLAG_FAST_ZERO).
    public static let fastOnly = ZeroOptions(rawValue: 2)
    /// On stable storage when the call returns (NBD_CMD_FLAG_FUA).
    public static let durable = ZeroOptions(rawValue: 4)
}

/// A disk: a fixed number of bytes that can be mapped and, where `info` says so, changed.
///
/// Every call may come from any thread, several at a time. Ranges lie inside the device and are not empty: callers
/// check them (`DeviceInfo.check`), devices may trap on them.
public protocol BlockDevice: AnyObject, Sendable {
    /// What the device is. Constant while it is open.
    var info: DeviceInfo { get }

    /// Says where the bytes of a range live, appending extents that cover it from its start, in order, without gaps.
    ///
    /// - Returns: the end of what is covered: the range's end, or less when the list is full or, with `.resident`, when
    ///   metadata is not in memory. With `.blocking` and room in the list at least one byte is covered.
    /// - Throws: `BlockError` when metadata cannot be read or is corrupt; what was appended before is then void.
    func map(_ range: Range<UInt64>, _ patience: Patience, into extents: inout ExtentList) throws(BlockError) -> UInt64

    /// Changes before bytes that an earlier map pointed at may stop being the disk's bytes of that range: whoever read
    /// through a map and finds another version afterwards maps and reads again. Constant where that cannot happen.
    var mapVersion: UInt64 { get }

    /// Runs a body while the bytes of a range stay where a map made inside the body finds them: for readers that found
    /// `mapVersion` moved under them and are not to start again for ever. The body may run more than once, and what the
    /// last run did counts; it maps and reads, and does not change the device.
    ///
    /// - Throws: what the body throws.
    func holdingMap(of range: Range<UInt64>, _ body: () throws(BlockError) -> Void) throws(BlockError)

    /// Says what a context knows of a range: allocation, layers, dirty or clean. Same rules as `map(_:_:into:)` with
    /// `.blocking`; asks storage afresh.
    func status(_ context: StatusContext, of range: Range<UInt64>, into list: inout StatusList) throws(BlockError)
        -> UInt64

    /// Writes bytes; on stable storage when it returns if `durable`. May block.
    func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64, durable: Bool) throws(BlockError)

    /// Whether a write to a range, now, would return without waiting for storage. Asked where `info.writesArePrompt`
    /// says that writes usually do.
    func isPrompt(toWrite range: Range<UInt64>) -> Bool

    /// Makes a range read as zeros. May block.
    func zero(_ range: Range<UInt64>, _ options: ZeroOptions) throws(BlockError)

    /// Tells that a range's content is no longer needed; what it reads as afterwards is undefined. May block.
    func discard(_ range: Range<UInt64>, durable: Bool) throws(BlockError)

    /// Puts every write that has returned before on stable storage. May block.
    func flush() throws(BlockError)

    /// Starts reading a range into memory, as advice (NBD_CMD_CACHE). Does not wait.
    func prefetch(_ range: Range<UInt64>)

    /// Makes sure that what was read so far was this disk's, where others could have moved it meanwhile: a copy counts
    /// only after that. May block.
    ///
    /// - Throws: `.changed`, and everything read since it was opened is in doubt.
    func confirm() throws(BlockError)
}

extension BlockDevice {
    public var mapVersion: UInt64 { 0 }

    /// A device that cannot hold its map still: again, until no version moved meanwhile.
    public func holdingMap(of range: Range<UInt64>, _ body: () throws(BlockError) -> Void) throws(BlockError) {
        while true {
            let version = mapVersion
            try body()
            if mapVersion == version { return }
        }
    }

    public func isPrompt(toWrite range: Range<UInt64>) -> Bool { true }

    public func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64, durable: Bool) throws(BlockError) {
        throw BlockError(.readOnly, "writing to \(info.name): it is open for reading only")
    }
    public func zero(_ range: Range<UInt64>, _ options: ZeroOptions) throws(BlockError) {
        throw BlockError(.readOnly, "zeroing a range of \(info.name): it is open for reading only")
    }
    public func discard(_ range: Range<UInt64>, durable: Bool) throws(BlockError) {
        throw BlockError(.readOnly, "discarding a range of \(info.name): it is open for reading only")
    }
    public func flush() throws(BlockError) {}
    public func prefetch(_ range: Range<UInt64>) {}
    public func confirm() throws(BlockError) {}
}

extension DeviceInfo {
    /// The range of `length` bytes at `offset`, checked against the device's size without overflow.
    ///
    /// - Throws: `.invalid` for no bytes, `.outOfRange` when it does not lie inside the device.
    public func check(offset: UInt64, length: UInt64) throws(BlockError) -> Range<UInt64> {
        if length == 0 { throw BlockError(.invalid, "\(name): a request for no bytes at \(offset)") }
        if offset > size || length > size - offset {
            throw BlockError(.outOfRange, "\(name): \(length) bytes at \(offset) lie outside its \(size) bytes")
        }
        return offset..<(offset + length)
    }
}
