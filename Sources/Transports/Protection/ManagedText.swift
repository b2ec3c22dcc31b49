// What setup writes among the settings of other programs: whole files and blocks of files, told from what people write.
import Block
import Glibc
import LinuxIO

/// Text that says of itself whether somebody has changed it.
enum ManagedText {
    private static let seal = "# diskgate: the end of what diskgate setup has written, "
    /// The first line of a block in somebody else's file.
    static let begin = "# diskgate: the begin of what diskgate setup has written\n"

    /// A text of whole lines with its checksum in a last one.
    static func sealed(_ text: String) -> String { "\(text)\(seal)\(checksum(text))\n" }

    /// Whether a text is as it was when it was sealed.
    static func isSealed(_ text: String) -> Bool {
        guard let line = text.split(separator: "\n").last, line.hasPrefix(seal), text.hasSuffix("\(line)\n") else {
            return false
        }
        return sealed(String(text.dropLast(line.count + 1))) == text
    }

    /// The block of a file, from its first line to its seal, whether or not it is as it was; nil where there is none.
    static func block(in text: String) -> Substring? {
        var start: String.Index?
        var place = text.startIndex
        while place < text.endIndex {
            let end = text[place...].firstIndex(of: "\n").map(text.index(after:)) ?? text.endIndex
            if text[place..<end] == begin { start = start ?? place }
            if let start, text[place..<end].hasPrefix(seal) { return text[start..<end] }
            place = end
        }
        return start.map { text[$0...] }
    }

    /// 16 hexadecimal digits: FNV-1a (draft-eastlake-fnv). It is against oversight, not against anybody.
    private static func checksum(_ text: String) -> String {
        let sum = text.utf8.reduce(into: UInt64(0xCBF2_9CE4_8422_2325)) { sum, byte in
            sum = (sum ^ UInt64(byte)) &* 0x100_0000_01B3
        }
        let digits = String(sum, radix: 16)
        return String(repeating: "0", count: 16 - digits.count) + digits
    }
}

/// A file of which all is setup's own.
struct ManagedFile {
    /// What the file is.
    enum State: Equatable {
        /// There is none.
        case missing
        /// It is as it should be.
        case current
        /// setup has written it, for other disks or in another version.
        case outdated
        /// Somebody has changed it, or another program has one of this name.
        case changed
    }

    let path: String

    /// What the file is, compared with what it should have.
    ///
    /// - Throws: `BlockError` when it is there and cannot be read.
    func state(_ wanted: String) throws(BlockError) -> State {
        guard let text = try textIfThere(path) else { return .missing }
        if text == wanted { return .current }
        return ManagedText.isSealed(text) ? .outdated : .changed
    }

    /// Writes it, unless somebody has changed it.
    ///
    /// - Returns: whether anything was written.
    /// - Throws: `.denied` when somebody has changed it, or the system's reason.
    func write(_ wanted: String) throws(BlockError) -> Bool {
        switch try state(wanted) {
        case .current: return false
        case .changed:
            throw BlockError(
                .denied,
                "writing \(path): somebody has changed it since diskgate has written it, or another program has; move "
                    + "it away, run this again, and put into a file of another name what is yours")
        case .missing, .outdated:
            try makeDirectories(directoryName(path), mode: 0o755)
            try writeDurably(path, Array(wanted.utf8), mode: 0o644)
            return true
        }
    }

    /// Removes it, unless somebody has changed it.
    ///
    /// - Returns: whether there was one.
    /// - Throws: as `write`.
    func remove() throws(BlockError) -> Bool {
        guard let text = try textIfThere(path) else { return false }
        guard ManagedText.isSealed(text) else {
            throw BlockError(.denied, "removing \(path): somebody has changed it; remove it by hand")
        }
        if unlink(path) < 0 { throw BlockError(errno: errno, "removing \(path)") }
        try syncDirectory(directoryName(path))
        return true
    }
}

/// A text file of at most 4 MiB; nil where there is none.
///
/// - Throws: the system's reason.
func textIfThere(_ path: String) throws(BlockError) -> String? {
    do throws(BlockError) { return String(decoding: try readSmallFile(path, limit: 4 << 20), as: UTF8.self) } catch {
        if error.kind == .notFound { return nil }
        throw error
    }
}
