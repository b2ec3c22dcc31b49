// Opens a virtual machine by its URI: the scheme says which hypervisor is asked.
public import Block
import Transports

/// The hypervisors that diskgate knows.
public enum Hypervisors {
    /// The forms of URIs of machines, for people.
    static let forms = "qmp+unix:PATH, qmp+tcp:HOST:PORT, libvirt:URI/DOMAIN or disks:NAME"

    /// URI schemes of hypervisors that this version does not know, and what they are.
    private static let notYet = ["vsphere": "vSphere", "scp": "Sangfor SCP"]

    /// Whether two URIs name one machine, whatever else they say of how it is to be reached and backed up.
    public static func areSame(_ one: String, _ other: String) -> Bool {
        if one == other { return true }
        guard let one = place(one), let other = place(other) else { return false }
        return one == other
    }

    /// Where a machine is: its monitor, or its libvirt and its name; nil for what is no URI of a machine.
    private static func place(_ text: String) -> [String]? {
        if text.hasPrefix("libvirt:") { return (try? LibvirtPlace(text)).map { [$0.virsh.uri, $0.domain] } }
        guard let uri = try? MachineURI(text) else { return nil }
        if uri.scheme == GivenDisks.scheme { return [uri.scheme, uri.body] }
        return (try? QEMUPlace(uri)).map { ["\($0.monitor)"] }
    }

    /// Opens a machine: `qmp+unix:PATH[?agent=PATH]`, `qmp+tcp:HOST:PORT?nbd=HOST:PORT&scratch=DIRECTORY[...]`,
    /// `libvirt:URI/DOMAIN`, `disks:NAME?snapshot=NAME&disk=ID=SOURCE`. Nothing is asked of the hypervisor yet.
    ///
    /// - Throws: `.invalid` for a malformed URI, `.unsupported` for hypervisors of later versions.
    public static func open(_ text: String) throws(BlockError) -> any Provider {
        if text.hasPrefix("libvirt:") { return LibvirtProvider(try LibvirtPlace(text)) }
        let uri = try MachineURI(text)
        switch uri.scheme {
        case GivenDisks.scheme: return GivenDisks(try GivenDisksPlace(uri))
        case "qmp+unix", "qmp+tcp": return QEMUProvider(try QEMUPlace(uri))
        default:
            if let name = notYet[uri.scheme] {
                throw BlockError(
                    .unsupported, "opening the machine \(text): \(name) is not known to this version of diskgate")
            }
            throw uri.bad("\(uri.scheme): is no hypervisor; give \(forms)")
        }
    }
}

/// Names of what diskgate makes on a hypervisor. By them it tells its own things from those of others.
enum OwnName {
    /// What all checkpoints of diskgate begin with.
    static let prefix = "diskgate-"

    /// A checkpoint's name with the prefix.
    static func checkpoint(_ name: String) -> String { name.hasPrefix(prefix) ? name : prefix + name }

    /// A checkpoint's name with the prefix, for one disk only: a hash of the disk stands before the last dash. Disks
    /// may change places when a machine starts again, and one must not be taken for another by its bitmap's name.
    /// Names that have the hash already stay as they are.
    static func checkpoint(_ name: String, of disk: String) -> String {
        let name = checkpoint(name)
        let hash = hash(disk)
        guard let dash = name.lastIndex(of: "-"), !name[..<dash].hasSuffix("-\(hash)") else { return name }
        return "\(name[..<dash])-\(hash)\(name[dash...])"
    }

    /// 8 hexadecimal digits of a text: FNV-1a with 32 bits (draft-eastlake-fnv).
    static func hash(_ text: String) -> String {
        let value = text.utf8.reduce(0x811C_9DC5 as UInt32) { ($0 ^ UInt32($1)) &* 0x0100_0193 }
        let digits = String(value, radix: 16)
        return String(repeating: "0", count: 8 - digits.count) + digits
    }

    /// Names in one text of an obligation, and the text taken apart again.
    static func joined(_ names: [String]) -> String { names.joined(separator: "\n") }
    static func names(in text: String?) -> [String] { (text ?? "").split(separator: "\n").map(String.init) }

    /// Whether a bitmap or checkpoint was made by diskgate.
    static func isOwn(_ name: String) -> Bool { name.hasPrefix(prefix) }

    /// Whether one checkpoint takes the place of another: both are of the same series, which is what stands before
    /// the last dash. So two repositories that name their checkpoints REPOSITORY-NUMBER do not touch each other's.
    static func replaces(_ new: String, _ old: String) -> Bool {
        new != old && isOwn(old) && series(new) == series(old)
    }

    private static func series(_ name: String) -> Substring {
        name.lastIndex(of: "-").map { name[...$0] } ?? ""
    }

    /// What identifies a run in names that may be at most 31 bytes long: 12 hexadecimal digits of its UUID.
    static func short(_ run: String) -> String { String(run.filter { $0 != "-" }.prefix(12)) }
}

extension Hypervisors {
    /// Makes `hotadd:` sources that name a controller open in this process. Called once, at its start.
    public static func openHotAddControllers() {
        HotAddControllers.open { (uri) throws(BlockError) in try QEMUHotAdd(uri) }
    }
}
