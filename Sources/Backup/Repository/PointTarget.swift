// A disk of a restore point while it is written: data to the driver's file, a hash of every chunk to the sidecar.
import Block
import Formats
import Glibc
import LinuxIO
import Synchronization

/// What a driver writes a disk of a point with. The file has its `.partial` name; ranges are whole chunks, or end
/// at the disk's end; each chunk comes once.
protocol PointFile: AnyObject, Sendable {
    /// As of a copy's target.
    var pieceBytes: Int { get }
    var waitsForStorage: Bool { get }
    func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws(BlockError)
    func zero(_ range: Range<UInt64>) throws(BlockError)
    func flush() throws(BlockError)
    /// Makes the file whole and durable. Nothing is written afterwards.
    func finish() throws(BlockError)
}

/// A disk of a point as the copier sees it.
final class PointTarget: CopyTarget {
    let name: String
    let size: UInt64
    let granularity = ChunkHashes.chunkSize
    let isSequential = false
    let readsAsZeros: Bool
    var pieceBytes: Int { file.pieceBytes }
    var waitsForStorage: Bool { file.waitsForStorage }
    private let file: any PointFile
    private let hashes: ChunkHashWriter
    private let dataBytes = Atomic<UInt64>(0)

    /// - Parameter isIncremental: whether chunks that are not written read as they did at the point before.
    init(name: String, size: UInt64, isIncremental: Bool, file: any PointFile, hashes: ChunkHashWriter) {
        self.name = name
        readsAsZeros = !isIncremental
        self.size = size
        self.file = file
        self.hashes = hashes
    }

    /// Bytes of data written so far, zeros not counted.
    var bytesWritten: UInt64 { dataBytes.load(ordering: .relaxed) }

    private func check(_ range: Range<UInt64>) throws(BlockError) {
        let mask = granularity - 1
        guard range.lowerBound & mask == 0, range.upperBound & mask == 0 || range.upperBound == size,
            range.upperBound <= size, !range.isEmpty
        else {
            throw BlockError(
                .invalid, "writing \(range.count64) bytes at \(range.lowerBound) of \(name): chunks are written whole")
        }
    }

    func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws(BlockError) {
        let (end, overflow) = offset.addingReportingOverflow(UInt64(bytes.count))
        if overflow { throw BlockError(.outOfRange, "writing at \(offset) of \(name): past the end") }
        try check(offset..<end)
        try hashes.record(offset / granularity, bytes)
        try file.write(bytes, at: offset)
        dataBytes.wrappingAdd(UInt64(bytes.count), ordering: .relaxed)
    }

    func zero(_ range: Range<UInt64>) throws(BlockError) {
        try check(range)
        try hashes.recordZeros(range.lowerBound / granularity..<(range.upperBound - 1) / granularity + 1)
        try file.zero(range)
    }

    func flush() throws(BlockError) { try file.flush() }

    /// Makes data and sidecar whole and durable, under their `.partial` names.
    func finish() throws(BlockError) {
        try file.finish()
        Step.reached("seal.data-written")
        try hashes.finish()
        Step.reached("seal.hashes-written")
    }
}

/// A disk as a qcow2 image.
final class Qcow2PointFile: PointFile {
    private let writer: Qcow2Writer

    var pieceBytes: Int { writer.pieceBytes }
    var waitsForStorage: Bool { writer.waitsForStorage }

    init(
        path: String, size: UInt64, backing: String?, compression: PointCompression
    ) throws(BlockError) {
        writer = try Qcow2Writer.create(
            path, size: size, backing: backing.map { Qcow2Backing(name: $0, format: .qcow2) },
            compression: compression == .zstd ? .zstd(level: 2) : .none, keepsCache: false)
    }

    func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws(BlockError) {
        try writer.write(bytes, at: offset)
    }
    func zero(_ range: Range<UInt64>) throws(BlockError) { try writer.zero(range) }
    func flush() throws(BlockError) { try writer.flush() }
    func finish() throws(BlockError) { try writer.finish() }
}

/// A disk as a raw file, which shares what is not written with the file of the point before.
final class ReflinkPointFile: PointFile {
    let pieceBytes = 256 << 10
    let waitsForStorage = false
    private let device: RawFileDevice

    init(path: String, size: UInt64, base: String?) throws(BlockError) {
        let file = try Descriptor.open(path, O_RDWR | O_CREAT | O_EXCL)
        if let base { try cloneFile(try Descriptor.open(base, O_RDONLY), to: file, name: base) }
        if ftruncate(file.number, off_t(truncatingIfNeeded: size)) < 0 {
            throw BlockError(errno: errno, "sizing \(path) to \(size) bytes")
        }
        var options = RawOptions()
        options.isWritable = true
        device = try RawFileDevice(file, name: path, options)
    }

    func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws(BlockError) {
        try device.write(bytes, at: offset, durable: false)
    }
    func zero(_ range: Range<UInt64>) throws(BlockError) { try device.zero(range, .mayPunch) }
    func flush() throws(BlockError) { try device.flush() }
    func finish() throws(BlockError) { try device.flush() }
}
