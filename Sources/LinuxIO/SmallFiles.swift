// Small files read whole: what sysfs and procfs say, markers, manifests.
public import Block
import Glibc

/// A small text file without the white space around it, nil when it cannot be read.
public func readText(_ path: String) -> String? {
    guard let bytes = try? readSmallFile(path) else { return nil }
    var text = Substring(decoding: bytes, as: UTF8.self)
    while let last = text.last, last.isWhitespace || last == "\0" { text.removeLast() }
    while let first = text.first, first.isWhitespace { text.removeFirst() }
    return String(text)
}

/// The content of a small file.
///
/// - Parameter limit: the most bytes it may have.
/// - Throws: `.tooLarge` when it has more, or `BlockError` of the system's reason.
public func readSmallFile(_ path: String, limit: Int = 65536) throws(BlockError) -> [UInt8] {
    let file = try Descriptor.open(path, O_RDONLY)
    var content: [UInt8] = []
    var piece = [UInt8](repeating: 0, count: min(limit + 1, 65536))
    while true {
        let got = piece.withUnsafeMutableBytes { read(file.number, $0.baseAddress, $0.count) }
        if got < 0 && errno == EINTR { continue }
        if got < 0 { throw BlockError(errno: errno, "reading \(path)") }
        if got == 0 { return content }
        content += piece[..<got]
        if content.count > limit { throw BlockError(.tooLarge, "reading \(path): it has more than \(limit) bytes") }
    }
}
