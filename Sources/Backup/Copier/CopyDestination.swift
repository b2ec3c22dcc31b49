// Where a copy goes, as the user names it, and how it stays recognisable as incomplete until it is complete.
public import Block
import Formats
import Glibc
import LinuxIO
public import NBD
public import Transports

/// Where a copy goes.
public enum CopyDestination: Sendable, Equatable {
    /// Standard output.
    case stream
    /// A regular file, there or not.
    case file(String)
    /// A block node.
    case node(String)
    /// An export of a server.
    case nbd(NBDURI)
    /// A disk that is hot-added to this machine.
    case hotAdd(SourceReference)

    /// Takes a destination apart: `-`, a path, or an NBD URI.
    ///
    /// - Throws: `.invalid` for sources that nothing can be copied to, and for paths of something that is no disk.
    public init(_ text: String) throws(BlockError) {
        if text == "-" {
            self = .stream
            return
        }
        let reference = try SourceReference(text)
        switch reference.kind {
        case .hotAdd: self = .hotAdd(reference)
        case .nbd(let uri): self = .nbd(uri)
        case .path(let path):
            var status = stat()
            guard stat(path, &status) == 0 else {
                if errno != ENOENT { throw BlockError(errno: errno, "copying to \(path)") }
                self = .file(path)
                return
            }
            switch status.st_mode & S_IFMT {
            // A link stays one: what it names is replaced.
            case S_IFREG: self = .file(try Self.real(path))
            case S_IFBLK: self = .node(path)
            case S_IFDIR: throw BlockError(.invalid, "copying to \(path): it is a directory; name a file in it")
            default:
                throw BlockError(
                    .invalid, "copying to \(path): it is neither a file nor a block device (- is standard output)")
            }
        case .iscsi:
            throw BlockError(
                .unsupported,
                "copying to \(text): LUNs are only read through libiscsi; log in with the kernel's initiator, and name "
                    + "the block device")
        case .pattern, .memory, .point, .san:
            throw BlockError(.invalid, "copying to \(text): nothing can be written there; name a file or an NBD URI")
        }
    }
}

extension CopyDestination {
    private static func real(_ path: String) throws(BlockError) -> String {
        guard let real = realpath(path, nil) else { throw BlockError(errno: errno, "copying to \(path)") }
        defer { free(real) }
        return String(cString: real)
    }
}

/// How a destination may be used.
struct DestinationRules {
    /// Only a part is written, so that the destination has to be there.
    var isChange = false
    /// An interrupted copy goes on.
    var resumes = false
    /// What is there may be lost.
    var forces = false
    /// The journal's path; nil for beside the file.
    var journal: String?
    /// What is written, and whether compressed.
    var format = CopyFormat.raw
    var compresses = false
    /// The copy is complete only when it is on stable storage.
    var isDurable = true

    /// Throws `.invalid` where durability cannot be left out: what is kept for later has to be there later.
    func check(_ destination: CopyDestination) throws(BlockError) {
        if isDurable { return }
        guard case .file = destination, format == .raw, !isChange, !resumes, journal == nil else {
            throw BlockError(
                .invalid,
                "copying without flushing: that is for whole, raw copies to files, which nothing is kept of when they "
                    + "are interrupted: leave out --no-flush, or --changed, --resume, --journal and --to-format")
        }
    }
}

/// The format of a copy.
public enum CopyFormat: String, Sendable {
    /// The disk's bytes as they are.
    case raw
    /// A qcow2 image without a backing file.
    case qcow2
    /// A VMDK that is written, and can be read, from its first byte to its last, compressed.
    case streamOptimizedVMDK = "stream-optimized-vmdk"
}

