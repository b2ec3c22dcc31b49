// Opens the files that an image names, and only beneath directories that the user allows.
import Block
import CLinux
import Formats
import Glibc
import LinuxIO

/// Opens files beneath a set of directories. The kernel keeps names inside them, symbolic links included
/// (openat2 with RESOLVE_BENEATH), so a hostile image cannot reach anything else.
struct DirectoryResolver: FileResolver {
    /// The directory that relative names start from, without symbolic links.
    let directory: String
    /// The directories that files may lie beneath, without symbolic links.
    let allowed: [String]
    let options: RawOptions

    func open(_ name: String) throws(BlockError) -> ResolvedFile {
        let path = normalised(name.hasPrefix("/") ? name : "\(directory)/\(name)")
        return try resolved(try openBeneath(path), path: path)
    }

    /// Opens a file, wherever links in its path lead.
    private func openBeneath(_ path: String) throws(BlockError) -> Descriptor {
        guard let root = allowed.first(where: { path.utf8.starts(with: ($0 == "/" ? "/" : "\($0)/").utf8) }) else {
            throw BlockError(
                .denied,
                "\(path) does not lie beneath \(allowed.joined(separator: " or ")); if this image may use it, allow "
                    + "its directory with --image-directory")
        }
        let folder = try Descriptor.open(root, O_PATH | O_DIRECTORY)
        let inside = String(path.utf8.dropFirst(root == "/" ? 1 : root.utf8.count + 1)) ?? path
        // Without waiting, should it be a pipe.
        let flags = O_RDONLY | O_NONBLOCK | (options.isDirect ? O_DIRECT : 0)
        let number = dg_open_beneath(folder.number, inside, flags)
        if number == -EXDEV {
            throw BlockError(
                .denied,
                "\(path) leads out of \(root) by a symbolic link; allow where it leads to with "
                    + "--image-directory")
        }
        if number < 0 { throw BlockError(errno: -number, "opening \(path)") }
        let file = Descriptor(owning: number)
        file.makeBlocking()
        return file
    }

    /// What an open file is, with a resolver for the files it names in turn.
    private func resolved(_ file: Descriptor, path: String) throws(BlockError) -> ResolvedFile {
        let status = try file.status()
        let isNode = status.st_mode & S_IFMT == S_IFBLK
        let device: any BlockDevice =
            isNode ? try BlockNodeDevice(file, name: path, options) : try RawFileDevice(file, name: path, options)
        let next = DirectoryResolver(directory: parent(path), allowed: allowed, options: options)
        let identity = isNode ? "node \(status.st_rdev)" : "\(status.st_dev):\(status.st_ino)"
        if isNode { return ResolvedFile(device: device, identity: identity, resolver: next) }
        return ResolvedFile(device: device, identity: identity, resolver: next) { () throws(BlockError) in
            try RawFileDevice(try openBeneath(path), name: path, options)
        }
    }
}

/// A path without empty, "." and ".." parts, by its text alone.
func normalised(_ path: String) -> String {
    var parts: [Substring] = []
    for part in path.split(separator: "/") {
        switch part {
        case ".": continue
        case "..": _ = parts.popLast()
        default: parts.append(part)
        }
    }
    return "/" + parts.joined(separator: "/")
}

/// The directory that a normalised path lies in.
func parent(_ path: String) -> String {
    guard let slash = path.lastIndex(of: "/"), slash != path.startIndex else { return "/" }
    return String(path[..<slash])
}

/// A path without symbolic links.
///
/// - Throws: `BlockError` when it does not exist.
func realPath(_ path: String) throws(BlockError) -> String {
    guard let real = realpath(path, nil) else { throw BlockError(errno: errno, "opening \(path)") }
    defer { free(real) }
    return String(cString: real)
}
