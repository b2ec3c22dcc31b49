// Persistent dirty bitmaps of a qcow2 image: their directory, and what one says of a range, read where it lies.
import Block

/// A dirty bitmap that an image holds. Its bits stay in the file and are read when they are asked for, so memory does
/// not depend on its size.
public struct Qcow2Bitmap: Sendable {
    /// The most bytes a directory may have: thousands of bitmaps.
    private static let directoryBytesMax: UInt64 = 4 << 20
    /// The most bytes of bits one bitmap may have: qemu's limit.
    private static let bitBytesMax: UInt64 = 512 << 20

    /// The bitmap's name.
    public let name: String
    /// Bytes of disk that one bit stands for; 0 when that is not known.
    public let granularity: UInt64
    /// Why the bitmap cannot be used, nil when it can.
    public let problem: String?
    private let granularityBits: UInt64
    private let tableOffset: UInt64

    private init(name: String, granularityBits: UInt64, tableOffset: UInt64, problem: String?) {
        self.name = name
        self.granularityBits = granularityBits
        granularity = granularityBits < 64 ? 1 << granularityBits : 0
        self.tableOffset = tableOffset
        self.problem = problem
    }

    /// The bitmaps of an image. What is wrong with one is said in its `problem`: the disk's data does not depend on it.
    ///
    /// - Throws: what reading the directory throws.
    static func directory(of image: Qcow2Image) throws(BlockError) -> [Qcow2Bitmap] {
        guard let found = image.header.bitmapExtension, found.count > 0 else { return [] }
        func unusable(_ problem: String) -> [Qcow2Bitmap] {
            [Qcow2Bitmap(name: "", granularityBits: 64, tableOffset: 0, problem: problem)]
        }
        guard found.directorySize <= directoryBytesMax, found.directorySize >= 24,
            found.directoryOffset & image.geometry.clusterMask == 0, found.directoryOffset < image.lowerSize,
            found.directorySize <= image.lowerSize - found.directoryOffset
        else {
            return unusable(
                "the directory of \(found.count) dirty bitmaps, \(found.directorySize) bytes at "
                    + "\(found.directoryOffset), does not lie in the file or is too large")
        }
        let buffer = Buffer(count: Int(found.directorySize))
        do throws(BlockError) {
            try image.lower.read(into: buffer.bytes, at: found.directoryOffset)
        } catch { throw error.during("reading the dirty bitmaps of \(image.name)") }
        var bitmaps: [Qcow2Bitmap] = []
        var rest = buffer.readable
        while !rest.isEmpty {
            guard let length = entryLength(rest) else {
                return bitmaps + unusable("entry \(bitmaps.count) of the directory does not fit into it")
            }
            bitmaps.append(entry(UnsafeRawBufferPointer(rebasing: rest[..<length]), image))
            rest = UnsafeRawBufferPointer(rebasing: rest[length...])
        }
        if bitmaps.count != Int(found.count) {
            return bitmaps.map { $0.with(problem: "the directory has \(bitmaps.count) entries, not \(found.count)") }
        }
        let names = Dictionary(bitmaps.map { ($0.name, 1) }, uniquingKeysWith: +)
        return bitmaps.map { names[$0.name] == 1 ? $0 : $0.with(problem: "several dirty bitmaps have this name") }
    }

    private func with(problem: String) -> Qcow2Bitmap {
        Qcow2Bitmap(
            name: name, granularityBits: granularityBits, tableOffset: tableOffset, problem: self.problem ?? problem)
    }

    /// The length of the entry that starts the buffer, with its padding; nil when it does not fit.
    private static func entryLength(_ bytes: UnsafeRawBufferPointer) -> Int? {
        guard bytes.count >= 24 else { return nil }
        let extra = Int(bytes.bigEndian(20, as: UInt32.self))
        let name = Int(bytes.bigEndian(18, as: UInt16.self))
        let length = (24 + extra + name + 7) & ~7
        return length <= bytes.count ? length : nil
    }

