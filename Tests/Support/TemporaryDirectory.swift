// Directories and files for one test, gone at its end.
import Block
import Glibc
import LinuxIO

/// A directory for one test.
public struct TemporaryDirectory: Sendable {
    /// Its path.
    public let path: String

    /// A directory that is there, and that somebody else removes.
    public init(path: String) { self.path = path }

    /// The path of a file in it.
    public func file(_ name: String) -> String { "\(path)/\(name)" }

    /// Makes a file with the given bytes and returns its path.
    public func makeFile(_ name: String, _ bytes: [UInt8]) throws -> String {
        let path = file(name)
        let descriptor = try Descriptor.open(path, O_CREAT | O_TRUNC | O_RDWR)
        try bytes.withUnsafeBytes { try writeAll($0, to: descriptor.number) }
        return path
    }

    /// Makes a file that is one hole and returns its path.
    public func makeSparseFile(_ name: String, size: UInt64) throws -> String {
        let path = file(name)
        let descriptor = try Descriptor.open(path, O_CREAT | O_TRUNC | O_RDWR)
        try require(ftruncate(descriptor.number, off_t(size)) == 0, "sizing \(path) to \(size)")
        return path
    }
}

/// A directory in memory where there is one: for tests that make many small files durable and pull no plug.
public let placeInMemory: String? = access("/dev/shm", W_OK) == 0 ? "/dev/shm" : nil

/// Runs a body with a new directory, which is removed with everything in it when the body ends.
///
/// - Parameter place: the directory to make it in; nil for TMPDIR, or /var/tmp, which is on a disk in most places.
public func withTemporaryDirectory<R>(in place: String? = nil, _ body: (TemporaryDirectory) throws -> R) throws -> R {
    let place = place ?? getenv("TMPDIR").map { String(cString: $0) } ?? "/var/tmp"
    var template = Array("\(place)/diskgate-test-XXXXXX".utf8CString)
    guard mkdtemp(&template) != nil else { throw CheckFailure("making a directory in \(place): errno \(errno)") }
    let path = String(decoding: template.dropLast().map { UInt8(bitPattern: $0) }, as: UTF8.self)
    defer { removeTree(path) }
    return try body(TemporaryDirectory(path: path))
}

/// All bytes of a file.
public func contentOfFile(_ path: String) throws -> [UInt8] {
    let descriptor = try Descriptor.open(path, O_RDONLY)
    var bytes = [UInt8](repeating: 0, count: Int(try descriptor.status().st_size))
    var done = 0
    while done < bytes.count {
        let got = bytes.withUnsafeMutableBytes {
            pread(descriptor.number, $0.baseAddress?.advanced(by: done), $0.count - done, off_t(done))
        }
        try require(got > 0, "reading \(path) at \(done): errno \(errno)")
        done += got
    }
    return bytes
}

private func writeAll(_ bytes: UnsafeRawBufferPointer, to descriptor: Int32) throws {
    var done = 0
    while done < bytes.count {
        let written = write(descriptor, bytes.baseAddress?.advanced(by: done), bytes.count - done)
        try require(written > 0, "writing a file: errno \(errno)")
        done += written
    }
}

private func removeTree(_ path: String) {
    guard let folder = opendir(path) else {
        unlink(path)
        return
    }
    while let entry = readdir(folder) {
        let name = withUnsafeBytes(of: &entry.pointee.d_name) { String(decoding: $0.prefix { $0 != 0 }, as: UTF8.self) }
        if name == "." || name == ".." { continue }
        let child = "\(path)/\(name)"
        if entry.pointee.d_type == UInt8(DT_DIR) { removeTree(child) } else { unlink(child) }
    }
    closedir(folder)
    rmdir(path)
}
