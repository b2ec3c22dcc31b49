// What setup asks a machine about its disks before it records them: who uses one, what lies on it, who else has it.
import Block
import Formats
import Glibc
import LinuxIO

/// Who uses a disk, and how much that says of whose it is.
struct DiskUse: Equatable {
    enum Kind {
        /// The machine runs from it: `/`, `/boot`, `/usr` or swap is on it.
        case system
        /// Something of it is mounted elsewhere.
        case mounted
        /// Only the kernel holds it: a volume group that LVM has started, which a guest's disk may have brought.
        case held
    }

    var kind: Kind
    /// For people: where it is mounted, what lies over it.
    var reason: String

    /// What uses a disk of this machine; nil where nothing does.
    static func now(_ disk: AttachedDisk, _ all: [AttachedDisk]) -> DiskUse? {
        let report = DiskReport(disk, among: all, users: NodeUsers(), protections: nil, readsContent: false)
        let mounts = report.uses.filter { $0.hasPrefix("/") }
        let isSystem = report.uses.contains {
            ["/", "/boot", "/usr", "swap"].contains($0) || $0.hasPrefix("/boot/")
        }
        if !mounts.isEmpty {
            return DiskUse(kind: isSystem ? .system : .mounted, reason: "mounted at \(mounts.joined(separator: ", "))")
        }
        if let other = report.uses.first { return DiskUse(kind: isSystem ? .system : .mounted, reason: other) }
        if let map = report.multipath { return DiskUse(kind: .held, reason: "a path of \(map)") }
        if !report.holders.isEmpty {
            return DiskUse(kind: .held, reason: "held by \(report.holders.joined(separator: ", "))")
        }
        // File systems of several disks, and whatever else has no place in sysfs.
        let number = open(disk.node, O_RDONLY | O_NONBLOCK | O_EXCL | O_CLOEXEC)
        if number >= 0 { close(number) }
        return number < 0 && errno == EBUSY ? DiskUse(kind: .held, reason: "in use") : nil
    }
}

/// A physical volume of LVM's, and the volume group that it is in.
struct VolumeMember: Equatable {
    /// The kernel's name of the node, or device mapper's.
    var node: String
    /// The group's UUID: a guest's group may have the name of the proxy's own.
    var group: String
    /// The group's name, for people.
    var title: String

    /// Those that LVM knows.
    ///
    /// - Returns: none where LVM is not here. Where it fails, none either: a disk with something on it that nobody
    ///   uses has to be named then.
    static func all(_ machine: Machine) -> [VolumeMember] {
        let words = ["pvs", "--noheadings", "--separator", "|", "-o", "pv_name,vg_uuid,vg_name"]
        guard let said = try? machine.say("lvm", words) else { return [] }
        return parsed(said) { machine.nodeName($0) }
    }

    /// Takes apart what `lvm pvs` says.
    static func parsed(_ said: String, name: (String) -> String?) -> [VolumeMember] {
        said.split(separator: "\n").compactMap { line in
            let parts = line.drop(while: \.isWhitespace).split(separator: "|", omittingEmptySubsequences: false)
            guard parts.count == 3, !parts[1].isEmpty, let node = name(String(parts[0])) else { return nil }
            return VolumeMember(node: node, group: String(parts[1]), title: String(parts[2]))
        }
    }
}

/// The questions; tests answer them themselves.
struct DiskQuestions {
    /// Whether diskgate has added a disk, or holds it: it is a guest's.
    var isHeld: (AttachedDisk) -> Bool = { _ in false }
    /// What uses a disk, given all disks.
    var use: (AttachedDisk, [AttachedDisk]) -> DiskUse? = DiskUse.now
    /// The physical volumes that LVM knows.
    var members: (Machine) -> [VolumeMember] = VolumeMember.all
    /// What lies on a disk, for people; nil for nothing that is known.
    var content: (AttachedDisk) -> String? = { disk in
        do throws(BlockError) {
            let found = try ContentSignatures.recognised(on: try BlockNodeDevice.open(disk.node))
            return found.isEmpty ? nil : found.map(\.type).joined(separator: ", ")
        } catch { return "cannot be read: \(error.message)" }
    }

    /// For a tree, whose disks nobody can look at.
    static var forTrees: DiskQuestions { DiskQuestions(content: { _ in nil }) }
}

extension Machine {
    /// The kernel's name of a node, by whatever link it is meant; nil where there is none.
    func nodeName(_ path: String) -> String? {
        guard let real = realpath(self.path(path), nil) else { return nil }
        defer { free(real) }
        return String(cString: real).split(separator: "/").last.map(String.init)
    }
}

extension AttachedDisk {
    /// The names of a disk, its partitions and all that lies over them, and what device mapper calls that.
    func stackNames(_ all: [AttachedDisk]) -> Set<String> {
        var found = Set([name] + partitions.map(\.name))
        var waiting = holders
        while let holder = waiting.popLast() {
            if let title = holder.title { found.insert(title) }
            if !found.insert(holder.name).inserted { continue }
            for other in all where other.name == holder.name {
                found.formUnion(other.partitions.map(\.name))
                waiting += other.holders
            }
        }
        return found
    }
}
