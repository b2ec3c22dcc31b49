// A domain as libvirt describes it: its disks, its state, its checkpoints.
import Block
import LinuxIO

/// What is known of a domain.
struct LibvirtDomain: Sendable {
    /// A disk of the domain.
    struct Disk: Sendable {
        /// vda, sdb: the target's name.
        let target: String
        /// The image's path; empty for what is no file or node.
        let path: String
        let format: String
        let size: UInt64
        let obstacle: String?
        var checkpoints: [String] = []

        /// Whether libvirt can keep checkpoints of it.
        var isTracked: Bool { format == "qcow2" }

        /// The disk in the provider's words.
        var described: VirtualDisk {
            var disk = VirtualDisk(id: target, size: size, name: path, format: format)
            disk.obstacle = obstacle
            disk.checkpoints = checkpoints
            if !isTracked { disk.trackingObstacle = "libvirt keeps checkpoints of qcow2 images only" }
            return disk
        }
    }

    let uuid: String
    let name: String
    let isRunning: Bool
    /// `running`, `shut off`, `paused`, ...
    let state: String
    let hasAgent: Bool
    let disks: [Disk]
    /// User and group that the domain's QEMU runs as, where libvirt says so.
    let owner: (user: UInt32, group: UInt32)?
    let nvram: String?

    /// Asks libvirt.
    ///
    /// - Throws: `BlockError` when it does not answer, or does not know the domain.
    init(_ place: LibvirtPlace) throws(BlockError) {
        let text = try place.virsh.run(["dumpxml", place.domain])
        let state = try place.virsh.run(["domstate", place.domain])
        let sizes = try place.virsh.run(["domblkinfo", place.domain, "--all"])
        try self.init(
            domain: place.domain, xml: text, state: state, sizes: sizes, checkpoints: try Self.checkpoints(place))
    }

    /// A domain by what virsh prints.
    ///
    /// - Parameters:
    ///   - domain: what the user calls it.
    ///   - checkpoints: diskgate's, oldest first, and what virsh prints of each.
    /// - Throws: `.corrupt` when it is no XML.
    init(domain: String, xml text: String, state: String, sizes: String, checkpoints: [(name: String, xml: String)])
        throws(BlockError)
    {
        let xml = try XMLElement(parsing: text)
        self.state = state.split(separator: "\n").first.map(String.init) ?? ""
        uuid = xml["uuid"]?.text ?? domain
        name = xml["name"]?.text ?? domain
        isRunning = !["shut off", "crashed", "no state"].contains(self.state)
        let devices = xml["devices"]
        hasAgent =
            devices?.all("channel").contains {
                $0["target"]?.attributes["name"] == "org.qemu.guest_agent.0"
                    && $0["target"]?.attributes["state"] == "connected"
            } ?? false
        nvram = xml["os"]?["nvram"]?.text
        let labels = xml.all("seclabel").first { $0.attributes["model"] == "dac" }?["label"]?.text ?? ""
        let numbers = labels.split(separator: ":").compactMap { UInt32($0.drop { $0 == "+" }) }
        owner = numbers.count == 2 ? (numbers[0], numbers[1]) : nil
        let sizes = Self.sizes(in: sizes)
        var disks = (devices?.all("disk") ?? []).map { Self.disk($0, sizes) }
        for checkpoint in checkpoints {
            let known = Checkpoint(name: checkpoint.name, try XMLElement(parsing: checkpoint.xml))
            for index in disks.indices where known.knows(disks[index]) {
                disks[index].checkpoints.append(checkpoint.name)
            }
        }
        self.disks = disks
    }

    private static func disk(_ element: XMLElement, _ sizes: [String: UInt64]) -> Disk {
        let target = element["target"]?.attributes["dev"] ?? ""
        let kind = element.attributes["device"] ?? "disk"
        let size = sizes[target] ?? 0
        let obstacle: String? =
            if kind != "disk" {
                "it is a \(kind)"
            } else if element["source"] == nil {
                "there is no medium in it"
            } else if element["readonly"] != nil {
                "the guest cannot write to it"
            } else if element["transient"] != nil {
                "it is transient: its changes go when the domain ends"
            } else if size == 0 || target.isEmpty {
                "libvirt does not tell its size"
            } else {
                nil
            }
        return Disk(
            target: target, path: image(of: element),
            format: element["driver"]?.attributes["type"] ?? "raw", size: size, obstacle: obstacle)
    }

    /// Bytes of each disk, by target.
    private static func sizes(in text: String) -> [String: UInt64] {
        var sizes: [String: UInt64] = [:]
        for line in text.split(separator: "\n") {
            let words = line.split(separator: " ", omittingEmptySubsequences: true)
            if words.count >= 2, let size = UInt64(words[1]) { sizes[String(words[0])] = size }
        }
        return sizes
    }

    private static func image(of disk: XMLElement) -> String {
        let source = disk["source"]?.attributes ?? [:]
        return source["file"] ?? source["dev"] ?? ""
    }

