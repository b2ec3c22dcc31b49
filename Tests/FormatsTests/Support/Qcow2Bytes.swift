// Takes qcow2 files apart and makes them byte by byte, for images that no tool would make.
import Block
import CZlib

/// Where things are in an image.
struct Qcow2Layout {
    let bytes: [UInt8]
    init(_ bytes: [UInt8]) { self.bytes = bytes }

    func word(_ offset: Int) -> UInt64 { bytes.withUnsafeBytes { $0.bigEndian(offset) } }
    func half(_ offset: Int) -> UInt32 { bytes.withUnsafeBytes { $0.bigEndian(offset) } }
    var clusterSize: Int { 1 << Int(half(20)) }
    var l1Offset: Int { Int(word(40)) }
    var l2Offset: Int { Int(word(l1Offset) & 0x00FF_FFFF_FFFF_FE00) }
    func l2Entry(_ index: Int) -> UInt64 { word(l2Offset + index * 8) }
}

enum Qcow2Builder {
    static func store<T: FixedWidthInteger>(_ bytes: inout [UInt8], _ offset: Int, _ value: T) {
        bytes.withUnsafeMutableBytes { $0.storeBigEndian(value, at: offset) }
    }

    /// A version 3 image: header, refcount table, L1 table and one empty L2 table in a cluster each.
    static func empty(clusterBits: Int, size: UInt64, version: UInt32 = 3) -> [UInt8] {
        let cluster = 1 << clusterBits
        var bytes = [UInt8](repeating: 0, count: 4 * cluster)
        store(&bytes, 0, UInt32(0x5146_49FB))
        store(&bytes, 4, version)
        store(&bytes, 20, UInt32(clusterBits))
        store(&bytes, 24, size)
        let reach = UInt64(cluster) * UInt64(cluster / 8)
        store(&bytes, 36, UInt32((size + reach - 1) / reach))
        store(&bytes, 40, UInt64(2 * cluster))
        store(&bytes, 48, UInt64(cluster))
        store(&bytes, 56, UInt32(1))
        if version == 3 {
            store(&bytes, 96, UInt32(4))
            store(&bytes, 100, UInt32(104))
        }
        store(&bytes, 2 * cluster, UInt64(3 * cluster))
        return bytes
    }

    static func setL2Entry(_ bytes: inout [UInt8], _ index: Int, _ entry: UInt64) {
        store(&bytes, Qcow2Layout(bytes).l2Offset + index * 8, entry)
    }

    /// Adds a header extension after the version 3 header and what was added before.
    static func addExtension(_ bytes: inout [UInt8], _ type: UInt32, _ data: [UInt8]) {
        var position = 104
        while Qcow2Layout(bytes).half(position) != 0 {
            position += 8 + (Int(Qcow2Layout(bytes).half(position + 4)) + 7) & ~7
        }
        store(&bytes, position, type)
        store(&bytes, position + 4, UInt32(data.count))
        bytes.replaceSubrange((position + 8)..<(position + 8 + data.count), with: data)
    }
}

/// A raw deflate stream with windows of 4 KiB, as qemu writes it.
func deflated(_ bytes: [UInt8]) -> [UInt8] {
    var stream = z_stream()
    deflateInit2_(&stream, 6, Z_DEFLATED, -12, 9, Z_DEFAULT_STRATEGY, ZLIB_VERSION, Int32(MemoryLayout<z_stream>.size))
    defer { deflateEnd(&stream) }
    var input = bytes
    var output = [UInt8](repeating: 0, count: bytes.count + 1024)
    let written = input.withUnsafeMutableBufferPointer { from in
        output.withUnsafeMutableBufferPointer { to in
            stream.next_in = from.baseAddress
            stream.avail_in = UInt32(from.count)
            stream.next_out = to.baseAddress
            stream.avail_out = UInt32(to.count)
            deflate(&stream, Z_FINISH)
            return to.count - Int(stream.avail_out)
        }
    }
    return Array(output[..<written])
}
