// Fuzzes what QEMU's monitor and the guest agent say: JSON of any shape, and the disks that it describes.
import Block
import FuzzSupport

@testable import Hypervisors

@main
struct MonitorFuzz {
    static func main() {
        fuzz { input in
            guard let value = JSONValue(parsing: input) else { return }
            let text = value.encoded
            require(!text.isEmpty, "what was read cannot be written")
            require(JSONValue(parsing: text) != nil, "what was written cannot be read")
            let disks = QEMUDisk.list(value["return"] ?? value)
            require(Set(disks.map(\.id)).count == disks.count, "two disks have one id")
            for disk in disks {
                let id = disk.id
                require(
                    !id.isEmpty && !id.contains("/") && !id.hasPrefix(".") && !id.hasPrefix("-"),
                    "\(id) is no name of a file")
                require(disk.described.checkpoints.count <= disk.bitmaps.count, "more checkpoints than bitmaps")
                _ = disk.problem(since: "diskgate-1")
            }
            _ = QEMUBitmap(value)?.problem
        }
    }
}
