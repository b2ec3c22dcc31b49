// The udev rule that keeps every SCSI disk from the proxy's own volume managers, but those recorded as the proxy's own.
import LinuxIO

/// The text of the rule, and what it leaves in udev's database.
enum UdevRules {
    /// Where it goes. Before all that reads disks: 55-scsi-sg3_id, 56-..., 60-persistent-storage, 60-multipath.
    static let path = "/etc/udev/rules.d/05-diskgate.rules"
    /// What udev notes of a disk that is kept out.
    static let mark = "DISKGATE_KEPT_OUT"
    /// What udev notes of the proxy's own.
    static let ownMark = "DISKGATE_OWN"
    /// Where the only links to disks that are kept out are: LVM goes by names of nodes.
    static let links = "/dev/disk/by-diskgate/kept-out/"

    /// What switches the rule off on the kernel's command line, with `=off`.
    static let bootOption = "diskgate_keep_out"

    /// The rule for these disks of the proxy's own.
    static func text(_ own: [OwnDisk]) -> String {
        var lines = [
            "# Keeps SCSI disks that come to this machine from udev, LVM, mdadm, multipath, bcache, udisks, systemd:",
            "# all but the machine's own, which are listed here. Written by diskgate setup; diskgate setup --keep DISK",
            "# adds a disk, diskgate setup --remove takes all of it away.",
            "ACTION==\"remove\", GOTO=\"diskgate_end\"",
            "SUBSYSTEM!=\"block\", GOTO=\"diskgate_end\"",
            "KERNEL!=\"sd*\", GOTO=\"diskgate_end\"",
            "", "# For a machine that does not find its own disks: \(bootOption)=off on the kernel's command line.",
            "IMPORT{cmdline}=\"\(bootOption)\"",
            "ENV{\(bootOption)}==\"off\", GOTO=\"diskgate_end\"",
            "", "# This machine's own disks, by name, and by place where it tells them.",
            "ATTRS{wwid}==\"?*\", ENV{.DISKGATE_NAMED}=\"1\"",
        ]
        for disk in own { lines += matches(disk) }
        lines += [
            "", "# All others: nothing reads what lies on them, and no link leads to them but one for LVM's filter.",
            "ENV{\(mark)}=\"1\"",
            "ENV{UDEV_DISABLE_PERSISTENT_STORAGE_RULES_FLAG}=\"1\"",
            "ENV{DM_UDEV_DISABLE_OTHER_RULES_FLAG}=\"1\"",
            "ENV{DM_MULTIPATH_DEVICE_PATH}=\"0\"",
            "ENV{SYSTEMD_READY}=\"0\"",
            "ENV{UDISKS_IGNORE}=\"1\"",
            "OPTIONS:=\"nowatch\"",
            "SYMLINK:=\"\(links.dropFirst("/dev/".count))%k\"",
            "GOTO=\"diskgate_end\"",
            "", "LABEL=\"diskgate_own\"",
            "ENV{\(ownMark)}=\"1\"",
            "LABEL=\"diskgate_end\"",
        ]
        return ManagedText.sealed(lines.map { "\($0)\n" }.joined())
    }

    /// The lines that let one disk pass.
    private static func matches(_ disk: OwnDisk) -> [String] {
        let named = disk.wwid.map { ["ATTRS{wwid}==\"\(pattern($0))\", GOTO=\"diskgate_own\""] } ?? []
        if case .none = disk.place { return named }
        guard let place = SCSIAddress(disk.hctl) else { return named }
        let unit = "\(place.channel):\(place.target):\(place.unit)"
        // The adapter's number is the order in which the kernel met adapters; its place on the bus stays.
        let path =
            disk.bus.map { "*/\(pattern($0))/*/\("[0-9]*"):\(unit)/block/*" } ?? "*/\(place.host):\(unit)/block/*"
        // Where places change hands, a disk of another name is another disk.
        var nameless = ", ENV{.DISKGATE_NAMED}!=\"1\""
        if case .whatever = disk.place { nameless = "" }
        return named + ["DEVPATH==\"\(path)\"\(nameless), GOTO=\"diskgate_own\""]
    }

    /// A text as a pattern that matches it: characters that mean something in patterns or strings become `?`.
    static func pattern(_ text: String) -> String {
        String(text.map { $0.isASCII && ($0.isLetter || $0.isNumber || " .:-_+/,".contains($0)) ? $0 : "?" })
    }
}
