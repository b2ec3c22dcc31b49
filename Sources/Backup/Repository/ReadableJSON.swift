// The one form of JSON in a repository: sorted keys, indented, so that people and other programs read the same.
import Block
import FoundationEssentials
import LinuxIO
import Transports

/// A value as JSON with sorted keys, ending in a line feed.
func readableJSON(_ value: some Encodable, _ what: String) throws(BlockError) -> [UInt8] {
    let encoder = JSONEncoder()
    encoder.outputFormatting = [.prettyPrinted, .sortedKeys, .withoutEscapingSlashes]
    do { return [UInt8](try encoder.encode(value)) + [UInt8(ascii: "\n")] } catch {
        throw BlockError(.invalid, "writing \(what): \(error)")
    }
}

/// Reads a value of a small JSON file.
///
/// - Throws: `.corrupt` when the file does not have what it should, or what reading it throws.
func readJSON<Value: Decodable>(_ type: Value.Type, from path: String) throws(BlockError) -> Value {
    try parseJSON(type, try readSmallFile(path, limit: 64 << 20), path)
}

/// A value of JSON text that was read from `path`.
func parseJSON<Value: Decodable>(_ type: Value.Type, _ bytes: [UInt8], _ path: String) throws(BlockError) -> Value {
    do { return try JSONDecoder().decode(type, from: Data(bytes)) } catch let error as DecodingError {
        throw BlockError(.corrupt, "reading \(path): \(explained(error))")
    } catch { throw BlockError(.corrupt, "reading \(path): \(error)") }
}

/// The SHA-256 of bytes, in hexadecimal.
func sha256(_ bytes: [UInt8]) throws(BlockError) -> String {
    var digest = try Digest("sha256")
    let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: max(bytes.count, 1), alignment: 1)
    defer { buffer.deallocate() }
    buffer.copyBytes(from: bytes)
    try digest.update(UnsafeRawBufferPointer(rebasing: buffer[..<bytes.count]))
    return try digest.finish()
}

/// The SHA-256 of a file's content, in hexadecimal, and its length in bytes.
///
/// - Throws: `BlockError` when it cannot be read.
func sha256(ofFile path: String) throws(BlockError) -> (digest: String, bytes: UInt64) {
    let file = try RawFileDevice.open(path)
    var digest = try Digest("sha256")
    let buffer = Buffer(count: 1 << 20)
    var position: UInt64 = 0
    while position < file.info.size {
        let count = Int(min(file.info.size - position, UInt64(buffer.bytes.count)))
        let piece = UnsafeMutableRawBufferPointer(rebasing: buffer.bytes[..<count])
        try file.read(into: piece, at: position)
        try digest.update(UnsafeRawBufferPointer(piece))
        position += UInt64(count)
    }
    return (try digest.finish(), file.info.size)
}
