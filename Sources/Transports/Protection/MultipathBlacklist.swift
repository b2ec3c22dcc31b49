// multipath: which disks it takes for paths of a LUN: none that the udev rule keeps out.
import Block
import LinuxIO

/// multipath's blacklist (multipath.conf(5)).
struct MultipathBlacklist {
    let machine: Machine

    /// Whether multipath is here.
    var isNeeded: Bool { machine.program("multipath") != nil || machine.program("multipathd") != nil }

    /// Our file.
    var file: ManagedFile { ManagedFile(path: machine.path("/etc/multipath/conf.d/diskgate.conf")) }

    private static let property = "property \"^\(UdevRules.mark)$\""

    static let text = ManagedText.sealed(
        """
        # Disks that \(UdevRules.path) keeps out are no paths of anything. Written by diskgate setup.
        blacklist {
            \(property)
        }

        """)

    /// Writes our file, and has the daemon read it.
    ///
    /// - Returns: whether anything was written.
    /// - Throws: `.denied` where somebody has changed it, or the system's reason.
    func install() throws(BlockError) -> Bool {
        let isNew = try file.write(Self.text)
        if isNew { reload() }
        return isNew
    }

    /// Has the daemon read its configuration anew, where it runs.
    func reload() { _ = try? machine.say("multipathd", ["reconfigure"]) }

    /// How it is with multipath.
    ///
    /// - Parameter asks: whether to ask the program what it goes by, or to look at our file only.
    func finding(asks: Bool) throws(BlockError) -> ProtectionFinding {
        guard isNeeded else { return ProtectionFinding(.multipath, .notNeeded, "there is no multipath here") }
        switch try file.state(Self.text) {
        case .current: break
        case .missing, .outdated:
            return ProtectionFinding(
                .multipath, .missing, "it may take disks of guests for paths of a LUN", remedy: "diskgate setup")
        case .changed:
            return ProtectionFinding(
                .multipath, .missing, "somebody has changed \(file.path)",
                remedy: "move \(file.path) away, then: diskgate setup")
        }
        guard asks else { return ProtectionFinding(.multipath, .inForce, file.path) }
        // The daemon's word, where it runs; else what it would read.
        let said = try? machine.say("multipathd", ["show", "config"])
        let effective = if let said, said.contains("blacklist") { said } else { try machine.say("multipath", ["-t"]) }
        if let effective, !effective.contains(Self.property) {
            return ProtectionFinding(
                .multipath, .missing, "it does not go by \(file.path)",
                remedy: "multipathd reconfigure; look for config_dir in /etc/multipath.conf")
        }
        return ProtectionFinding(.multipath, .inForce, "it takes no disk for a path that udev keeps out")
    }
}
