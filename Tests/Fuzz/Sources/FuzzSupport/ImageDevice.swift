// An input as a disk: what the formats parse. Bytes far apart on the disk can be close together in the input.
public import Block

/// A read-only disk whose bytes are an input's, in blocks at equal distances; everything else is zeros.
public final class ImageDevice: BlockDevice {
    public let info: DeviceInfo
    private let content: Content
    private let handle: SourceHandle

    /// A disk with the input's blocks of 512 bytes at multiples of `stride`, which is a multiple of 512.
    ///
    /// - Parameters:
    ///   - size: the disk's size; nil for where the last block ends.
    ///   - tail: the last so many of the input's bytes lie at the disk's end instead.
    public init(
        _ bytes: [UInt8], name: String, stride: UInt64 = 512, size: UInt64? = nil, tail: Int = 0,
        minimumBlock: UInt32 = 1
    ) {
        let blocks = UInt64((bytes.count + 511) / 512)
        let natural = blocks == 0 ? 0 : (blocks - 1) * stride + UInt64(bytes.count) - (blocks - 1) * 512
        let size = max(size ?? natural, UInt64(tail))
        var info = DeviceInfo(size: size, format: "raw", name: name)
        info.minimumBlock = minimumBlock
        self.info = info
        content = Content(bytes, stride: stride, tailStart: size - UInt64(tail), tail: tail)
        handle = SourceHandle(content)
    }

    public func map(_ range: Range<UInt64>, _ patience: Patience, into extents: inout ExtentList) throws(BlockError)
        -> UInt64
    {
        let added = extents.append(range.count64, .source(handle.reference, offset: range.lowerBound))
        return added ? range.upperBound : range.lowerBound
    }

    private final class Content: ByteSource {
        let isPrompt = true
        private let head: ArraySlice<UInt8>
        private let tail: ArraySlice<UInt8>
        private let stride: UInt64
        private let tailStart: UInt64

        init(_ bytes: [UInt8], stride: UInt64, tailStart: UInt64, tail: Int) {
            head = bytes.dropLast(tail)
            self.tail = bytes.suffix(tail)
            self.stride = stride
            self.tailStart = tailStart
        }

        func read(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(BlockError) {
            buffer.initializeMemory(as: UInt8.self, repeating: 0)
            let range = offset..<(offset + UInt64(buffer.count))
            var block = offset / stride
            while block * 512 < UInt64(head.count), block * stride < range.upperBound {
                let from = Int(block) * 512
                copy(head[from..<min(from + 512, head.count)], at: block * stride, to: buffer, range)
                block += 1
            }
            copy(tail, at: tailStart, to: buffer, range)
        }

        /// Copies the bytes that lie from `start` on the disk, as far as the buffer shows them.
        private func copy(
            _ bytes: ArraySlice<UInt8>, at start: UInt64, to buffer: UnsafeMutableRawBufferPointer,
            _ range: Range<UInt64>
        ) {
            let part = (start..<(start + UInt64(bytes.count))).clamped(to: range)
            if part.isEmpty { return }
            let from = bytes.startIndex + Int(part.lowerBound - start)
            UnsafeMutableRawBufferPointer(rebasing: buffer[Int(part.lowerBound - range.lowerBound)...])
                .copyBytes(from: bytes[from..<(from + Int(part.count64))])
        }
    }
}
