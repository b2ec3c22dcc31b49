// Files that have to be there after a crash, or not at all: written aside, synced, renamed; and locks on files.
public import Block
import Glibc

/// Puts a directory's entries on stable storage, so that names made, renamed or removed in it stay so.
///
/// - Throws: `BlockError` of the system's reason.
public func syncDirectory(_ path: String) throws(BlockError) {
    let directory = try Descriptor.open(path, O_RDONLY | O_DIRECTORY)
    if fsync(directory.number) < 0 { throw BlockError(errno: errno, "syncing the directory \(path)") }
}

/// Puts a file's content on stable storage.
///
/// - Throws: `BlockError` of the system's reason.
public func syncFile(_ path: String) throws(BlockError) {
    let file = try Descriptor.open(path, O_RDONLY)
    if fsync(file.number) < 0 { throw BlockError(errno: errno, "syncing \(path)") }
}

/// Gives a file another name in place of whatever has that name, durably.
///
/// - Throws: `BlockError` of the system's reason.
public func renameDurably(_ old: String, to new: String) throws(BlockError) {
    if rename(old, new) < 0 { throw BlockError(errno: errno, "renaming \(old) to \(new)") }
    try syncDirectory(directoryName(new))
    if directoryName(old) != directoryName(new) { try syncDirectory(directoryName(old)) }
}

/// Writes a small file in one step: after a crash it has the old content or the new. Of several who write it at once,
/// the last one's content stays.
///
/// - Parameters:
///   - mode: its permissions.
///   - whenWritten: called when the new content is durable and does not have the file's name yet.
/// - Throws: `BlockError` of the system's reason; a file of that name is then as it was.
public func writeDurably(
    _ path: String, _ bytes: [UInt8], mode: UInt32 = 0o600, whenWritten: () -> Void = {}
) throws(BlockError) {
    removeLeftovers(of: path)
    let (file, aside) = try openAside(path, mode: mode)
    do throws(BlockError) {
        let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: max(bytes.count, 1), alignment: 1)
        defer { buffer.deallocate() }
        buffer.copyBytes(from: bytes)
        try writeFully(file.number, UnsafeRawBufferPointer(rebasing: buffer[..<bytes.count]), at: 0, flags: 0)
        if fsync(file.number) < 0 { throw BlockError(errno: errno, "syncing \(aside)") }
        whenWritten()
        try renameDurably(aside, to: path)
    } catch {
        unlink(aside)
        throw error
    }
}

/// Makes a file of a name of its own beside a path, locked for as long as it is open: `PATH.` 16 digits `.partial`.
private func openAside(_ path: String, mode: UInt32) throws(BlockError) -> (Descriptor, path: String) {
    while true {
        let digits = String(UInt64.random(in: 0...UInt64.max), radix: 16)
        let aside = "\(path).\(String(repeating: "0", count: 16 - digits.count))\(digits).partial"
        let file = try Descriptor.open(aside, O_WRONLY | O_CREAT | O_EXCL, mode: mode)
        // Somebody may have taken it for a leftover before it was locked.
        var named = stat()
        let ours = try file.status()
        if flock(file.number, LOCK_EX | LOCK_NB) == 0, stat(aside, &named) == 0, named.st_ino == ours.st_ino,
            named.st_dev == ours.st_dev
        {
            return (file, aside)
        }
    }
}

/// Removes what writers of a file have left that did not come to their end. Those that are still writing hold a lock.
private func removeLeftovers(of path: String) {
    let directory = directoryName(path)
    let start = String(decoding: path.utf8.split(separator: UInt8(ascii: "/")).last ?? [], as: UTF8.self) + "."
    for name in (try? namesInDirectory(directory)) ?? [] where name.hasPrefix(start) && name.hasSuffix(".partial") {
        let digits = name.dropFirst(start.count).dropLast(".partial".count)
        let leftover = "\(directory)/\(name)"
        guard digits.utf8.count == 16, digits.allSatisfy(\.isHexDigit),
            let file = try? Descriptor.open(leftover, O_RDONLY | O_NOFOLLOW | O_NONBLOCK),
            flock(file.number, LOCK_EX | LOCK_NB) == 0
        else { continue }
        unlink(leftover)
    }
}

/// Makes a directory and those above it that are missing.
///
/// - Throws: `BlockError` of the system's reason.
public func makeDirectories(_ path: String, mode: UInt32 = 0o700) throws(BlockError) {
    if path.isEmpty { throw BlockError(.invalid, "making a directory: its name is empty") }
    if mkdir(path, mode) == 0 {
        return try syncDirectory(directoryName(path))
    }
    var status = stat()
    switch errno {
    case EEXIST where stat(path, &status) == 0 && status.st_mode & S_IFMT == S_IFDIR: return
    case EEXIST: throw BlockError(.invalid, "making the directory \(path): there is something else of this name")
    case ENOENT where directoryName(path) != path:
        try makeDirectories(directoryName(path), mode: mode)
        // Once more, and not again: there are places (/proc) where nothing can be made below what is there.
        if mkdir(path, mode) < 0 && errno != EEXIST { throw BlockError(errno: errno, "making the directory \(path)") }
        try syncDirectory(directoryName(path))
    case let number: throw BlockError(errno: number, "making the directory \(path)")
    }
}

