// Which disks of this machine diskgate has added, or holds as hot-added: they belong to guests.
import Block
import LinuxIO

/// Disks that are held by obligations of diskgate on this machine.
struct HotAddLeases {
    private let serials: Set<String>
    /// Nodes with the kernel's counts of them.
    private let nodes: Set<[String]>

    /// - Throws: `BlockError` when the ledgers cannot be listed.
    init(stateDirectory: String = defaultStateDirectory()) throws(BlockError) {
        var serials: Set<String> = []
        var nodes: Set<[String]> = []
        for run in try RunLedger.list(stateDirectory: stateDirectory).runs {
            for obligation in run.obligations {
                if obligation.kind == HotAddTask.kind, let serial = obligation.details["serial"], !serial.isEmpty {
                    serials.insert(serial)
                }
                if obligation.kind == HotAddedDisk.kind, let node = obligation.details["node"] {
                    nodes.insert([node, obligation.details["diskseq"] ?? ""])
                }
            }
        }
        (self.serials, self.nodes) = (serials, nodes)
    }

    /// Whether a disk is one of them.
    func holds(_ disk: AttachedDisk) -> Bool {
        disk.serial.map(serials.contains) == true
            || nodes.contains([disk.node, disk.diskSequence.map(String.init) ?? ""])
    }
}
