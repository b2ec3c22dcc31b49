// Reading a disk is one function over its map and its sources; no device implements it.
public import Glibc

extension BlockDevice {
    /// Fills the buffer with the bytes at `offset`, waiting for storage where it has to.
    ///
    /// Mapped again when the map's version moved meanwhile, the second time while the device holds its map still, so
    /// that the bytes were the disk's at one time, and a device that never rests is read all the same.
    ///
    /// - Throws: `.outOfRange`, or whatever the storage below reports; the buffer's content is then undefined.
    public func read(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(BlockError) {
        if buffer.count == 0 { return }
        let range = try info.check(offset: offset, length: UInt64(buffer.count))
        var extents = ExtentList(capacity: 64)
        var position = range.lowerBound
        while position < range.upperBound {
            let rest = UnsafeMutableRawBufferPointer(rebasing: buffer[Int(position - offset)...])
            let version = mapVersion
            var end = try readMapped(&extents, into: rest, at: position)
            if mapVersion != version {
                let held = UnsafeMutableRawBufferPointer(rebasing: rest[..<min(rest.count, heldMax)])
                try holdingMap(of: position..<(position + UInt64(held.count))) { () throws(BlockError) in
                    end = try readMapped(&extents, into: held, at: position)
                }
            }
            position = end
        }
    }

    /// Bytes that are read at a time while a device holds its map still: those who want to change it wait.
    private var heldMax: Int { 256 << 10 }

    /// Maps what the buffer is to hold, as far as the list takes it, and reads that.
    ///
    /// - Returns: the end of what was read.
    private func readMapped(
        _ extents: inout ExtentList, into buffer: UnsafeMutableRawBufferPointer, at position: UInt64
    ) throws(BlockError) -> UInt64 {
        let limit = position + UInt64(buffer.count)
        extents.removeAll()
        let end = try map(position..<limit, .blocking, into: &extents)
        if end <= position || end > limit || extents.length != end - position {
            throw BlockError(.inputOutput, "mapping \(info.name) at \(position): the map does not cover it")
        }
        try readExtents(
            extents, into: UnsafeMutableRawBufferPointer(rebasing: buffer[..<Int(end - position)]), at: position)
        return end
    }

    /// Fills the buffer with the bytes at `offset` if that needs no waiting: everything lies in memory already.
    ///
    /// - Returns: false, and the buffer's content undefined, when something would have to be waited for, or nobody can
    ///   tell. The range is inside the device and not empty.
    public func readResident(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(BlockError) -> Bool {
        var extents = ExtentList(capacity: 16)
        let range = offset..<(offset + UInt64(buffer.count))
        let version = mapVersion
        guard try map(range, .resident, into: &extents) == range.upperBound else { return false }
        var done = 0
        for index in 0..<extents.count {
            let part = UnsafeMutableRawBufferPointer(rebasing: buffer[done..<(done + Int(extents[index].length))])
            switch extents[index].place {
            case .zeros: part.initializeMemory(as: UInt8.self, repeating: 0)
            case .source: return false
            case .file(let file, let from): if file.tryRead(into: part, at: from) < part.count { return false }
            }
            done += part.count
        }
        return mapVersion == version
    }

    private func readExtents(
        _ extents: borrowing ExtentList, into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64
    ) throws(BlockError) {
        var done = 0
        for index in 0..<extents.count {
            let extent = extents[index]
            let part = UnsafeMutableRawBufferPointer(rebasing: buffer[done..<(done + Int(extent.length))])
            switch extent.place {
            case .zeros: part.initializeMemory(as: UInt8.self, repeating: 0)
            case .source(let source, let from): try source.source.read(into: part, at: from)
            case .file(let file, let from):
                do throws(BlockError) {
                    try file.read(into: part, at: from)
                } catch {
                    throw error.during("reading \(part.count) bytes at \(offset + UInt64(done)) of \(info.name)")
                }
            }
            done += part.count
        }
    }
}

extension FileRef {
    /// Reads from the page cache without waiting for storage.
    ///
    /// - Returns: the bytes read from the start of the buffer, fewer than asked, and perhaps none, where the rest is
    ///   not in memory, cannot be tried, or fails (which a waiting read will then tell).
    @inlinable @inline(__always)
    public func tryRead(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) -> Int {
        guard let position = off_t(exactly: offset) else { return 0 }
        guard traits.contains(.tryable) else {
            return traits.contains(.memory) ? max(pread(descriptor, buffer.baseAddress, buffer.count, position), 0) : 0
        }
        var vector = iovec(iov_base: buffer.baseAddress, iov_len: buffer.count)
        return max(preadv2(descriptor, &vector, 1, position, RWF_NOWAIT), 0)
    }

    /// Fills the buffer from the file at an offset in bytes, waiting for storage. Bounces what O_DIRECT does not take.
    ///
    /// - Throws: `.inputOutput` when the file fails or ends before the buffer is full.
    public func read(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(BlockError) {
        guard traits.contains(.direct) else { return try readAsAsked(into: buffer, at: offset) }
        let mask = max(traits.alignment, 512) - 1
        let address = UInt64(UInt(bitPattern: buffer.baseAddress))
        if (offset | UInt64(buffer.count) | address) & mask == 0 { return try readAsAsked(into: buffer, at: offset) }
        // Pieces of at most 1 MiB through an aligned buffer.
        let bounce = Buffer(count: Int(min(1 << 20, (UInt64(buffer.count) + 2 * mask) & ~mask)))
        var done = 0
        while done < buffer.count {
            let position = offset + UInt64(done)
            let start = position & ~mask
            let skip = Int(position - start)
            let take = min(buffer.count - done, bounce.bytes.count - skip)
            let whole = Int((UInt64(skip + take) + mask) & ~mask)
            let got = try readSome(into: UnsafeMutableRawBufferPointer(rebasing: bounce.bytes[..<whole]), at: start)
            if got <= skip { throw endOfFile(position) }
            let usable = min(take, got - skip)
            UnsafeMutableRawBufferPointer(rebasing: buffer[done..<(done + usable)])
                .copyMemory(from: UnsafeRawBufferPointer(rebasing: bounce.readable[skip..<(skip + usable)]))
            done += usable
        }
    }

    private func readAsAsked(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(BlockError) {
        var done = 0
        while done < buffer.count {
            let rest = UnsafeMutableRawBufferPointer(rebasing: buffer[done...])
            let got = try readSome(into: rest, at: offset + UInt64(done))
            if got == 0 { throw endOfFile(offset + UInt64(done)) }
            done += got
        }
    }

    private func readSome(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(BlockError) -> Int {
        guard let position = off_t(exactly: offset) else {
            throw BlockError(.outOfRange, "reading at \(offset): past the largest file offset")
        }
        while true {
            let got = pread(descriptor, buffer.baseAddress, buffer.count, position)
            if got >= 0 { return got }
            if errno != EINTR { throw BlockError(errno: errno, "reading the file at \(offset)") }
        }
    }

    private func endOfFile(_ offset: UInt64) -> BlockError {
        BlockError(.inputOutput, "the file ends at or before \(offset): it is shorter than when it was opened")
    }
}
