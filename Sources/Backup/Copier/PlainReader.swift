// A worker that reads piece by piece, for sources on this machine and for formats over whatever they lie on.
import Block
import Glibc
import LinuxIO

/// Reads a piece, writes it, and so on: with files in the page cache nothing is faster.
final class PlainReader {
    private let crew: CopyCrew
    private let device: any BlockDevice
    private let buffer: Buffer
    private let pieceBytes: UInt64
    private var clones = true
    private var extents = ExtentList(capacity: 16)

    init(_ crew: CopyCrew) {
        self.crew = crew
        device = crew.source.device
        pieceBytes = UInt64(max(crew.target.pieceBytes, Int(crew.target.granularity)))
        buffer = Buffer(count: Int(pieceBytes), inHugePages: true)
    }

    /// Works until nothing is left.
    ///
    /// - Throws: what source or target says.
    func run() throws(BlockError) {
        while case .work(let segment) = crew.take(mayWait: true) {
            if segment.kind == .zero {
                try crew.deliverZeros(segment.range, of: segment)
                continue
            }
            if try clone(segment) { continue }
            device.prefetch(segment.range)
            var position = segment.range.lowerBound
            while position < segment.range.upperBound && !crew.stop.isCancelled {
                let end = min(position + pieceBytes, segment.range.upperBound)
                let piece = UnsafeMutableRawBufferPointer(rebasing: buffer.bytes[..<Int(end - position)])
                crew.pay(end - position)
                try read(into: piece, at: position)
                try crew.deliver(UnsafeRawBufferPointer(piece), at: position, of: segment)
                position = end
            }
        }
    }

    private func read(into piece: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(BlockError) {
        var attempts = 0
        while true {
            do throws(BlockError) {
                return try device.read(into: piece, at: offset)
            } catch {
                attempts += 1
                let isWorthIt = error.kind == .inputOutput || error.kind == .shutdown
                if attempts > crew.options.retries || !isWorthIt || crew.stop.isCancelled { throw error }
                crew.countRetry()
                usleep(UInt32(50_000 << min(attempts, 5)))
            }
        }
    }

    /// Lets the target share the segment's blocks with the source, if all of them lie in one file.
    private func clone(_ segment: CopySegment) throws(BlockError) -> Bool {
        if !clones { return false }
        extents.removeAll()
        let end = try device.map(segment.range, .blocking, into: &extents)
        guard end == segment.range.upperBound, extents.count == 1, case .file(let file, let offset) = extents[0].place
        else { return false }
        clones = try crew.deliverClone(of: file, from: offset, to: segment.range, of: segment)
        return clones
    }
}
