// Writes kept in a scratch device, the source untouched: serve --overlay, and the base of copy-before-write.

/// A writable view of a device that is only read. What is written goes to a scratch device at the same offset; one bit
/// per 64 KiB chunk says where a chunk lives. A bit is set after its chunk's data is in the scratch, and never cleared.
public final class OverlayDevice: BlockDevice {
    /// Bytes that move to the scratch together.
    public static let chunkSize: UInt64 = 65536

    public let info: DeviceInfo
    private let lower: any BlockDevice
    private let scratch: any BlockDevice
    private let copied: DirtyBitmap
    /// Chunks are copied up under the lock of their number modulo the count of locks.
    private let locks: [Lock]

    /// A writable view of `lower` with changes in `scratch`, which is all zeros and at least as large.
    ///
    /// - Throws: `.invalid` when the scratch is too small.
    public init(_ lower: any BlockDevice, scratch: any BlockDevice) throws(BlockError) {
        var info = lower.info
        if scratch.info.size < info.size {
            throw BlockError(.invalid, "laying an overlay over \(info.name): its scratch space is too small")
        }
        info.isReadOnly = false
        info.writesArePrompt = false
        info.canZeroFast = false
        info.canDiscard = true
        info.hasLayers = true
        info.dirtyBitmaps = []
        // Part of a chunk is read from below before it is changed, so no alignment is needed above.
        info.minimumBlock = 1
        self.info = info
        self.lower = lower
        self.scratch = scratch
        copied = try DirtyBitmap(size: info.size, granularity: Self.chunkSize)
        locks = (0..<64).map { _ in Lock() }
    }

    public var mapVersion: UInt64 { lower.mapVersion }
    public func holdingMap(of range: Range<UInt64>, _ body: () throws(BlockError) -> Void) throws(BlockError) {
        try lower.holdingMap(of: range, body)
    }

    public func map(_ range: Range<UInt64>, _ patience: Patience, into extents: inout ExtentList) throws(BlockError)
        -> UInt64
    {
        try copied.forEachRun(range) { (part, isCopied) throws(BlockError) -> UInt64 in
            try (isCopied ? scratch : lower).map(part, patience, into: &extents)
        }
    }

    public func status(_ context: StatusContext, of range: Range<UInt64>, into list: inout StatusList)
        throws(BlockError) -> UInt64
    {
        if case .dirtyBitmap = context {
            throw BlockError(.invalid, "asking \(info.name) for a dirty bitmap: an overlay has none")
        }
        return try copied.forEachRun(range) { (part, isCopied) throws(BlockError) -> UInt64 in
            switch (context, isCopied) {
            case (.depth, true): return list.append(part.count64, 1) ? part.upperBound : part.lowerBound
            case (.depth, false): return try lowerDepth(of: part, into: &list)
            case (_, true): return try scratch.status(context, of: part, into: &list)
            case (_, false): return try lower.status(context, of: part, into: &list)
            }
        }
    }

    /// Depths of the device below, one deeper.
    private func lowerDepth(of range: Range<UInt64>, into list: inout StatusList) throws(BlockError) -> UInt64 {
        var below = StatusList(capacity: list.capacity)
        _ = try lower.status(.depth, of: range, into: &below)
        var position = range.lowerBound
        for extent in below.extents {
            if !list.append(extent.length, extent.value == 0 ? 0 : extent.value + 1) { break }
            position += extent.length
        }
        return position
    }

