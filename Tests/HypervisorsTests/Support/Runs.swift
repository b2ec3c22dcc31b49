// A backup run in small: a ledger, a snapshot, the disks copied by qemu-img and by our client.
import Block
import LinuxIO
import NBD
import Support
import Transports

@testable import Hypervisors

/// The state directory of a test's runs.
func begin(_ process: QEMUProcess, _ run: String? = nil) throws -> RunLedger {
    try RunLedger.begin(
        stateDirectory: process.directory.file("state"), machine: process.uri, repository: nil, runID: run)
}

/// A request for some disks.
func request(_ disks: [String], since: String? = nil, checkpoint: String) -> SnapshotRequest {
    var request = SnapshotRequest(
        disks: disks.map { SnapshotRequest.Disk(id: $0, since: since) }, checkpoint: checkpoint)
    request.quiescing = .never
    request.scratchReserve = 0
    return request
}

/// A disk of a snapshot as a whole, as a raw file.
func copyWhole(_ disk: SnapshotDisk, to path: String) throws {
    _ = try Tool.output(
        "qemu-img", ["convert", "-f", "raw", "-O", "raw", disk.source.description, path])
}

/// Ranges that a disk's context calls changed.
func changedRanges(_ disk: SnapshotDisk) throws -> [Range<UInt64>] {
    let context = try #require(disk.changedContext)
    let device = try disk.source.open()
    let status = StatusContext(context)
    var ranges: [Range<UInt64>] = []
    var offset: UInt64 = 0
    while offset < disk.size {
        var list = StatusList(capacity: 64)
        let end = try device.status(status, of: offset..<disk.size, into: &list)
        for extent in list.extents {
            if extent.flags & 1 != 0 { ranges.append(offset..<offset + extent.length) }
            offset += extent.length
        }
        try require(offset == end, "the list ends at \(offset), not \(end)")
    }
    return ranges
}