/// A destination that is open: what to write to, and what to do in the end.
///
/// A new file is `NAME.partial` until it is complete. A file that is changed has `NAME.incomplete` beside it, durable
/// before its first byte changes. Nodes and exports have a journal only where the user names a place for it; as long
/// as it is there, they are incomplete.
final class OpenDestination {
    let target: any CopyTarget
    /// The disk behind the target; nil for a stream.
    private(set) var device: (any BlockDevice)?
    /// Ranges that an earlier copy has done.
    private(set) var finished = FinishedRanges()
    private(set) var journal: CopyJournal?
    private var partial: (aside: String, path: String)?
    private var marker: String?
    // Left by an earlier copy of what changed, of no use when the file is replaced.
    private var outdated: String?
    private var isRejected = false
    private var lock: FileLock?
    private let isChange: Bool
    private let isDurable: Bool

    /// Opens a destination for a source of a size.
    ///
    /// - Parameters:
    ///   - identity: the source's, and what is copied of it.
    /// - Throws: `BlockError`: it is there and may not be lost, is incomplete, has another size, is in use, cannot be
    ///   opened; or there is nothing to resume.
    init(
        _ destination: CopyDestination, size: UInt64, source: String, scope: String, _ rules: DestinationRules
    ) throws(BlockError) {
        isChange = rules.isChange
        isDurable = rules.isDurable
        try rules.check(destination)
        switch rules.format {
        case .raw: break
        case .qcow2:
            let image = try Self.makeImage(destination, size: size, rules)
            (target, device, partial) = (image, nil, (image.writer.path, image.name))
            return
        case .streamOptimizedVMDK:
            let image = try Self.makeStreamOptimized(destination, size: size, rules)
            (target, device, partial) = (image, nil, image.path.map { ($0, image.name) })
            return
        }
        switch destination {
        case .stream:
            if rules.resumes || rules.journal != nil {
                throw BlockError(.invalid, "copying to standard output: it cannot be resumed; leave --resume out")
            }
            (target, device) = (StreamTarget(STDOUT_FILENO, name: "standard output", size: size), nil)
        case .file(let path):
            let parts = try Self.openFile(path, size: size, rules)
            let disk = try RawFileDevice(parts.file, name: parts.path, Self.writable())
            (target, device, lock) = (
                DeviceTarget(disk, readsAsZeros: !rules.isChange && !rules.resumes, isDurable: rules.isDurable),
                disk, parts.lock
            )
            let status = try parts.file.status()
            let identity = CopyIdentity(
                source: source, scope: scope, target: "file \(status.st_dev):\(status.st_ino), \(size) bytes")
            marker = "\(path).incomplete"
            let changeJournal = "\(path).changed.journal"
            if !rules.isChange { (partial, outdated) = ((parts.path, path), changeJournal) }
            do throws(BlockError) {
                if !rules.isDurable {
                    // One of an earlier copy must not be taken for this one's.
                    try CopyJournal.begin("\(path).journal", identity).remove()
                    return
                }
                if rules.isChange && rules.resumes { try checkMarker(identity) }
                let beside = rules.isChange ? changeJournal : "\(path).journal"
                try openJournal(rules.journal ?? beside, identity, rules)
                if rules.isChange { try mark(identity) }
            } catch {
                // A new file without a journal is of no use to anybody.
                if !rules.isChange && !rules.resumes { unlink(parts.path) }
                throw error
            }
        case .node(let path):
            let disk = try BlockNodeDevice.open(path, Self.writable(direct: true))
            (target, device) = (DeviceTarget(disk), disk)
            let facts = disk.info.identity.map { "\($0.key) \($0.value)" }.joined(separator: ", ")
            try openForeign(CopyIdentity(source: source, scope: scope, target: "\(path), \(facts)"), size, rules)
        case .hotAdd(let reference):
            let disk = try reference.openHotAddedTarget()
            (target, device) = (DeviceTarget(disk), disk)
            var facts = disk.info.identity.map { "\($0.key) \($0.value)" }.joined(separator: ", ")
            // A disk that is added for each copy is another one each time.
            if case .hotAdd(.image) = reference.kind { facts = "\(reference), \(disk.info.size) bytes" }
            try openForeign(CopyIdentity(source: source, scope: scope, target: facts), size, rules)
        case .nbd(let uri):
            let disk = try NBDDevice.openInSession(uri, isWritable: true)
            (target, device) = (DeviceTarget(disk), disk)
            let name = "\(uri), \(disk.info.size) bytes"
            try openForeign(CopyIdentity(source: source, scope: scope, target: name), size, rules)
        }
    }

