// Disks without a disk: memory (memory:SIZE), scratch space for overlays, and a repeatable pattern (pattern:SIZE).
public import Block
import CLinux
import Glibc

/// Makes devices over files that have no name: memory, or unlinked scratch space.
public enum NamelessFile {
    /// A writable disk of `size` bytes in memory, all zeros, gone when it is closed.
    public static func memory(size: UInt64) throws(BlockError) -> RawFileDevice {
        let number = dg_memfd("diskgate")
        if number < 0 { throw BlockError(errno: -number, "making a disk in memory") }
        return try sized(Descriptor(owning: number), size: size, name: "memory:\(size)")
    }

    /// Where scratch space goes that nobody chose a place for: TMPDIR, or /var/tmp.
    public static var scratchDirectory: String { getenv("TMPDIR").map { String(cString: $0) } ?? "/var/tmp" }

    /// A writable sparse disk of `size` bytes in a directory, all zeros, that no crash can leave behind.
    public static func scratch(size: UInt64, directory: String) throws(BlockError) -> RawFileDevice {
        do throws(BlockError) {
            let file = try Descriptor.open(directory, O_TMPFILE | O_RDWR)
            return try sized(file, size: size, name: "scratch in \(directory)")
        } catch { throw error.during("making scratch space in \(directory) (TMPDIR chooses another place)") }
    }

    private static func sized(_ file: Descriptor, size: UInt64, name: String) throws(BlockError) -> RawFileDevice {
        guard let length = off_t(exactly: size) else {
            throw BlockError(.invalid, "making \(name): \(size) bytes are more than a file can have")
        }
        if ftruncate(file.number, length) < 0 { throw BlockError(errno: errno, "sizing \(name) to \(size) bytes") }
        var options = RawOptions()
        options.isWritable = true
        return try RawFileDevice(file, name: name, options)
    }
}

/// A disk whose bytes follow from their offset and a seed: for tests and benchmarks of any size without storage.
///
/// 64 KiB chunks are data or holes, chosen by the seed; every 8 bytes of data are a mix of the seed and their offset.
public final class PatternDevice: BlockDevice {
    /// Bytes that are allocated or not together.
    public static let chunkSize: UInt64 = 65536

    public let info: DeviceInfo
    private let seed: UInt64
    /// A chunk is data where its 32-bit hash is below this.
    private let threshold: UInt64
    private let handle: SourceHandle

    /// A pattern of `size` bytes.
    ///
    /// - Parameter allocatedShare: the share of chunks that hold data, from 0 to 1.
    /// - Throws: `.invalid` for a size of 0 or above 2^63-1, or a share outside its range.
    public init(size: UInt64, seed: UInt64 = 0, allocatedShare: Double = 1) throws(BlockError) {
        guard size > 0, size <= UInt64(Int64.max), allocatedShare >= 0, allocatedShare <= 1 else {
            throw BlockError(.invalid, "making a pattern: the size is 1 to 2^63-1 bytes, the share from 0 to 1")
        }
        info = DeviceInfo(size: size, format: "pattern", name: "pattern:\(size)")
        self.seed = seed
        threshold = UInt64(allocatedShare * 4294967296)
        handle = SourceHandle(Generator(seed: seed))
    }

    private func isData(_ chunk: UInt64) -> Bool { Generator.mix(chunk ^ ~seed) & 0xFFFF_FFFF < threshold }

    public func map(_ range: Range<UInt64>, _ patience: Patience, into extents: inout ExtentList) throws(BlockError)
        -> UInt64
    {
        // One run, which could be 2^47 chunks.
        if threshold == 0 || threshold > UInt64(UInt32.max) {
            let place: Place =
                threshold == 0 ? .zeros(allocated: false) : .source(handle.reference, offset: range.lowerBound)
            return extents.append(range.count64, place) ? range.upperBound : range.lowerBound
        }
        var position = range.lowerBound
        while position < range.upperBound {
            let chunk = position / Self.chunkSize
            let end = min(range.upperBound, (chunk + 1).multipliedReportingOverflow(by: Self.chunkSize).partialValue)
            let place: Place =
                isData(chunk) ? .source(handle.reference, offset: position) : .zeros(allocated: false)
            if !extents.append(end - position, place) { break }
            position = end
        }
        return position
    }

    private final class Generator: ByteSource {
        let isPrompt = true
        private let seed: UInt64

        init(seed: UInt64) { self.seed = seed }

        @inline(__always)
        static func mix(_ value: UInt64) -> UInt64 {
            var z = value &* 0x9E37_79B9_7F4A_7C15
            z = (z ^ (z >> 32)) &* 0xD6E8_FEB8_6659_FD93
            return z ^ (z >> 32)
        }

        func read(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(BlockError) {
            let seed = seed
            var position = offset
            var done = 0
            // Unaligned ends byte by byte, the rest word by word.
            while done < buffer.count && (position & 7 != 0 || buffer.count - done < 8) {
                let word = Self.mix((position >> 3) &+ seed)
                buffer[done] = UInt8(truncatingIfNeeded: word >> ((position & 7) * 8))
                done += 1
                position += 1
            }
            while buffer.count - done >= 8 {
                buffer.storeBytes(
                    of: Self.mix((position >> 3) &+ seed).littleEndian, toByteOffset: done, as: UInt64.self)
                done += 8
                position += 8
            }
            while done < buffer.count {
                let word = Self.mix((position >> 3) &+ seed)
                buffer[done] = UInt8(truncatingIfNeeded: word >> ((position & 7) * 8))
                done += 1
                position += 1
            }
        }
    }
}
