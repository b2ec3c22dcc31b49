// Directories and disk images for one test, gone when it ends.
import CLinux
import Glibc

/// A directory of its own for a test.
final class Folder {
    let path: String

    init() throws {
        var template = Array("/var/tmp/dg-XXXXXX".utf8CString)
        guard mkdtemp(&template) != nil else { throw Trouble("making a directory: error \(errno)") }
        path = String(decoding: template.dropLast().map { UInt8(bitPattern: $0) }, as: UTF8.self)
    }

    deinit { _ = try? Tool("rm").run(["-rf", path]) }

    /// The path of a file in it.
    func file(_ name: String) -> String { "\(path)/\(name)" }

    /// Makes an image: pieces of random bytes of odd lengths, an allocated run of zeros, and holes between.
    func image(_ name: String, size: Int = 24 << 20, seed: UInt64 = 1) throws -> String {
        try write(name, size: size) { file in
            var state = seed
            var piece = [UInt8](repeating: 0, count: 700_000)
            piece.withUnsafeMutableBytes { bytes in
                for index in stride(from: 0, to: bytes.count - 8, by: 8) {
                    state = state &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407
                    bytes.storeBytes(of: state ^ (state >> 29), toByteOffset: index, as: UInt64.self)
                }
            }
            var offset = Int(seed % 7) * 65536
            var count = 1
            while offset < size {
                count = (count &* 7919 + 4096) % piece.count
                pwrite(file, piece, min(count, size - offset), off_t(offset))
                offset += count + (offset / 3) % 1_500_000
            }
            pwrite(file, [UInt8](repeating: 0, count: 300_000), 300_000, off_t(size / 2))
        }
    }

    /// Makes a file full of one byte: what a copy leaves out shows.
    func filled(_ name: String, size: Int = 24 << 20, with value: UInt8 = 0x5A) throws -> String {
        try write(name, size: size) { file in
            let piece = [UInt8](repeating: value, count: 1 << 20)
            for offset in stride(from: 0, to: size, by: piece.count) {
                pwrite(file, piece, min(piece.count, size - offset), off_t(offset))
            }
        }
    }

    private func write(_ name: String, size: Int, _ body: (Int32) -> Void) throws -> String {
        let number = dg_open(file(name), O_CREAT | O_RDWR | O_TRUNC | O_CLOEXEC, 0o600)
        guard number >= 0, ftruncate(number, off_t(size)) == 0 else { throw Trouble("making \(name)") }
        body(number)
        close(number)
        return file(name)
    }
}

/// Whether two files have the same bytes.
func isSame(_ one: String, _ other: String) throws -> Bool { try attempt("cmp", one, other).status == 0 }

/// The SHA-256 of a file.
func checksum(_ path: String) throws -> String { String(try run("sha256sum", path).text.prefix(64)) }
