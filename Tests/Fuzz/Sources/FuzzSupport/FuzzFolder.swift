// A directory in memory for parsers that read files by their names.
import Block
import Glibc
import LinuxIO

/// A directory that is there as long as the process runs.
public struct FuzzFolder: Sendable {
    /// Its path.
    public let path: String

    /// Makes a directory.
    public init() {
        var template = Array("/dev/shm/diskgate-fuzz-XXXXXX".utf8CString)
        require(mkdtemp(&template) != nil, "there is no directory in memory")
        path = String(decoding: template.dropLast().map { UInt8(bitPattern: $0) }, as: UTF8.self)
    }

    /// Writes a file, in place of another one of its name, and gives its path.
    @discardableResult
    public func write(_ name: String, _ bytes: some Collection<UInt8>) -> String {
        let file = "\(path)/\(name)"
        let content = Array(bytes)
        let number = open(file, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0o600)
        let written = content.withUnsafeBytes { Glibc.write(number, $0.baseAddress, $0.count) }
        require(number >= 0 && written == content.count, "\(file) cannot be written")
        close(number)
        return file
    }
}
