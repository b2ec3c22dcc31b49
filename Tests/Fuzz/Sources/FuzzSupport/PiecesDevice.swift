// An input as a large disk of which little is there: sectors with their numbers, as a datastore's metadata is strewn.
public import Block

/// A read-only disk of zeros with some sectors of 512 bytes that an input has.
public final class PiecesDevice: BlockDevice {
    public let info: DeviceInfo
    private let content: Content
    private let handle: SourceHandle

    /// A disk with the sectors of an input: for each its number (four bytes, the low one first), how many bytes it has
    /// (two bytes, up to 512), and these; the rest of the sector is zeros. Of two with one number the later one counts.
    public init(_ bytes: UnsafeRawBufferPointer, size: UInt64, name: String) {
        info = DeviceInfo(size: size, format: "raw", name: name)
        content = Content(bytes)
        handle = SourceHandle(content)
    }

    public func map(_ range: Range<UInt64>, _ patience: Patience, into extents: inout ExtentList) throws(BlockError)
        -> UInt64
    {
        require(!range.isEmpty && range.upperBound <= info.size, "a map of \(range) of \(info.size) bytes")
        let added = extents.append(range.count64, .source(handle.reference, offset: range.lowerBound))
        return added ? range.upperBound : range.lowerBound
    }

    private final class Content: ByteSource {
        let isPrompt = true
        private let sectors: [(number: UInt64, bytes: ArraySlice<UInt8>)]

        init(_ bytes: UnsafeRawBufferPointer) {
            let all = Array(bytes)
            var found: [UInt64: ArraySlice<UInt8>] = [:]
            var position = 0
            while position + 6 <= all.count {
                let number = (0..<4).reduce(0 as UInt64) { $0 | UInt64(all[position + $1]) << UInt64(8 * $1) }
                let length = min(Int(all[position + 4]) | Int(all[position + 5]) << 8, 512, all.count - position - 6)
                found[number] = all[(position + 6)..<(position + 6 + length)]
                position += 6 + length
            }
            sectors = found.map { ($0.key, $0.value) }.sorted { $0.0 < $1.0 }
        }

        func read(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(BlockError) {
            buffer.initializeMemory(as: UInt8.self, repeating: 0)
            let range = offset..<(offset + UInt64(buffer.count))
            var low = 0
            var high = sectors.count
            while low < high {
                let middle = (low + high) / 2
                if sectors[middle].number * 512 + 512 <= offset { low = middle + 1 } else { high = middle }
            }
            for sector in sectors[low...] {
                let start = sector.number * 512
                if start >= range.upperBound { break }
                let part = (start..<(start + UInt64(sector.bytes.count))).clamped(to: range)
                if part.isEmpty { continue }
                let from = sector.bytes.startIndex + Int(part.lowerBound - start)
                UnsafeMutableRawBufferPointer(rebasing: buffer[Int(part.lowerBound - offset)...])
                    .copyBytes(from: sector.bytes[from..<(from + Int(part.count64))])
            }
        }
    }
}
