// Where the settings of other programs are, and those programs: this machine's, or those of a tree that a test made.
import Block
import Glibc
import LinuxIO

/// A machine's files, and its programs where it is this machine.
struct Machine: Sendable {
    /// What lies before /etc and /run; empty for this machine.
    let root: String

    /// A file's path.
    func path(_ path: String) -> String { "\(root)\(path)" }

    func has(_ path: String) -> Bool { access(self.path(path), F_OK) == 0 }

    /// Whether it is a container, by the marks that systemd-nspawn, LXC, Docker and Podman leave: the disks are the
    /// host's then, and so is the udev that acts on them.
    var isContainer: Bool {
        if ["/run/systemd/container", "/.dockerenv", "/run/.containerenv"].contains(where: has) { return true }
        let environment = (try? readSmallFile(path("/proc/1/environ"), limit: 1 << 20)) ?? []
        return environment.split(separator: 0).contains { $0.starts(with: "container=".utf8) }
    }

    /// Where a program is; nil where there is none.
    func program(_ name: String) -> String? {
        ["/usr/sbin", "/sbin", "/usr/bin", "/bin", "/usr/local/sbin", "/usr/local/bin"].map { "\($0)/\(name)" }
            .first { access(path($0), X_OK) == 0 }
    }

    /// What a program says.
    ///
    /// - Returns: its standard output; nil where it is not here, or this is not the running machine.
    /// - Throws: `BlockError` when it fails, with what it says.
    func say(_ name: String, _ words: [String], seconds: Double = 60) throws(BlockError) -> String? {
        guard root.isEmpty, let program = program(name) else { return nil }
        // LVM complains about every descriptor that it finds open.
        let environment = ["LVM_SUPPRESS_FD_WARNINGS=1", "LC_ALL=C"]
        let result = try ChildProgram.run([program] + words, seconds: seconds, environment: environment)
        if result.status != 0 {
            let errors = String(decoding: result.errors, as: UTF8.self).split(separator: "\n").joined(separator: "; ")
            throw BlockError(
                .inputOutput,
                "\(name) \(words.joined(separator: " ")): it ended with status \(result.status)"
                    + (errors.isEmpty ? "" : ": \(errors)"))
        }
        return String(decoding: result.output, as: UTF8.self)
    }

    /// The files of several directories that a program reads, in the order of their names; of files of one name only
    /// that of the first directory counts.
    func files(in directories: [String], ending: String) -> [(name: String, path: String)] {
        var found: [String: String] = [:]
        for directory in directories {
            for name in (try? namesInDirectory(path(directory))) ?? [] where name.hasSuffix(ending) {
                found[name] = found[name] ?? path("\(directory)/\(name)")
            }
        }
        return found.sorted { $0.key.utf8.lexicographicallyPrecedes($1.key.utf8) }.map { ($0.key, $0.value) }
    }
}