    /// A checkpoint of diskgate's.
    private struct Checkpoint {
        let name: String
        /// The targets that it has bitmaps of.
        let targets: Set<String>
        /// The images that the domain had then, by target.
        let images: [String: String]

        /// A checkpoint by its name and its description.
        init(name: String, _ xml: XMLElement) {
            self.name = name
            let disks = (xml["disks"]?.all("disk") ?? []).filter { $0.attributes["checkpoint"] == "bitmap" }
            targets = Set(disks.compactMap { $0.attributes["name"] })
            var images: [String: String] = [:]
            for disk in xml["domain"]?["devices"]?.all("disk") ?? [] {
                if let target = disk["target"]?.attributes["dev"] { images[target] = image(of: disk) }
            }
            self.images = images
        }

        /// Whether it tells the changes of a disk. Two images that have changed places both have its bitmap, and each
        /// would tell of the other's changes.
        func knows(_ disk: Disk) -> Bool {
            let wasAnothers = images.contains { $0.key != disk.target && $0.value == disk.path && !disk.path.isEmpty }
            return targets.contains(disk.target) && (images[disk.target] == disk.path || !wasAnothers)
        }
    }

    /// Diskgate's checkpoints, oldest first, and what virsh prints of each.
    private static func checkpoints(_ place: LibvirtPlace) throws(BlockError) -> [(name: String, xml: String)] {
        var checkpoints: [(name: String, xml: String)] = []
        for name in try place.checkpointNames() {
            let text = try place.virsh.run(["checkpoint-dumpxml", place.domain, name])
            checkpoints.append((name, text))
        }
        return checkpoints
    }
}

/// A backup that libvirt makes of a domain.
struct LibvirtBackup {
    /// The socket or port where it is served.
    let server: String
    let exports: [String]
    /// Its scratch files.
    let files: [String]

    /// A backup by what virsh prints of it.
    ///
    /// - Throws: `.corrupt` when it is no XML.
    init(parsing text: String) throws(BlockError) {
        let backup = try XMLElement(parsing: text)
        let attributes = backup["server"]?.attributes ?? [:]
        let disks = backup["disks"]?.all("disk") ?? []
        server = attributes["socket"] ?? attributes["port"] ?? ""
        exports = disks.compactMap { $0.attributes["exportname"] }
        files = disks.compactMap { $0["scratch"]?.attributes["file"] }
    }

    /// Whether it is the one that an obligation speaks of. A port is the same in each run; exports are not.
    func isMeant(by details: [String: String]) -> Bool {
        guard server == details["server"] else { return false }
        return details["export"].map { prefix in exports.contains { $0.hasPrefix(prefix) } } ?? true
    }
}

extension LibvirtPlace {
    /// Names of diskgate's checkpoints of the domain, oldest first.
    func checkpointNames() throws(BlockError) -> [String] {
        try virsh.run(["checkpoint-list", domain, "--topological", "--name"]).split(separator: "\n")
            .map { $0.filter { !$0.isWhitespace } }.filter(OwnName.isOwn)
    }

    /// Removes a checkpoint with its bitmaps; where they are damaged, libvirt's knowledge of it.
    func deleteCheckpoint(_ name: String) throws(BlockError) {
        let result = try virsh.attempt(["checkpoint-delete", domain, name])
        if result.isGood || result.errors.contains("no domain checkpoint") { return }
        if result.errors.contains("inconsistent") || result.errors.contains("not found in") {
            _ = try virsh.run(["checkpoint-delete", domain, name, "--metadata"])
            return
        }
        let hint = result.errors.contains("not running") ? "; start the machine and try again" : ""
        throw BlockError(.inputOutput, "removing the checkpoint \(name) of \(self.name): \(result.errors)\(hint)")
    }

    /// The backup that goes on; nil where there is none.
    func runningBackup() throws(BlockError) -> LibvirtBackup? {
        // Asking for the description of a backup that is not there is an error in the daemon's log.
        if try isIdle() { return nil }
        let result = try virsh.attempt(["backup-dumpxml", domain])
        if !result.isGood {
            let absent = ["no domain backup job", "not running", "failed to get domain", "Domain not found"]
            if absent.contains(where: result.errors.contains) { return nil }
            throw BlockError(.inputOutput, "looking for a backup of \(name): \(result.errors)")
        }
        return try LibvirtBackup(parsing: result.output)
    }

    /// Whether no job is at work on the domain: neither is a backup that is only just beginning.
    func isIdle() throws(BlockError) -> Bool {
        let result = try virsh.attempt(["domjobinfo", domain])
        if result.isGood {
            return result.output.split { $0.isWhitespace || $0 == ":" }.prefix(3).last == "None"
        }
        if ["not running", "failed to get domain", "Domain not found"].contains(where: result.errors.contains) {
            return true
        }
        throw BlockError(.inputOutput, "looking for jobs of \(name): \(result.errors)")
    }
}
