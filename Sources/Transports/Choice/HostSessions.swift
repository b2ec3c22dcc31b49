// Sessions with hosts, counted over all processes of this proxy: a locked file for each, which dies with its holder.
public import Block
import Glibc
import LinuxIO

/// Sessions that this proxy has with hosts at the moment.
///
/// Each key has a directory with a file for each session that there ever was at a time. Whoever has a session holds
/// the lock of one of them: a process that ends, however it ends, has none any more.
public struct HostSessions: Sendable {
    /// Who has a session.
    public struct Holder: Codable, Sendable, Equatable {
        /// The process.
        public var process: Int32
        /// What it reads.
        public var purpose: String
    }

    private let directory: String

    /// - Parameter stateDirectory: where the files are kept; processes with the same one count together.
    public init(stateDirectory: String = defaultStateDirectory()) { directory = "\(stateDirectory)/sessions" }

    /// Who has sessions of a key.
    ///
    /// - Throws: `BlockError` when the files cannot be read or locked.
    public func holders(of key: String) throws(BlockError) -> [Holder] {
        let folder = folder(of: key)
        if access(folder, F_OK) < 0 && errno == ENOENT { return [] }
        return try counting(key) { () throws(BlockError) in
            try withGate(folder) { () throws(BlockError) in try look(folder).holders }
        }
    }

    /// Takes a session of each of some limits.
    ///
    /// - Parameters:
    ///   - purpose: what for, in one line.
    ///   - seconds: how long to wait for others to end theirs.
    ///   - isEnding: whether not to wait any longer.
    /// - Returns: nil when all are taken for so long.
    /// - Throws: `BlockError` when the files cannot be made or locked, `.unsupported` for a limit of none at all.
    public func take(
        _ limits: [SessionLimit], for purpose: String, seconds: Double = 0, isEnding: () -> Bool = { false }
    ) throws(BlockError) -> HostSession? {
        if let none = limits.first(where: { $0.limit < 1 }) {
            throw BlockError(.unsupported, "opening a session of \(none.key): its limit is 0 (\(none.origin))")
        }
        let end = monotonicSeconds() + seconds
        while true {
            var locks: [FileLock] = []
            for limit in limits {
                let lock = try counting(limit.key) { () throws(BlockError) in try take(limit, for: purpose) }
                guard let lock else { break }
                locks.append(lock)
            }
            if locks.count == limits.count { return HostSession(locks) }
            locks.removeAll()
            if monotonicSeconds() >= end || isEnding() { return nil }
            usleep(50_000)
        }
    }

    /// Says what the files are for, where they cannot be made: whoever opens a disk has not asked for any.
    private func counting<R>(_ key: String, _ body: () throws(BlockError) -> R) throws(BlockError) -> R {
        do throws(BlockError) { return try body() } catch {
            throw BlockError(
                error.kind,
                "counting sessions of the \(key), which has a session limit: \(error.message) "
                    + "(DISKGATE_STATE_DIRECTORY names a directory for that, which has to be writable)")
        }
    }

    private func take(_ limit: SessionLimit, for purpose: String) throws(BlockError) -> FileLock? {
        let folder = folder(of: limit.key)
        try makeDirectories(folder)
        return try withGate(folder) { () throws(BlockError) in
            let (holders, free) = try look(folder)
            if holders.count >= limit.limit { return nil }
            let path = free ?? "\(folder)/\(holders.count).session"
            // The gate is ours: nobody else takes it meanwhile.
            guard let lock = try FileLock.take(path) else { return nil }
            let line = "\(getpid()) \(purpose.split(whereSeparator: \.isNewline).first ?? "")\n"
            ftruncate(lock.descriptor.number, 0)
            _ = line.withCString { pwrite(lock.descriptor.number, $0, strlen($0), 0) }
            return lock
        }
    }

    /// Who holds the files of a key, and one of them that nobody holds.
    private func look(_ folder: String) throws(BlockError) -> (holders: [Holder], free: String?) {
        var holders: [Holder] = []
        var free: String?
        for name in try namesInDirectory(folder) where name.hasSuffix(".session") {
            let path = "\(folder)/\(name)"
            if let lock = try FileLock.take(path) {
                withExtendedLifetime(lock) { free = free ?? path }
                continue
            }
            let text = (try? readSmallFile(path)).map { String(decoding: $0, as: UTF8.self) } ?? ""
            let words = text.prefix { $0 != "\n" }.split(separator: " ", maxSplits: 1)
            holders.append(
                Holder(
                    process: words.first.flatMap { Int32($0) } ?? 0, purpose: words.count > 1 ? String(words[1]) : ""))
        }
        return (holders, free)
    }

    /// Looking locks files for a moment, which must not look like sessions to others: one at a time.
    private func withGate<R>(_ folder: String, _ body: () throws(BlockError) -> R) throws(BlockError) -> R {
        let gate = try FileLock.take("\(folder)/gate", wait: true)
        defer { withExtendedLifetime(gate) {} }
        return try body()
    }

    /// A directory for a key, which may have any characters.
    private func folder(of key: String) -> String {
        var name = ""
        for byte in key.utf8 {
            let isPlain = (48...57).contains(byte) || (97...122).contains(byte | 32) || byte == UInt8(ascii: "-")
            name += isPlain ? String(UnicodeScalar(byte)) : "_\(String(byte, radix: 16))"
        }
        if name.utf8.count > 200 {
            let sum = key.utf8.reduce(0xCBF2_9CE4_8422_2325 as UInt64) { ($0 ^ UInt64($1)) &* 0x100_0000_01B3 }
            name = "\(name.prefix(180))_\(String(sum, radix: 16))"
        }
        return "\(directory)/\(name)"
    }
}

/// A session with a host and its manager, for as long as somebody has this.
public final class HostSession: Sendable {
    private let locks: [FileLock]

    fileprivate init(_ locks: [FileLock]) { self.locks = locks }
}