    public func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64, durable: Bool) throws(BlockError) {
        try change(offset..<(offset + UInt64(bytes.count)), durable: durable) { (part, whole) throws(BlockError) in
            let from = Int(part.lowerBound - offset)
            let piece = UnsafeRawBufferPointer(rebasing: bytes[from..<(from + Int(part.count64))])
            if let whole {
                whole.copyMemory(from: piece)
            } else {
                try scratch.write(piece, at: part.lowerBound, durable: durable)
            }
        }
    }

    public func zero(_ range: Range<UInt64>, _ options: ZeroOptions) throws(BlockError) {
        if options.contains(.fastOnly) {
            throw BlockError(.unsupported, "zeroing a range of \(info.name) fast: an overlay may have to copy first")
        }
        // Whole chunks go at once; what is cut at the ends goes the way of writes.
        let mask = Self.chunkSize - 1
        let (up, overflow) = range.lowerBound.addingReportingOverflow(mask)
        let start = up & ~mask
        let end = range.upperBound == info.size ? range.upperBound : range.upperBound & ~mask
        guard !overflow, start < end else { return try zeroParts(range, options) }
        if range.lowerBound < start { try zeroParts(range.lowerBound..<start, options) }
        try withAllLocks(0) { () throws(BlockError) in
            try scratch.zero(start..<end, options)
            copied.set(start..<end)
        }
        if end < range.upperBound { try zeroParts(end..<range.upperBound, options) }
    }

    /// Runs the body while no chunk is being copied up: a copy made from below before would undo a change of the body.
    private func withAllLocks(_ index: Int, _ body: () throws(BlockError) -> Void) throws(BlockError) {
        if index == locks.count { return try body() }
        try locks[index].withLock { () throws(BlockError) in try withAllLocks(index + 1, body) }
    }

    private func zeroParts(_ range: Range<UInt64>, _ options: ZeroOptions) throws(BlockError) {
        let durable = options.contains(.durable)
        try change(range, durable: durable) { (part, whole) throws(BlockError) in
            if let whole {
                whole.initializeMemory(as: UInt8.self, repeating: 0)
            } else {
                try scratch.zero(part, options)
            }
        }
    }

    public func discard(_ range: Range<UInt64>, durable: Bool) throws(BlockError) {
        // Only whole chunks: reading what a partly discarded one held before costs more than it gives back.
        let mask = Self.chunkSize - 1
        let (up, overflow) = range.lowerBound.addingReportingOverflow(mask)
        let start = up & ~mask
        let end = range.upperBound == info.size ? range.upperBound : range.upperBound & ~mask
        if overflow || start >= end { return }
        try zero(start..<end, durable ? [.mayPunch, .durable] : [.mayPunch])
    }

    /// Applies a change chunk by chunk: straight to the scratch where a chunk already is there or is replaced whole,
    /// otherwise to a copy of the chunk (`whole`, the part of it that changes), which is then written to the scratch.
    private func change(
        _ range: Range<UInt64>, durable: Bool,
        _ apply: (Range<UInt64>, UnsafeMutableRawBufferPointer?) throws(BlockError) -> Void
    ) throws(BlockError) {
        var position = range.lowerBound
        while position < range.upperBound {
            let chunk = copied.chunk(of: position)
            let start = UInt64(chunk) * Self.chunkSize
            let chunkEnd = min(start + Self.chunkSize, info.size)
            let part = position..<min(chunkEnd, range.upperBound)
            if copied.isSet(chunk) {
                try apply(part, nil)
            } else {
                try locks[chunk % locks.count].withLock { () throws(BlockError) in
                    if copied.isSet(chunk) || part == start..<chunkEnd {
                        try apply(part, nil)
                    } else {
                        let copy = Buffer(count: Int(chunkEnd - start))
                        try lower.read(into: copy.bytes, at: start)
                        let from = Int(part.lowerBound - start)
                        let changed = copy.bytes[from..<(from + Int(part.count64))]
                        try apply(part, UnsafeMutableRawBufferPointer(rebasing: changed))
                        try scratch.write(copy.readable, at: start, durable: durable)
                    }
                    copied.set(chunk)
                }
            }
            position = part.upperBound
        }
    }

    public func flush() throws(BlockError) { try scratch.flush() }
    public func confirm() throws(BlockError) { try lower.confirm() }
    public func prefetch(_ range: Range<UInt64>) { lower.prefetch(range) }
}