    private static func writable(direct: Bool = false) -> RawOptions {
        var options = RawOptions()
        options.isWritable = true
        options.isDirect = direct
        return options
    }

    // MARK: - Files

    private typealias OpenedFile = (file: Descriptor, path: String, lock: FileLock)

    private static func exists(_ path: String) -> Bool { access(path, F_OK) == 0 }

    private static func openFile(_ path: String, size: UInt64, _ rules: DestinationRules) throws(BlockError)
        -> OpenedFile
    {
        let doing = "copying to \(path)"
        let isMarked = exists(path + ".incomplete")
        if isMarked && rules.isChange && !rules.resumes {
            // What the earlier one has not copied is not in what changed since.
            throw BlockError(
                .denied,
                "\(doing): \(path).incomplete says that an earlier copy onto it was interrupted; --resume with the "
                    + "same --changed continues that; to begin anew, make a whole copy with --force, without --changed")
        }
        if isMarked && !rules.forces && !rules.resumes {
            throw BlockError(
                .denied,
                "\(doing): \(path).incomplete says that an earlier copy onto it was interrupted; --force makes a whole "
                    + "copy anew")
        }
        if rules.isChange {
            if !exists(path) {
                throw BlockError(.notFound, "\(doing): --changed needs a copy that is there; make a whole one first")
            }
            if rules.resumes && !isMarked {
                throw BlockError(.notFound, "\(doing): there is nothing to resume: no copy onto it was interrupted")
            }
            return try openExisting(path, size: size, doing)
        }
        let aside = "\(path).partial"
        if rules.resumes {
            if !exists(aside) {
                throw BlockError(.notFound, "\(doing): there is nothing to resume: \(aside) does not exist")
            }
            return try openExisting(aside, size: size, doing)
        }
        try checkNew(path, aside, rules)
        return try make(aside, size: size, doing)
    }

    /// Refuses to replace what may not be lost.
    private static func checkNew(_ path: String, _ aside: String, _ rules: DestinationRules) throws(BlockError) {
        if rules.forces { return }
        if exists(path) {
            throw BlockError(
                .denied, "copying to \(path): it exists; --force replaces it, --changed brings it up to date")
        }
        if exists(aside) {
            throw BlockError(
                .denied,
                "copying to \(path): \(aside) is what an earlier copy has left; --resume continues that, --force "
                    + "begins anew")
        }
    }

    private static func makeImage(_ destination: CopyDestination, size: UInt64, _ rules: DestinationRules)
        throws(BlockError) -> Qcow2Target
    {
        guard case .file(let path) = destination else {
            throw BlockError(.unsupported, "copying as qcow2: an image can only be written to a file")
        }
        let aside = try placeForImage(path, rules)
        let writer = try Qcow2Writer.create(
            aside, size: size, compression: rules.compresses ? .zstd(level: 3) : .none)
        return Qcow2Target(writer, name: path, readsAsZeros: true)
    }

    private static func makeStreamOptimized(_ destination: CopyDestination, size: UInt64, _ rules: DestinationRules)
        throws(BlockError) -> StreamOptimizedTarget
    {
        switch destination {
        case .stream:
            if rules.resumes || rules.journal != nil {
                throw BlockError(.invalid, "copying to standard output: it cannot be resumed; leave --resume out")
            }
            return try StreamOptimizedTarget(path: nil, name: "standard output", size: size)
        case .file(let path):
            return try StreamOptimizedTarget(path: try placeForImage(path, rules), name: path, size: size)
        case .node, .nbd, .hotAdd:
            throw BlockError(
                .unsupported, "copying as stream-optimized-vmdk: it can only be written to a file or standard output")
        }
    }

