// mdadm: which arrays it puts together from disks that it comes across: only those that its configuration lists.
import Block
import LinuxIO

/// mdadm's setting for arrays that its configuration does not list (mdadm.conf(5): AUTO).
struct ArrayAssembly {
    let machine: Machine

    /// Whether mdadm is here.
    var isNeeded: Bool { machine.program("mdadm") != nil }

    private var isInDebiansPlace: Bool { machine.has("/etc/mdadm") || !machine.has("/etc/mdadm.conf") }
    private var main: String { isInDebiansPlace ? "/etc/mdadm/mdadm.conf" : "/etc/mdadm.conf" }
    private var directory: String { "\(main).d" }
    /// Our file.
    var file: ManagedFile { ManagedFile(path: machine.path("\(directory)/diskgate.conf")) }

    static let text = ManagedText.sealed(
        """
        # No array is put together but those that mdadm.conf lists: others may lie on disks of guests that come to this
        # machine. Written by diskgate setup.
        AUTO -all

        """)

    /// All that mdadm reads, in its order.
    private func configuration() throws(BlockError) -> String {
        var text = try textIfThere(machine.path(main)) ?? ""
        for file in machine.files(in: [directory], ending: ".conf") {
            text += "\n" + (try textIfThere(file.path) ?? "")
        }
        return text
    }

    /// The words of the first AUTO line, the only one that counts; nil where there is none. A line that begins with
    /// white space goes on with the one before it.
    static func automatic(_ configuration: String) -> [String]? {
        var words: [String]?
        for line in configuration.split(separator: "\n") {
            let code = line.prefix { $0 != "#" }
            let parts = code.split(whereSeparator: \.isWhitespace).map { $0.lowercased() }
            if code.first?.isWhitespace == true, words != nil {
                words? += parts
            } else if words != nil {
                if !parts.isEmpty { return words }
            } else if parts.first == "auto" {
                words = Array(parts.dropFirst())
            }
        }
        return words
    }

    /// Arrays that are running and not listed: with `AUTO -all` nobody would put them together at the next boot.
    ///
    /// - Returns: lines for mdadm.conf.
    private func unlisted(_ configuration: String) throws(BlockError) -> [String] {
        let running = try machine.say("mdadm", ["--detail", "--scan"]) ?? ""
        let listed = configuration.split(separator: "\n").filter { !$0.hasPrefix("#") }.joined(separator: "\n")
            .lowercased()
        return running.split(separator: "\n").filter { line in
            guard line.hasPrefix("ARRAY"),
                let identity = line.split(separator: " ").first(where: { $0.hasPrefix("UUID=") })
            else { return false }
            return !listed.contains(identity.lowercased())
        }.map(String.init)
    }

    /// Writes our file.
    ///
    /// - Returns: whether anything was written.
    /// - Throws: `.denied` where it would do harm, or nothing.
    func install() throws(BlockError) -> Bool {
        let configuration = try configuration()
        let lost = try unlisted(configuration)
        if !lost.isEmpty {
            throw BlockError(
                .denied,
                "setting AUTO -all for mdadm: arrays are running that \(main) does not list, and that would not be put "
                    + "together at the next boot; add these lines to it (and run update-initramfs -u): "
                    + lost.joined(separator: "; "))
        }
        if Self.automatic(configuration) == ["-all"], try file.state(Self.text) == .missing { return false }
        return try file.write(Self.text)
    }

    /// How it is with mdadm.
    func finding() throws(BlockError) -> ProtectionFinding {
        guard isNeeded else { return ProtectionFinding(.mdadm, .notNeeded, "there is no mdadm here") }
        guard let automatic = Self.automatic(try configuration()) else {
            return ProtectionFinding(
                .mdadm, .missing, "it puts together every array that it comes across", remedy: "diskgate setup")
        }
        if automatic == ["-all"] {
            return ProtectionFinding(.mdadm, .inForce, "AUTO -all: only arrays that \(main) lists are put together")
        }
        return ProtectionFinding(
            .mdadm, .missing, "its configuration says AUTO \(automatic.joined(separator: " "))",
            remedy: "write AUTO -all instead of that line in \(main); its own arrays have to be listed there")
    }
}
