// The checkpoints of one disk in their directory, oldest first, and whether they can be trusted.
import Block
import FoundationEssentials
import Glibc
import LinuxIO

/// The directory of one disk's checkpoints.
///
/// `chain` names them in order, one in a line, after a line that says what it is; each has a file NAME.cbt with what
/// has changed from it to the next one. The chain is what counts: a file that it does not name was left by a crash.
struct CheckpointChain {
    /// A checkpoint of the chain.
    struct Entry {
        var header: CheckpointHeader
        /// The bits as long as they are not in the file, as those of the newest are while somebody records.
        var bits: DirtyBitmap?
    }

    /// The most checkpoints of one disk: every one is looked through for a snapshot.
    static let countMax = 64
    private static let title = "diskgate checkpoints 1"

    let directory: String
    let size: UInt64
    private(set) var entries: [Entry] = []
    private let lock: FileLock

    /// The chain in a directory, which is made where it is missing. If anything about it is in doubt, the newest
    /// checkpoint says that all has changed.
    ///
    /// - Parameters:
    ///   - lock: a file that only one user of the disk's checkpoints holds.
    ///   - identity: what the disk is now.
    ///   - doubt: told what is in doubt.
    /// - Throws: `BlockError`: the directory cannot be used, or somebody else uses it.
    init(
        _ directory: String, lock lockPath: String, size: UInt64, identity: DiskIdentity, doubt: (String) -> Void
    ) throws(BlockError) {
        try makeDirectories(directory)
        guard let lock = try FileLock.take(lockPath) else {
            throw BlockError(
                .denied, "using the checkpoints in \(directory): the disk is served with checkpoints already")
        }
        self.directory = directory
        self.size = size
        self.lock = lock
        let names = try readNames()
        var reasons: [String] = []
        var unusable: [Int] = []
        for name in names {
            do throws(BlockError) {
                var (header, bits) = try CheckpointFile.read(path(name))
                if header.name != name || header.size != size || header.granularity != CheckpointFile.granularity {
                    reasons.append("the checkpoint \(name) is of another disk, or of another size of it")
                    header = CheckpointHeader(name: name, created: header.created, size: size)
                    bits = nil
                } else if bits == nil {
                    reasons.append(
                        "the checkpoint \(name) was not closed: its server was killed, or the machine crashed")
                } else if name == names.last {
                    let difference = header.identity.map { identity.difference(from: $0) } ?? "nobody knows its state"
                    if let difference { reasons.append("the disk has changed while nobody tracked it: \(difference)") }
                }
                if bits == nil { unusable.append(entries.count) }
                // Only the newest one's bits are kept in memory.
                entries.append(Entry(header: header, bits: name == names.last ? bits : nil))
            } catch {
                reasons.append("the checkpoint \(name) cannot be read: \(error.message)")
                unusable.append(entries.count)
                entries.append(Entry(header: CheckpointHeader(name: name, created: 0, size: size), bits: nil))
            }
        }
        if let last = entries.indices.last, !reasons.isEmpty {
            let reason = reasons.joined(separator: "; ")
            let all = try DirtyBitmap(size: size, granularity: CheckpointFile.granularity)
            all.set(0..<size)
            entries[last].bits = all
            entries[last].header.allDirty = reason
            doubt(reason)
            // So that the same doubt does not come again at the next start.
            for index in unusable where index != last {
                entries[index].header.allDirty = reason
                try store(index, bits: all, isClosed: true)
            }
        }
        removeLeftovers(names)
    }

    func path(_ name: String) -> String { "\(directory)/\(name).cbt" }

    private func readNames() throws(BlockError) -> [String] {
        let path = "\(directory)/chain"
        var status = stat()
        if stat(path, &status) < 0 && errno == ENOENT { return [] }
        let text = String(decoding: try readSmallFile(path), as: UTF8.self)
        let lines = text.split(separator: "\n", omittingEmptySubsequences: false)
        let names = lines.dropFirst().dropLast().map(String.init)
        guard lines.first == Self.title[...], lines.last == "", names.allSatisfy(Self.isName),
            Set(names).count == names.count
        else {
            throw BlockError(
                .corrupt, "\(path) is damaged: remove the directory to begin anew, with full copies")
        }
        return names
    }

