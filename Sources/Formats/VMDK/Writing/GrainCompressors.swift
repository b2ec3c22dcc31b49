// Grains compressed side by side and taken back in their order: zlib is what a stream-optimised VMDK takes time for.
import Block
import CZlib
import Glibc
import LinuxIO

/// One grain on its way through a compressor.
final class CompressedGrain: @unchecked Sendable {
    // Sendable because a grain is touched by whoever has it: the writer, then one compressor, then the writer.

    /// Bytes before the compressed ones: the grain's first sector on the disk, 64 bits, and the length, 32 bits.
    static let markerBytes = 12

    /// The grain as it is.
    let input = Buffer(count: StreamOptimizedWriter.grainBytes)
    /// Marker and compressed bytes, up to a whole sector with zeros behind them.
    let output: Buffer
    /// The grain's number on the disk.
    var number: UInt64 = 0
    /// Bytes of `output` that count, a multiple of 512.
    var length = 0
    /// Under the lock of the compressors.
    fileprivate var isDone = false

    init() {
        let longest = Int(compressBound(uLong(StreamOptimizedWriter.grainBytes))) + Self.markerBytes
        output = Buffer(count: (longest + 511) & ~511)
    }
}

/// Threads that compress grains.
final class GrainCompressors: @unchecked Sendable {
    // Sendable because everything that changes is touched under `lock`.

    private let lock = Lock()
    private let changed = Condition()
    private let level: Int32
    // Grains that were handed in and not taken back, in order; the first `takenCount` of them are compressed, or are
    // being compressed.
    private var queue: [CompressedGrain] = []
    private var takenCount = 0
    private var idle: [CompressedGrain] = []
    private var isStopped = false
    private var failure: BlockError?

    /// Starts the threads.
    ///
    /// - Throws: `.noMemory`, or the system's reason for not starting any.
    init(level: Int32, threads: Int) throws(BlockError) {
        self.level = level
        idle = (0..<(4 * threads)).map { _ in CompressedGrain() }
        for index in 0..<threads {
            // Fewer are enough.
            do throws(BlockError) {
                try startThread(name: "deflate-\(index)") { self.work() }
            } catch { if index == 0 { throw error } }
        }
    }

    /// Ends the threads.
    func stop() {
        lock.withLock { isStopped = true }
        changed.broadcast()
    }

    /// A grain to fill and hand in; nil while all are in use, until one is taken back and recycled.
    func free() -> CompressedGrain? { lock.withLock { idle.popLast() } }

    /// Gives back a grain whose bytes are written.
    func recycle(_ grain: CompressedGrain) { lock.withLock { idle.append(grain) } }

    /// Hands a filled grain in.
    func compress(_ grain: CompressedGrain) {
        lock.withLock {
            grain.isDone = false
            queue.append(grain)
        }
        changed.broadcast()
    }

    /// The next grain in the order in which they were handed in.
    ///
    /// - Parameter waits: whether to wait until it is compressed.
    /// - Returns: nil when there is none, or none that is compressed.
    /// - Throws: why compressing failed.
    func next(waits: Bool) throws(BlockError) -> CompressedGrain? {
        try lock.withLock { () throws(BlockError) in
            while true {
                if let failure { throw failure }
                guard let first = queue.first else { return nil }
                if first.isDone {
                    queue.removeFirst()
                    takenCount -= 1
                    return first
                }
                if !waits { return nil }
                if isStopped { throw BlockError(.shutdown, "compressing grains: it was told to stop") }
                changed.wait(holding: lock)
            }
        }
    }

    private func work() {
        var stream = z_stream()
        let size = Int32(MemoryLayout<z_stream>.size)
        guard
            deflateInit2_(&stream, level, Z_DEFLATED, 15, 8, Z_DEFAULT_STRATEGY, ZLIB_VERSION, size) == Z_OK
        else {
            lock.withLock { failure = BlockError(.noMemory, "preparing to compress grains") }
            changed.broadcast()
            return
        }
        defer { deflateEnd(&stream) }
        while let grain = take() {
            let problem = Self.deflate(grain, &stream)
            lock.withLock {
                grain.isDone = true
                if let problem { failure = failure ?? problem }
            }
            changed.broadcast()
        }
    }

    private func take() -> CompressedGrain? {
        lock.withLock {
            while !isStopped {
                if takenCount < queue.count {
                    takenCount += 1
                    return queue[takenCount - 1]
                }
                changed.wait(holding: lock)
            }
            return nil
        }
    }

    private static func deflate(_ grain: CompressedGrain, _ stream: inout z_stream) -> BlockError? {
        let output = grain.output.bytes
        deflateReset(&stream)
        stream.next_in = grain.input.bytes.baseAddress?.assumingMemoryBound(to: UInt8.self)
        stream.avail_in = UInt32(grain.input.bytes.count)
        stream.next_out =
            output.baseAddress?.advanced(by: CompressedGrain.markerBytes).assumingMemoryBound(to: UInt8.self)
        stream.avail_out = UInt32(output.count - CompressedGrain.markerBytes)
        guard CZlib.deflate(&stream, Z_FINISH) == Z_STREAM_END else {
            return BlockError(.noMemory, "compressing a grain")
        }
        let length = output.count - CompressedGrain.markerBytes - Int(stream.avail_out)
        let sector = grain.number * UInt64(StreamOptimizedWriter.grainBytes) / VMDK.sectorBytes
        output.storeBytes(of: sector.littleEndian, toByteOffset: 0, as: UInt64.self)
        output.storeBytes(of: UInt32(length).littleEndian, toByteOffset: 8, as: UInt32.self)
        let end = CompressedGrain.markerBytes + length
        grain.length = (end + 511) & ~511
        UnsafeMutableRawBufferPointer(rebasing: output[end..<grain.length])
            .initializeMemory(as: UInt8.self, repeating: 0)
        return nil
    }
}
