// The journal of a copy: which ranges are durable on the target, so that an interrupted copy can go on.
import Block
import CXXHash
import Glibc
import LinuxIO

/// What a journal belongs to. A copy goes on only if all of it is as it was.
struct CopyIdentity: Equatable {
    /// `CopySource.identity`.
    var source: String
    /// What is copied: everything, or what a dirty bitmap tells.
    var scope: String
    /// The target: which file, node or export, and its size.
    var target: String

    /// Its lines in a journal or a marker.
    var lines: [(key: String, value: String)] {
        [("source", source), ("scope", scope), ("target", target)].map { (key, value) in
            (key, value.split(separator: "\n").joined(separator: " "))
        }
    }

    /// What is not as it was; nil if everything is.
    func difference(from now: CopyIdentity) -> String? {
        for (before, after) in zip(lines, now.lines) where before.value != after.value {
            return "its \(before.key) was \"\(before.value)\" and is \"\(after.value)\""
        }
        return nil
    }
}

/// A file of text lines, each of which ends with a hash of what is before it: what it belongs to, then ranges. A last
/// line that a crash has cut off says nothing.
final class CopyJournal {
    /// The first line.
    static let title = "diskgate copy journal 1"
    /// The line that says that the copy was found wrong.
    private static let rejection = "differs"
    /// More is no journal.
    private static let bytesMax = 64 << 20

    let path: String
    private let file: Descriptor
    private var end: UInt64
    private var settled: UInt64

    private init(_ path: String, _ file: Descriptor, end: UInt64, settled: UInt64) {
        self.path = path
        self.file = file
        self.end = end
        self.settled = settled
    }

    /// A line with its hash.
    static func line(_ text: String) -> [UInt8] {
        let bytes = Array(text.utf8)
        let hash = bytes.withUnsafeBytes { XXH3_64bits($0.baseAddress, $0.count) }
        let digits = String(hash, radix: 16)
        return bytes + Array(" \(String(repeating: "0", count: 16 - digits.count))\(digits)\n".utf8)
    }

    /// Begins a journal, durably, in place of another one.
    ///
    /// - Throws: `.denied` when there is a file that is no journal, or `BlockError` of the system's reason.
    static func begin(_ path: String, _ identity: CopyIdentity) throws(BlockError) -> CopyJournal {
        try requireJournal(path)
        var content = line(title)
        for (key, value) in identity.lines { content += line("\(key) \(value)") }
        try writeDurably(path, content)
        return CopyJournal(path, try Descriptor.open(path, O_WRONLY), end: UInt64(content.count), settled: 0)
    }

    /// Whatever else is at the journal's path is not replaced.
    private static func requireJournal(_ path: String) throws(BlockError) {
        var status = stat()
        guard stat(path, &status) == 0 else { return }
        if status.st_mode & S_IFMT == S_IFREG {
            let file = try Descriptor.open(path, O_RDONLY)
            let wanted = Array(title.utf8)
            var found = [UInt8](repeating: 0, count: wanted.count)
            if pread(file.number, &found, found.count, 0) == found.count && found == wanted { return }
        }
        throw BlockError(
            .denied,
            "beginning the journal \(path): what is there is no journal of a copy, and is not replaced; remove it, or "
                + "name another file with --journal")
    }

