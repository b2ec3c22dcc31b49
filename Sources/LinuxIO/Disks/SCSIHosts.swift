// The kernel's SCSI side of attaching and detaching: looking for new units, and taking a disk off.
public import Block
import Glibc

/// SCSI host adapters of this machine, and the disks on them.
public struct SCSIHosts: Sendable {
    private let sysfs: String

    /// - Parameter sysfs: where sysfs is.
    public init(sysfs: String = "/sys") { self.sysfs = sysfs }

    /// Numbers of the host adapters.
    public func numbers() -> [UInt32] {
        ((try? namesInDirectory("\(sysfs)/class/scsi_host")) ?? [])
            .compactMap { $0.hasPrefix("host") ? UInt32($0.dropFirst(4)) : nil }.sorted()
    }

    /// Looks for units that have come, on every adapter. Those that are known are not touched.
    ///
    /// - Throws: the system's reason, when not one adapter can be told to look.
    public func scan() throws(BlockError) {
        var failure: BlockError?
        var isAsked = false
        for host in numbers() {
            do throws(BlockError) {
                try Self.write("- - -", to: "\(sysfs)/class/scsi_host/host\(host)/scan")
                isAsked = true
            } catch { failure = error }
        }
        if let failure, !isAsked { throw failure.during("looking for new disks") }
    }

    /// Takes a disk off the kernel, which flushes it first. Whoever has it open gets errors from then on.
    ///
    /// - Throws: `.invalid` when another disk has its name now, or the system's reason.
    public func remove(_ disk: AttachedDisk) throws(BlockError) {
        let doing = "taking \(disk.name) off the kernel"
        guard let now = DiskInventory(sysfs: sysfs).disk(named: disk.name) else { return }
        guard now.address == disk.address, now.diskSequence == disk.diskSequence, now.names == disk.names else {
            throw BlockError(.invalid, "\(doing): another disk has this name now (\(now.wwid ?? "without a name"))")
        }
        do throws(BlockError) {
            try Self.write("1", to: "\(sysfs)/block/\(disk.name)/device/delete")
        } catch {
            // It may have gone meanwhile.
            if error.kind == .notFound { return }
            throw error.during(doing)
        }
    }

    private static func write(_ text: String, to path: String) throws(BlockError) {
        let file = try Descriptor.open(path, O_WRONLY)
        let bytes = Array(text.utf8)
        let written = bytes.withUnsafeBytes { Glibc.write(file.number, $0.baseAddress, $0.count) }
        if written != bytes.count { throw BlockError(errno: errno, "writing to \(path)") }
    }
}