/// Names in a directory, in order, without "." and "..".
///
/// - Throws: `BlockError` of the system's reason.
public func namesInDirectory(_ path: String) throws(BlockError) -> [String] {
    guard let directory = opendir(path) else { throw BlockError(errno: errno, "listing the directory \(path)") }
    defer { closedir(directory) }
    var names: [String] = []
    while let entry = readdir(directory) {
        let name = withUnsafePointer(to: &entry.pointee.d_name) {
            $0.withMemoryRebound(to: CChar.self, capacity: 256) { String(cString: $0) }
        }
        if name != "." && name != ".." { names.append(name) }
    }
    return names.sorted()
}

/// The directory that a path's last part lies in.
public func directoryName(_ path: String) -> String {
    // Byte by byte: with an accent behind it, a slash is another character, and still ends a name.
    let slash = UInt8(ascii: "/")
    var trimmed = path.utf8[...]
    while trimmed.count > 1 && trimmed.last == slash { trimmed.removeLast() }
    guard let last = trimmed.lastIndex(of: slash) else { return "." }
    return last == trimmed.startIndex ? "/" : String(decoding: trimmed[..<last], as: UTF8.self)
}

/// A lock on a file, held until its owner goes or the process ends, however it ends. Processes that were started
/// meanwhile do not hold it.
public final class FileLock: Sendable {
    /// How a file is locked.
    public enum Kind: Sendable {
        /// With others who only read.
        case shared
        /// Alone.
        case exclusive
    }

    /// The locked file.
    public let descriptor: Descriptor
    /// Its path when it was locked.
    public let path: String

    /// Locks an open file.
    private init(_ descriptor: Descriptor, path: String) {
        self.descriptor = descriptor
        self.path = path
    }

    deinit {
        // Closing is not enough: a child that is just being started has the file open, too, until it runs its program.
        flock(descriptor.number, LOCK_UN)
    }

    /// Locks a file, which is made where it is missing.
    ///
    /// - Parameter wait: whether to wait for others, for as long as it takes.
    /// - Returns: nil when others hold the lock, which is not waited for.
    /// - Throws: `BlockError` of the system's reason.
    public static func take(_ path: String, _ kind: Kind = .exclusive, wait: Bool = false) throws(BlockError)
        -> FileLock?
    {
        while true {
            let file = try Descriptor.open(path, O_RDWR | O_CREAT, mode: 0o600)
            guard try lock(file, path, kind, wait: wait) else { return nil }
            // The name may have gone to another file, or to none, while this one was waited for.
            var now = stat()
            let ours = try file.status()
            if stat(path, &now) == 0 && now.st_ino == ours.st_ino && now.st_dev == ours.st_dev {
                return FileLock(file, path: path)
            }
        }
    }

    /// Locks a file, which is made where it is missing, and waits for others.
    ///
    /// - Parameters:
    ///   - seconds: for how long.
    ///   - isEnding: asked now and then whether it is not worth waiting any more.
    /// - Returns: nil when others have held the lock all the time.
    /// - Throws: `BlockError` of the system's reason.
    public static func take(_ path: String, seconds: Double, unless isEnding: () -> Bool = { false })
        throws(BlockError) -> FileLock?
    {
        let end = monotonicSeconds() + seconds
        while true {
            if let lock = try take(path) { return lock }
            if isEnding() || monotonicSeconds() > end { return nil }
            usleep(50_000)
        }
    }

    /// Locks a file that is open already.
    ///
    /// - Returns: nil when others hold the lock.
    /// - Throws: `BlockError` of the system's reason.
    public static func take(_ descriptor: Descriptor, path: String, _ kind: Kind = .exclusive) throws(BlockError)
        -> FileLock?
    {
        try lock(descriptor, path, kind, wait: false) ? FileLock(descriptor, path: path) : nil
    }

    private static func lock(_ file: Descriptor, _ path: String, _ kind: Kind, wait: Bool) throws(BlockError) -> Bool {
        while flock(file.number, (kind == .shared ? LOCK_SH : LOCK_EX) | (wait ? 0 : LOCK_NB)) < 0 {
            if errno == EWOULDBLOCK { return false }
            if errno != EINTR { throw BlockError(errno: errno, "locking \(path)") }
        }
        return true
    }
}