    /// Opens a journal that an earlier copy has left.
    ///
    /// - Returns: the journal, to be gone on with, and the ranges that are done.
    /// - Throws: `.notFound` where there is none, `.corrupt` when it makes no sense, `.denied` when it belongs to
    ///   something else.
    static func resume(_ path: String, _ identity: CopyIdentity) throws(BlockError) -> (CopyJournal, FinishedRanges) {
        let doing = "resuming by the journal \(path)"
        let content = try readSmallFile(path, limit: bytesMax)
        let (lines, end) = try wholeLines(content, doing)
        let keys = identity.lines.map(\.key)
        guard lines.count > keys.count, lines[0] == title else {
            throw BlockError(.corrupt, "\(doing): it is no journal of a copy; remove it, or use --force to begin anew")
        }
        var before = CopyIdentity(source: "", scope: "", target: "")
        for (index, key) in keys.enumerated() {
            guard lines[index + 1].hasPrefix("\(key) ") else {
                throw BlockError(.corrupt, "\(doing): the line about its \(key) is missing; use --force to begin anew")
            }
            let value = String(lines[index + 1].dropFirst(key.count + 1))
            if index == 0 {
                before.source = value
            } else if index == 1 {
                before.scope = value
            } else {
                before.target = value
            }
        }
        if let difference = before.difference(from: identity) {
            throw BlockError(
                .denied,
                "\(doing): it belongs to another copy: \(difference). Only the same source can be copied on onto the "
                    + "same target; use --force to begin anew")
        }
        var finished = FinishedRanges()
        for line in lines.dropFirst(keys.count + 1) {
            if line == rejection {
                throw BlockError(
                    .denied,
                    "\(doing): verifying has found that what was copied differs from the source; make a whole copy "
                        + "anew with --force")
            }
            let words = line.split(separator: " ")
            guard words.count == 3, words[0] == "done", let from = UInt64(words[1]), let to = UInt64(words[2]),
                from <= to
            else { throw BlockError(.corrupt, "\(doing): \"\(line)\" makes no sense; use --force to begin anew") }
            finished.insert(from..<to)
        }
        let file = try Descriptor.open(path, O_WRONLY)
        if ftruncate(file.number, off_t(end)) < 0 { throw BlockError(errno: errno, doing) }
        let settled = finished.ranges.first.map { $0.lowerBound == 0 ? $0.upperBound : 0 } ?? 0
        return (CopyJournal(path, file, end: UInt64(end), settled: settled), finished)
    }

    /// The lines that are whole, without their hashes, and the bytes that they have.
    private static func wholeLines(_ content: [UInt8], _ doing: String) throws(BlockError) -> ([String], Int) {
        var lines: [String] = []
        var start = 0
        while let end = content[start...].firstIndex(of: UInt8(ascii: "\n")) {
            let bytes = content[start...end]
            let text = String(decoding: bytes.dropLast(18), as: UTF8.self)
            if bytes.count < 18 || line(text) != Array(bytes) {
                // What is behind the last whole line may be anything after a crash; nothing may follow that is whole.
                if end + 1 == content.count { break }
                throw BlockError(.corrupt, "\(doing): line \(lines.count + 1) is damaged; use --force to begin anew")
            }
            lines.append(text)
            start = end + 1
        }
        return (lines, start)
    }

    /// Notes, durably, that all work below an offset is durable on the target.
    ///
    /// - Throws: `BlockError` of the system's reason.
    func note(settledEnd: UInt64) throws(BlockError) {
        if settledEnd <= settled { return }
        try append("done \(settled) \(settledEnd)")
        settled = settledEnd
        Step.reached("copy.journal-noted")
    }

    /// Notes, durably, that what was copied is wrong, so that nobody goes on with it. The journal stays, as it may be
    /// all that says that the target is no copy.
    ///
    /// - Throws: `BlockError` of the system's reason.
    func reject() throws(BlockError) {
        try append(Self.rejection)
    }

    private func append(_ text: String) throws(BlockError) {
        let bytes = Self.line(text)
        let written = bytes.withUnsafeBytes { pwrite(file.number, $0.baseAddress, $0.count, off_t(end)) }
        guard written == bytes.count, fdatasync(file.number) == 0 else {
            throw BlockError(errno: written < 0 ? errno : ENOSPC, "writing the journal \(path)")
        }
        end += UInt64(bytes.count)
    }

    /// Removes the journal, durably: the copy is complete.
    func remove() throws(BlockError) {
        if unlink(path) < 0 && errno != ENOENT { throw BlockError(errno: errno, "removing the journal \(path)") }
        try syncDirectory(directoryName(path))
    }
}
