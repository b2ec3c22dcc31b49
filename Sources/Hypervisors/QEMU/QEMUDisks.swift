// The disks of a QEMU, as its monitor describes them, with the dirty bitmaps on them.
import Block

/// A dirty bitmap on a block node (qapi/block-core.json, BlockDirtyInfo).
struct QEMUBitmap: Sendable {
    let name: String
    let isRecording: Bool
    let isBusy: Bool
    let isPersistent: Bool
    let isInconsistent: Bool

    init?(_ value: JSONValue) {
        guard let name = value["name"]?.string, !name.isEmpty else { return nil }
        self.name = name
        isRecording = value["recording"]?.truth ?? false
        isBusy = value["busy"]?.truth ?? false
        isPersistent = value["persistent"]?.truth ?? false
        isInconsistent = value["inconsistent"]?.truth ?? false
    }

    /// Why it does not tell what has changed; nil when it does.
    var problem: String? {
        if isInconsistent { return "is not consistent: the machine was not shut down cleanly" }
        if isBusy { return "is in use by another operation" }
        if !isRecording { return "was switched off for a time" }
        return nil
    }
}

/// A guest's disk (qapi/block-core.json, BlockInfo).
struct QEMUDisk: Sendable {
    /// Stable from run to run.
    let id: String
    /// The node at the top of its block graph; empty where there is no medium.
    let node: String
    let size: UInt64
    let path: String
    let format: String
    let bitmaps: [QEMUBitmap]
    /// Why it cannot be backed up.
    let obstacle: String?
    /// Whether its image keeps bitmaps when QEMU ends.
    let keepsBitmaps: Bool

    /// Filters that QEMU's jobs put on top of a disk while they work.
    private static let jobFilters: Set<String> = [
        "copy-before-write", "backup-top", "mirror_top", "commit_top",
    ]

    /// Whether a job of QEMU is at work on it.
    var isInJob: Bool { Self.jobFilters.contains(format) }

    private init(_ value: JSONValue, id: String) {
        self.id = id
        let inserted = value["inserted"]
        let image = inserted?["image"]
        node = inserted?["node-name"]?.string ?? ""
        size = UInt64(clamping: image?["virtual-size"]?.whole ?? 0)
        path = inserted?["file"]?.string ?? ""
        format = inserted?["drv"]?.string ?? ""
        bitmaps = (inserted?["dirty-bitmaps"]?.elements ?? []).compactMap(QEMUBitmap.init)
        let compatible = image?["format-specific"]?["data"]?["compat"]?.string
        keepsBitmaps = format == "qcow2" && compatible != "0.10"
        obstacle =
            if inserted == nil {
                "there is no medium in it"
            } else if value["removable"]?.truth ?? false {
                "it is a removable medium"
            } else if inserted?["ro"]?.truth ?? true {
                "the guest cannot write to it"
            } else if Self.jobFilters.contains(format) {
                "a backup or another job of QEMU is at work on it (\(format))"
            } else if node.isEmpty || size == 0 {
                "QEMU does not tell its node or its size"
            } else {
                nil
            }
    }

    /// Reads what query-block returns.
    static func list(_ answer: JSONValue) -> [QEMUDisk] {
        var taken: Set<String> = []
        var numbers: [String: Int] = [:]
        return answer.elements.compactMap { value in
            guard let wanted = name(of: value) else { return nil }
            var id = wanted
            while !taken.insert(id).inserted {
                let number = numbers[wanted, default: 2]
                numbers[wanted] = number + 1
                id = "\(wanted)-\(number)"
            }
            return QEMUDisk(value, id: id)
        }
    }

    /// The device's id where it has one, the drive's, the node's; or else its place among the machine's devices.
    /// Letters, digits, points, dashes and underscores only. nil for what is no device at all.
    private static func name(of value: JSONValue) -> String? {
        let device = value["device"]?.string ?? ""
        let node = value["inserted"]?["node-name"]?.string ?? ""
        var place = value["qdev"]?.string ?? ""
        if place.hasPrefix("/machine/peripheral/") {
            place = String(place.dropFirst("/machine/peripheral/".count).prefix { $0 != "/" })
        }
        if place.contains("/") && !device.isEmpty { place = device }
        if place.contains("/") && !node.isEmpty && !node.hasPrefix("#") { place = node }
        let name = [place, device, node].first { !$0.isEmpty } ?? ""
        if name.isEmpty { return nil }
        let plain = name.unicodeScalars.map { scalar in
            scalar.isASCII && (scalar.properties.isAlphabetic || "0123456789._-".unicodeScalars.contains(scalar))
                ? Character(scalar) : "-"
        }
        // No name of a file or directory may begin with a point, and none of an option with a dash.
        let trimmed = String(String(plain).drop { $0 == "-" || $0 == "." })
        return trimmed.isEmpty ? "disk" : trimmed
    }

    /// The disk in the provider's words.
    var described: VirtualDisk {
        var disk = VirtualDisk(id: id, size: size, name: path, format: format)
        disk.obstacle = obstacle
        disk.checkpoints = bitmaps.filter { OwnName.isOwn($0.name) && $0.problem == nil }.map(\.name)
        return disk
    }

    /// Looks for the checkpoint since which changes are wanted.
    ///
    /// - Returns: why it cannot be used; nil when it can.
    func problem(since checkpoint: String) -> String? {
        guard OwnName.isOwn(checkpoint) else { return "the bitmap \(checkpoint) is not one of diskgate's" }
        guard let bitmap = bitmaps.first(where: { $0.name == checkpoint }) else {
            let others = bitmaps.filter { OwnName.isOwn($0.name) }.map(\.name).joined(separator: ", ")
            return "its bitmap \(checkpoint) is not there any more"
                + (others.isEmpty ? "" : " (there are: \(others))")
                + (keepsBitmaps ? "" : "; a \(format) image keeps none when QEMU ends")
        }
        return bitmap.problem.map { "its bitmap \(checkpoint) \($0)" }
    }
}
