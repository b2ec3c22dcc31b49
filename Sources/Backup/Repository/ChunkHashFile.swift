// Writes a hash file in two passes over the same runs: the runs themselves first, then their hashes, then the header.
import Block
import Glibc
import LinuxIO

/// A hash file that is being written. It is none before `finish`.
struct ChunkHashFile: ~Copyable {
    private static let bufferBytes = 256 << 10
    private let file: Descriptor
    private let path: String
    private let diskSize: UInt64
    private var runCount: UInt64 = 0
    private var hashCount: UInt64 = 0
    private var last: ChunkHashes.Run?
    private let buffer = Buffer(count: bufferBytes)
    private var used = 0
    private var position = UInt64(ChunkHashes.headerBytes)

    /// Creates the file, which must not be there yet.
    init(creating path: String, diskSize: UInt64) throws(BlockError) {
        self.path = path
        self.diskSize = diskSize
        file = try Descriptor.open(path, O_RDWR | O_CREAT | O_EXCL)
    }

    private mutating func append(_ bytes: UnsafeRawBufferPointer) throws(BlockError) {
        var done = 0
        while done < bytes.count {
            if used == Self.bufferBytes { try writeOut() }
            let part = min(bytes.count - done, Self.bufferBytes - used)
            UnsafeMutableRawBufferPointer(rebasing: buffer.bytes[used..<(used + part)])
                .copyMemory(from: UnsafeRawBufferPointer(rebasing: bytes[done..<(done + part)]))
            used += part
            done += part
        }
    }

    private mutating func writeOut() throws(BlockError) {
        do throws(BlockError) {
            try writeFully(
                file.number, UnsafeRawBufferPointer(rebasing: buffer.readable[..<used]), at: position, flags: 0)
        } catch { throw error.during("writing the hashes \(path)") }
        position += UInt64(used)
        used = 0
    }

    /// First pass: chunks behind all that came before. Neighbours of the same kind become one run.
    mutating func add(first: UInt64, count: UInt64, isZero: Bool) throws(BlockError) {
        if let known = last, known.end == first, (known.hash == nil) == isZero {
            last?.count += count
        } else {
            try addLast()
            last = ChunkHashes.Run(first: first, count: count, hash: isZero ? nil : hashCount)
        }
        if !isZero { hashCount += count }
    }

    private mutating func addLast() throws(BlockError) {
        guard let run = last else { return }
        let bytes = Buffer(count: ChunkHashes.runBytes)
        bytes.bytes.storeBytes(of: run.first.littleEndian, as: UInt64.self)
        bytes.bytes.storeBytes(of: run.count.littleEndian, toByteOffset: 8, as: UInt64.self)
        bytes.bytes.storeBytes(of: (run.hash ?? .max).littleEndian, toByteOffset: 16, as: UInt64.self)
        try append(bytes.readable)
        runCount += 1
        last = nil
    }

    /// Ends the first pass.
    mutating func endRuns() throws(BlockError) { try addLast() }

    /// Second pass: the hashes of the runs, in their order.
    mutating func add(hashes: UnsafeRawBufferPointer) throws(BlockError) { try append(hashes) }

    /// Writes the header and puts everything on stable storage.
    mutating func finish() throws(BlockError) {
        try writeOut()
        let expected =
            UInt64(ChunkHashes.headerBytes) + runCount * UInt64(ChunkHashes.runBytes)
            + hashCount * UInt64(ChunkHashes.hashBytes)
        guard position == expected else {
            throw BlockError(.inputOutput, "writing the hashes \(path): chunks were changed meanwhile")
        }
        let header = Buffer(count: ChunkHashes.headerBytes)
        header.bytes.initializeMemory(as: UInt8.self, repeating: 0)
        header.bytes.copyBytes(from: ChunkHashes.magic)
        header.bytes.storeBytes(of: UInt32(1).littleEndian, toByteOffset: 8, as: UInt32.self)
        header.bytes.storeBytes(of: UInt32(1).littleEndian, toByteOffset: 12, as: UInt32.self)
        header.bytes.storeBytes(of: diskSize.littleEndian, toByteOffset: 16, as: UInt64.self)
        header.bytes.storeBytes(
            of: UInt32(truncatingIfNeeded: ChunkHashes.chunkSize).littleEndian, toByteOffset: 24, as: UInt32.self)
        header.bytes.storeBytes(of: runCount.littleEndian, toByteOffset: 32, as: UInt64.self)
        header.bytes.storeBytes(of: hashCount.littleEndian, toByteOffset: 40, as: UInt64.self)
        do throws(BlockError) {
            try writeFully(file.number, header.readable, at: 0, flags: 0)
        } catch { throw error.during("writing the hashes \(path)") }
        if fsync(file.number) < 0 { throw BlockError(errno: errno, "syncing the hashes \(path)") }
    }
}
