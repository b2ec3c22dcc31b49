// The machine's configuration as a restore point keeps it, written where the user wants it.
public import Block
import LinuxIO

extension Repository {
    /// Writes the configuration documents of a point into a directory.
    ///
    /// - Returns: the files' names in the directory.
    /// - Throws: `.corrupt` when a document is not what was backed up, `.invalid` when a file of its name is there.
    public func restoreDocuments(_ point: RestorePoint, to directory: String) throws(BlockError) -> [String] {
        try requireOutside(directory)
        try makeDirectories(directory)
        var names: [String] = []
        for document in point.manifest.documents {
            let file = layout(point.machine).document(document.content.file)
            let content = try readSmallFile(file, limit: 1 << 30)
            if try sha256(content) != document.content.sha256 {
                throw BlockError(.corrupt, "restoring \(document.name) of \(point.description): \(file) was changed")
            }
            let name = safeName(document.name, or: "document")
            let place = "\(directory)/\(names.contains(name) ? document.content.file : name)"
            if (try? readSmallFile(place, limit: 1 << 30)) == content {
                names.append(name)
                continue
            }
            try refuseExisting(place)
            try writeDurably(place, content)
            names.append(name)
        }
        return names
    }

    private func refuseExisting(_ path: String) throws(BlockError) {
        if try namesIfThere(directoryName(path)).contains(where: { path.hasSuffix("/\($0)") }) {
            throw BlockError(.invalid, "restoring \(path): there is another file of this name; give a new directory")
        }
    }
}
