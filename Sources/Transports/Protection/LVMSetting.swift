// LVM as a machine has it: what its filter is by its own word, our block in its configuration, and what is missing.
import Block
import Glibc
import LinuxIO

/// LVM's configuration on a machine.
struct LVMSetting {
    let machine: Machine

    /// Whether LVM is here.
    var isNeeded: Bool { machine.program("lvm") != nil }

    private var path: String { machine.path(LVMFilter.path) }

    private func text() throws(BlockError) -> String { try textIfThere(path) ?? "" }

    /// What LVM goes by, by its own word; in a tree, what our file says.
    private func effective() throws(BlockError) -> LVMFilter.Effective {
        guard let said = try machine.say("lvm", ["lvmconfig", "--typeconfig", "current", "devices"]) else {
            let lines = try text().split(separator: "\n").compactMap { $0.after("devices/global_filter = ") }
            return LVMFilter.effective(
                lines.map { "global_filter=\($0)" }.joined(separator: "\n"), hasDevicesFile: false)
        }
        let lines = said.split(separator: "\n").map { line in String(line.drop(while: \.isWhitespace)) }
        return LVMFilter.effective(
            lines.joined(separator: "\n"), hasDevicesFile: machine.has("/etc/lvm/devices/system.devices"))
    }

    /// Writes our block, unless LVM keeps away by itself.
    ///
    /// - Returns: whether anything was written.
    /// - Throws: `.denied` where the administrator's own settings stand against it, or why it could not be written.
    func install() throws(BlockError) -> Bool {
        let before = try text()
        if LVMFilter.isPlaced(in: before) { return false }
        if ManagedText.block(in: before) == nil {
            let effective = try effective()
            if LVMFilter.protection(by: effective) != nil { return false }
            if case .filter(let patterns) = effective, !patterns.isEmpty {
                throw BlockError(.denied, "setting LVM's filter: \(LVMFilter.advice)")
            }
        }
        let after = try LVMFilter.placed(in: before)
        try makeDirectories(directoryName(path), mode: 0o755)
        try writeDurably(path, Array(after.utf8), mode: 0o644)
        return true
    }

    /// Takes our block away, and the file, where nothing else is in it.
    ///
    /// - Returns: whether there was one.
    /// - Throws: `.denied` when somebody has changed it, or the system's reason.
    func remove() throws(BlockError) -> Bool {
        let before = try text()
        if ManagedText.block(in: before) == nil { return false }
        let after = try LVMFilter.withoutBlock(before)
        if !after.isEmpty {
            try writeDurably(path, Array(after.utf8), mode: 0o644)
            return true
        }
        if unlink(path) < 0 { throw BlockError(errno: errno, "removing \(path)") }
        try syncDirectory(directoryName(path))
        return true
    }

    /// How it is with LVM.
    ///
    /// - Parameter asks: whether to ask LVM even where our block is in place.
    func finding(asks: Bool) throws(BlockError) -> ProtectionFinding {
        guard isNeeded else { return ProtectionFinding(.lvm, .notNeeded, "there is no LVM here") }
        let isPlaced = LVMFilter.isPlaced(in: try text())
        if isPlaced && !asks {
            return ProtectionFinding(.lvm, .inForce, "\(LVMFilter.path) refuses disks that udev keeps out")
        }
        if let protection = LVMFilter.protection(by: try effective()) {
            return ProtectionFinding(.lvm, .inForce, protection)
        }
        return ProtectionFinding(
            .lvm, .missing,
            isPlaced
                ? "it does not go by the filter in \(LVMFilter.path)"
                : "its commands look for volume groups on every SCSI disk that comes",
            remedy: isPlaced ? "look for global_filter in what lvmconfig --typeconfig current shows" : "diskgate setup")
    }
}
