// What a qcow2 image's header says it is backed by, for those who compare it with what a manifest says.
import Block
import LinuxIO

/// The name of the backing file in a qcow2 image's header (docs/interop/qcow2.txt of QEMU).
enum BackingName {
    static func read(from path: String) throws(BlockError) -> String? {
        let file = try RawFileDevice.open(path)
        let count = Int(min(file.info.size, 65536))
        if count < 72 { throw BlockError(.corrupt, "reading \(path): it is no qcow2 image") }
        let buffer = Buffer(count: count)
        try file.read(into: buffer.bytes, at: 0)
        let bytes = buffer.readable
        if bytes.bigEndian(0, as: UInt32.self) != 0x5146_49FB {
            throw BlockError(.corrupt, "reading \(path): it is no qcow2 image")
        }
        let offset = bytes.bigEndian(8, as: UInt64.self)
        let length = Int(bytes.bigEndian(16, as: UInt32.self))
        if offset == 0 { return nil }
        guard offset < UInt64(count), length <= count - Int(offset) else {
            throw BlockError(.corrupt, "reading \(path): the backing file's name lies outside the header")
        }
        return String(decoding: bytes[Int(offset)..<(Int(offset) + length)], as: UTF8.self)
    }
}