    /// Where an image is written until it is complete.
    private static func placeForImage(_ path: String, _ rules: DestinationRules) throws(BlockError) -> String {
        if rules.isChange || rules.resumes || rules.journal != nil {
            throw BlockError(
                .unsupported,
                "copying to \(path): a \(rules.format.rawValue) image is written in one go: --changed, --resume and "
                    + "--journal are for raw copies")
        }
        let aside = "\(path).partial"
        try checkNew(path, aside, rules)
        if exists(aside) { unlink(aside) }
        return aside
    }

    private static func openExisting(_ path: String, size: UInt64, _ doing: String) throws(BlockError) -> OpenedFile {
        let file = try Descriptor.open(path, O_RDWR)
        let lock = try lock(path, doing, sameAs: file)
        let found = UInt64(clamping: try file.status().st_size)
        if found != size {
            throw BlockError(
                .invalid, "\(doing): \(path) has \(found) bytes, and the source \(size): it is no copy of this disk")
        }
        return (file, path, lock)
    }

    /// Keeps others from the file, by a descriptor of its own: the lock goes with it, not with whoever still reads.
    private static func lock(_ path: String, _ doing: String, sameAs file: Descriptor) throws(BlockError) -> FileLock {
        let busy = BlockError(.denied, "\(doing): another copy is writing \(path)")
        guard let lock = try FileLock.take(try Descriptor.open(path, O_RDWR), path: path) else { throw busy }
        // The name may have gone to another file before it was locked.
        let (opened, locked) = (try file.status(), try lock.descriptor.status())
        var named = stat()
        guard stat(path, &named) == 0, [opened.st_ino, named.st_ino].allSatisfy({ $0 == locked.st_ino }),
            [opened.st_dev, named.st_dev].allSatisfy({ $0 == locked.st_dev })
        else { throw busy }
        return lock
    }

    private static func make(_ aside: String, size: UInt64, _ doing: String) throws(BlockError) -> OpenedFile {
        guard let length = off_t(exactly: size) else {
            throw BlockError(.tooLarge, "\(doing): \(size) bytes are more than any file has")
        }
        if exists(aside) {
            // Whoever is still writing it would find its file gone.
            let before = try lock(aside, doing, sameAs: try Descriptor.open(aside, O_RDWR))
            withExtendedLifetime(before) { _ = unlink(aside) }
        }
        let file = try Descriptor.open(aside, O_RDWR | O_CREAT | O_EXCL)
        let lock = try lock(aside, doing, sameAs: file)
        if ftruncate(file.number, length) < 0 {
            let number = errno
            unlink(aside)
            throw BlockError(errno: number, "\(doing): making \(aside) \(size) bytes long")
        }
        return (file, aside, lock)
    }

    private func openJournal(_ path: String, _ identity: CopyIdentity, _ rules: DestinationRules) throws(BlockError) {
        if rules.resumes {
            (journal, finished) = try CopyJournal.resume(path, identity)
        } else {
            journal = try CopyJournal.begin(path, identity)
        }
        Step.reached("copy.journal-begun")
    }

    /// What the marker of a copy says.
    private static func markerText(_ identity: CopyIdentity) -> [UInt8] {
        let text =
            "A copy onto this file has begun and is not complete. Do not use the file; see diskgate copy --resume."
        let facts = identity.lines.map { "\($0.key) \($0.value)\n" }.joined()
        return Array("\(text)\n\(facts)".utf8)
    }

    /// Refuses to go on with another copy than the one that was interrupted.
    private func checkMarker(_ identity: CopyIdentity) throws(BlockError) {
        guard let marker else { return }
        if try readSmallFile(marker, limit: 1 << 20) != Self.markerText(identity) {
            throw BlockError(
                .denied,
                "resuming the copy to \(target.name): \(marker) names another copy as the one that was interrupted; "
                    + "only that can go on; else make a whole copy with --force, without --changed")
        }
    }

    private func mark(_ identity: CopyIdentity) throws(BlockError) {
        guard let marker, !Self.exists(marker) else { return }
        try writeDurably(marker, Self.markerText(identity))
        Step.reached("copy.marked")
    }

    // MARK: - Nodes and exports

