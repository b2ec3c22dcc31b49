// A backup run in small: a ledger, a snapshot, the disks copied by qemu-img and by our client.
import Block
import Glibc
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

/// Brings a full copy up to date with what a disk's context calls changed.
///
/// - Returns: the bytes that were copied.
@discardableResult
func copyChanges(_ disk: SnapshotDisk, onto path: String) throws -> UInt64 {
    guard let context = disk.changedContext else { throw CheckFailure("\(disk.id) has no context") }
    let device = try disk.source.open()
    guard let index = device.info.dirtyBitmaps.firstIndex(where: { context.hasSuffix($0) }) else {
        throw CheckFailure("\(disk.id) has no context \(context), only \(device.info.dirtyBitmaps)")
    }
    let target = try Descriptor.open(path, O_WRONLY)
    let buffer = Buffer(count: 65536)
    var (offset, copied): (UInt64, UInt64) = (0, 0)
    while offset < disk.size {
        let (end, extents) = try status(device, .dirtyBitmap(index), of: offset..<disk.size)
        for extent in extents {
            var position = offset
            offset += extent.length
            if extent.value & 1 == 0 { continue }
            copied += extent.length
            while position < offset {
                let count = Int(min(offset - position, 65536))
                try device.read(into: UnsafeMutableRawBufferPointer(rebasing: buffer.bytes[..<count]), at: position)
                let written = pwrite(target.number, buffer.bytes.baseAddress, count, off_t(position))
                try require(written == count, "writing \(path)")
                position += UInt64(count)
            }
        }
        try require(offset == end, "the list ends at \(offset), not \(end)")
    }
    return copied
}

/// Gives back all that a ledger has, as a later process does.
func settleAll(_ process: QEMUProcess, adopted: Bool = false) throws {
    for ledger in try RunLedger.takeAbandoned(stateDirectory: process.directory.file("state")).ledgers {
        let provider = try Hypervisors.open(ledger.run.machine)
        for obligation in ledger.obligations.reversed() {
            try provider.settle(obligation, adopted: adopted)
            try ledger.settle(obligation)
        }
        try ledger.end()
    }
}

/// Whether two files have the same bytes.
func requireEqual(_ one: String, _ other: String, _ what: String) throws {
    try require(try contentOfFile(one) == contentOfFile(other), "\(what): \(one) and \(other) differ")
}
