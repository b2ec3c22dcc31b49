// The initramfs: it has a copy of udev's rules, and goes by it before the machine's own are there.
import Block
import Glibc
import LinuxIO

/// The images that a machine boots with, and what makes them.
struct InitialImage {
    let machine: Machine

    /// The command that makes all of them anew; nil where nothing that is known does.
    var command: [String]? {
        if machine.program("update-initramfs") != nil { return ["update-initramfs", "-u", "-k", "all"] }
        if machine.program("dracut") != nil { return ["dracut", "--force", "--regenerate-all"] }
        return nil
    }

    /// What to do after the rule has changed or gone; nil where there is nothing to do.
    var advice: String? {
        command.map { "the initramfs still has the rule as it was, and goes by it at boot: run \(words($0))" }
    }

    private func words(_ command: [String]) -> String { command.joined(separator: " ") }

    /// Makes them anew.
    ///
    /// - Returns: what was run; nil where nothing makes images, or this is a tree.
    /// - Throws: `BlockError` when it fails, with what it says.
    func update() throws(BlockError) -> String? {
        guard let command, machine.root.isEmpty else { return nil }
        _ = try machine.say(command[0], Array(command.dropFirst()), seconds: 900)
        return "ran \(words(command))"
    }

    /// That images are older than the rule; nil where none is, or nothing here makes images.
    func warning() -> String? {
        guard let command, let rule = changed(machine.path(UdevRules.path)) else { return nil }
        let names = ((try? namesInDirectory(machine.path("/boot"))) ?? []).sorted()
        let old = names.filter { name in
            guard name.hasPrefix("initrd") || name.hasPrefix("initramfs") else { return false }
            return changed(machine.path("/boot/\(name)")).map { $0 < rule } ?? false
        }
        if old.isEmpty { return nil }
        return "older than the rule \(UdevRules.path), and without it: "
            + old.map { "/boot/\($0)" }.joined(separator: ", ") + "; run \(words(command))"
    }

    private func changed(_ path: String) -> (seconds: Int, nanoseconds: Int)? {
        var status = stat()
        return stat(path, &status) == 0 ? (status.st_mtim.tv_sec, status.st_mtim.tv_nsec) : nil
    }
}