    private func openForeign(_ identity: CopyIdentity, _ size: UInt64, _ rules: DestinationRules) throws(BlockError) {
        let doing = "copying to \(target.name)"
        if rules.isChange && target.size != size {
            throw BlockError(
                .invalid, "\(doing): it has \(target.size) bytes, the source \(size): it is no copy of this disk")
        }
        if target.size < size {
            throw BlockError(.noSpace, "\(doing): it has \(target.size) bytes, the source \(size)")
        }
        guard let path = rules.journal else {
            if rules.resumes {
                throw BlockError(
                    .invalid, "\(doing): only a copy with --journal FILE can be resumed; name the same file again")
            }
            return
        }
        if Self.exists(path) && !rules.resumes && rules.isChange {
            throw BlockError(
                .denied,
                "\(doing): the journal \(path) says that an earlier copy was interrupted; --resume with the same "
                    + "--changed continues that; to begin anew, make a whole copy with --force, without --changed")
        }
        if Self.exists(path) && !rules.resumes && !rules.forces {
            throw BlockError(
                .denied,
                "\(doing): the journal \(path) says that an earlier copy was interrupted; --resume continues that, "
                    + "--force begins anew")
        }
        try openJournal(path, identity, rules)
    }

    // MARK: - The end

    /// Makes an image readable.
    ///
    /// - Throws: what writing or opening it throws.
    func seal() throws(BlockError) {
        if let image = target as? Qcow2Target {
            try image.writer.finish()
            device = try Self.openImage(image.writer.path, .qcow2)
        } else if let image = target as? StreamOptimizedTarget {
            try image.finish()
            if let path = image.path { device = try Self.openImage(path, .vmdk) }
        }
    }

    private static func openImage(_ path: String, _ format: ImageFormat) throws(BlockError) -> any BlockDevice {
        let file = try RawFileDevice.open(path)
        return try openDisk(ResolvedFile(device: file, identity: path, resolver: nil), .explicit(format))
    }

    /// Takes away what is of no use after a failure: an image without its header or its end, a copy
    /// that nothing can go on with.
    func abandon() {
        (target as? Qcow2Target)?.writer.abandon()
        (target as? StreamOptimizedTarget)?.abandon()
        if let partial, !isDurable { unlink(partial.aside) }
    }

    /// Makes the destination what it is to be: a complete copy under its own name.
    ///
    /// - Throws: `BlockError` of the system's reason.
    func complete() throws(BlockError) {
        Step.reached("copy.complete")
        if let partial {
            // What is replaced may be durable.
            if !isDurable && Self.exists(partial.path) { try target.flush() }
            if isDurable {
                try renameDurably(partial.aside, to: partial.path)
            } else if rename(partial.aside, partial.path) < 0 {
                throw BlockError(errno: errno, "renaming \(partial.aside) to \(partial.path)")
            }
            Step.reached("copy.renamed")
        }
        try journal?.remove()
        Step.reached("copy.journal-removed")
        if let outdated, Self.exists(outdated) { unlink(outdated) }
        guard let marker, Self.exists(marker) else { return }
        if unlink(marker) < 0 && errno != ENOENT { throw BlockError(errno: errno, "removing \(marker)") }
        try syncDirectory(directoryName(marker))
    }

    /// Keeps anybody from going on with what was found to be wrong.
    func reject() {
        guard let journal else { return }
        isRejected = true
        do throws(BlockError) { try journal.reject() } catch { unlink(journal.path) }
    }

    /// What the copy is called when it is complete.
    var name: String { partial?.path ?? target.name }

    /// What to do after a failure; nil where nothing is kept.
    var advice: String? {
        guard journal != nil else { return nil }
        if isRejected {
            let kept = partial.map { "what was copied is kept in \($0.aside)" } ?? "what was written stays"
            return "\(kept) and is of no use; make a whole copy with --force"
        }
        let kept = partial.map { "what is copied so far is kept in \($0.aside)" } ?? "the copy is incomplete"
        // Where only what changed is copied, nothing but the whole would do instead.
        let instead = isChange ? "a whole copy with --force begins anew" : "with --force it begins anew"
        return "\(kept); the same command with --resume goes on, \(instead)"
    }
}