    private static func entry(_ bytes: UnsafeRawBufferPointer, _ image: Qcow2Image) -> Qcow2Bitmap {
        let table = bytes.bigEndian(0, as: UInt64.self)
        let tableEntries = UInt64(bytes.bigEndian(8, as: UInt32.self))
        let flags = bytes.bigEndian(12, as: UInt32.self)
        let extra = Int(bytes.bigEndian(20, as: UInt32.self))
        let nameLength = Int(bytes.bigEndian(18, as: UInt16.self))
        let nameBytes = bytes[(24 + extra)..<(24 + extra + nameLength)]
        let bits = UInt64(bytes[17])
        let clusterSize = image.header.clusterSize
        var problem: String?
        func check(_ condition: Bool, _ text: String) { if problem == nil, !condition { problem = text } }
        check(image.header.bitmapsAreValid, "the image was changed by a program that does not know dirty bitmaps")
        check(flags & 1 == 0, "it was in use when its writer ended, so it may miss changes")
        check(bytes[16] == 1, "it is of type \(bytes[16]), not a dirty bitmap")
        check(flags & ~7 == 0, "it has flags that are not known")
        check(extra == 0 || flags & 4 != 0, "it has extra data that is not known")
        check(bits >= 9 && bits <= 31, "its granularity of 2^\(bits) bytes is not allowed")
        check(nameLength > 0 && nameLength <= 1023, "its name has \(nameLength) bytes (1 to 1023 are allowed)")
        if problem == nil {
            let count = (image.header.size >> bits) + (image.header.size & ((1 << bits) - 1) == 0 ? 0 : 1)
            let covered = tableEntries.multipliedReportingOverflow(by: clusterSize)
            check(!covered.overflow && covered.partialValue <= bitBytesMax, "it is larger than 512 MiB")
            check(tableEntries > 0 && covered.partialValue * 8 >= count, "it is too short for the disk")
            check(table & (clusterSize - 1) == 0 && table != 0, "its table is not aligned to a cluster")
            check(
                table < image.lowerSize && tableEntries * 8 <= image.lowerSize - table,
                "its table lies outside the file")
        }
        return Qcow2Bitmap(
            name: String(decoding: nameBytes, as: UTF8.self), granularityBits: min(bits, 64), tableOffset: table,
            problem: problem)
    }

    /// Appends 1 for what changed and 0 for what did not, as `BlockDevice.status`.
    func status(in image: Qcow2Image, of range: Range<UInt64>, into list: inout StatusList) throws(BlockError)
        -> UInt64
    {
        // One cluster of bits stands for this much of the disk, at most 2^(21 + 3 + 31).
        let reachBits = image.geometry.clusterBits + 3 + granularityBits
        var position = range.lowerBound
        while position < range.upperBound {
            let index = position >> reachBits
            let end = min(range.upperBound, (index + 1) << reachBits)
            let word = Buffer(count: 8)
            try read(word, in: image, at: tableOffset + index * 8)
            let entry = word.readable.bigEndian(0, as: UInt64.self)
            let host = entry & Qcow2Geometry.offsetMask
            guard host & image.geometry.clusterMask == 0, entry & 0xFF00_0000_0000_01FE == 0,
                host == 0 || (entry & 1 == 0 && host < image.lowerSize)
            else { throw image.corrupt("the dirty bitmap \"\(name)\" has a wrong entry for guest offset \(position)") }
            let done =
                if host == 0 {
                    list.append(end - position, UInt32(entry & 1)) ? end : position
                } else {
                    try appendBits(in: image, host: host, of: position..<end, into: &list)
                }
            if done < end { return done }
            position = end
        }
        return position
    }

    /// Appends the bits of a range that lies in one cluster of bits, reading up to 4 KiB of them at a time.
    private func appendBits(in image: Qcow2Image, host: UInt64, of range: Range<UInt64>, into list: inout StatusList)
        throws(BlockError) -> UInt64
    {
        let clusterBytes = image.header.clusterSize
        var position = range.lowerBound
        while position < range.upperBound {
            let firstByte = (position >> (granularityBits + 3)) & (clusterBytes - 1)
            let lastByte = ((range.upperBound - 1) >> (granularityBits + 3)) & (clusterBytes - 1)
            let buffer = Buffer(count: Int(min(lastByte - firstByte + 1, 4096)))
            try read(buffer, in: image, at: host + firstByte)
            // The bit that the buffer starts with, counted from the start of the disk.
            let base = (position >> (granularityBits + 3)) << 3
            let bitEnd = base + UInt64(buffer.bytes.count) * 8
            while position < range.upperBound, position >> granularityBits < bitEnd {
                let first = position >> granularityBits
                let value = Self.bit(buffer, first - base)
                var next = first + 1
                while next < bitEnd, Self.bit(buffer, next - base) == value {
                    // Whole bytes of the same value at once.
                    let isWholeByte = next & 7 == 0 && buffer.bytes[Int((next - base) >> 3)] == (value == 0 ? 0 : 0xFF)
                    next += isWholeByte ? 8 : 1
                }
                let end = min(next << granularityBits, range.upperBound)
                if !list.append(end - position, value) { return position }
                position = end
            }
        }
        return position
    }

    @inline(__always)
    private static func bit(_ buffer: borrowing Buffer, _ index: UInt64) -> UInt32 {
        UInt32(buffer.bytes[Int(index >> 3)] >> UInt8(index & 7)) & 1
    }

    private func read(_ buffer: borrowing Buffer, in image: Qcow2Image, at offset: UInt64) throws(BlockError) {
        guard offset < image.lowerSize, UInt64(buffer.bytes.count) <= image.lowerSize - offset else {
            throw image.corrupt("the dirty bitmap \"\(name)\" lies outside the file")
        }
        do throws(BlockError) {
            try image.lower.read(into: buffer.bytes, at: offset)
        } catch { throw error.during("reading the dirty bitmap \"\(name)\" of \(image.name)") }
    }
}