    /// Whether a text can be a checkpoint's name: a file's, a line's, and a part of an export's.
    static func isName(_ text: String) -> Bool {
        (1...64).contains(text.utf8.count) && text.first != "."
            && text.utf8.allSatisfy {
                switch $0 {
                case UInt8(ascii: "a")...UInt8(ascii: "z"), UInt8(ascii: "A")...UInt8(ascii: "Z"),
                    UInt8(ascii: "0")...UInt8(ascii: "9"), UInt8(ascii: "-"), UInt8(ascii: "_"), UInt8(ascii: "."):
                    true
                default: false
                }
            }
    }

    private func removeLeftovers(_ names: [String]) {
        guard let found = try? namesInDirectory(directory) else { return }
        for file in found where file.hasSuffix(".cbt") || file.hasSuffix(".partial") {
            if !names.contains(where: { "\($0).cbt" == file }) { unlink("\(directory)/\(file)") }
        }
    }

    /// Stores which checkpoints there are.
    private func storeNames(_ entries: [Entry]) throws(BlockError) {
        let text = ([Self.title] + entries.map(\.header.name)).joined(separator: "\n") + "\n"
        try writeDurably("\(directory)/chain", Array(text.utf8))
    }

    func index(of name: String) -> Int? { entries.firstIndex { $0.header.name == name } }

    /// A checkpoint's bits, from memory or its file; all of them where the file cannot be read.
    mutating func bits(_ index: Int) throws(BlockError) -> DirtyBitmap {
        if let bits = entries[index].bits { return bits }
        var reason = "its file is not closed"
        do throws(BlockError) {
            let read = try CheckpointFile.read(path(entries[index].header.name))
            if let bits = read.bits, bits.size == size { return bits }
        } catch { reason = error.message }
        let all = try DirtyBitmap(size: size, granularity: CheckpointFile.granularity)
        all.set(0..<size)
        if entries[index].header.allDirty == nil { entries[index].header.allDirty = reason }
        return all
    }

    /// Stores the bits of a checkpoint for good, or as those that somebody records from now on.
    mutating func store(_ index: Int, bits: DirtyBitmap, isClosed: Bool, identity: DiskIdentity? = nil)
        throws(BlockError)
    {
        entries[index].bits = bits
        entries[index].header.isClosed = isClosed
        entries[index].header.identity = identity
        try CheckpointFile.write(path(entries[index].header.name), entries[index].header, bits)
        // Final bits can be read again; those of the newest are asked for often.
        if isClosed && index < entries.count - 1 { entries[index].bits = nil }
    }

    /// Adds a checkpoint that somebody records from now on.
    mutating func append(_ header: CheckpointHeader, _ bits: DirtyBitmap) throws(BlockError) {
        let file = path(header.name)
        do throws(BlockError) {
            try CheckpointFile.write(file, header, bits)
            let longer = entries + [Entry(header: header, bits: bits)]
            try storeNames(longer)
            entries = longer
        } catch {
            unlink(file)
            throw error
        }
    }

    /// Takes a checkpoint out. What it knows has gone to the one before it.
    mutating func remove(_ index: Int) throws(BlockError) {
        var shorter = entries
        let name = shorter.remove(at: index).header.name
        try storeNames(shorter)
        entries = shorter
        unlink(path(name))
    }

    /// Has everything count as changed since a checkpoint whose bits are in memory.
    mutating func distrust(_ index: Int, _ reason: String) {
        entries[index].bits?.set(0..<size)
        note(index, allDirty: reason)
    }

    /// Says that everything counts as changed since a checkpoint.
    mutating func note(_ index: Int, allDirty reason: String?) {
        if let reason, entries[index].header.allDirty == nil { entries[index].header.allDirty = reason }
    }
}
