// QEMU as a hypervisor, through its monitor (QMP): dirty bitmaps are the checkpoints, fleecing makes the snapshot.
import Block
import LinuxIO
import Transports

/// A virtual machine of a QEMU whose monitor can be reached.
final class QEMUProvider: Provider {
    let place: QEMUPlace
    /// Why QEMU could not be reached for giving something back.
    private let silence = Locked<BlockError?>(nil)

    init(_ place: QEMUPlace) { self.place = place }

    var name: String { place.name }

    func identify() throws(BlockError) -> (id: String, name: String) {
        let monitor = try place.connect()
        defer { monitor.close() }
        let (id, label, _) = try identify(monitor)
        return (id, label)
    }

    private func identify(_ monitor: QMPClient) throws(BlockError) -> (id: String, name: String, uuid: String) {
        let uuid = try monitor.execute("query-uuid")["UUID"]?.string ?? ""
        let label = try monitor.execute("query-name")["name"]?.string ?? name
        let hasUUID = uuid.contains { $0 != "0" && $0 != "-" }
        return (hasUUID ? uuid : label, label, uuid)
    }

    func inspect() throws(BlockError) -> VirtualMachine {
        let monitor = try place.connect()
        defer { monitor.close() }
        let (id, label, uuid) = try identify(monitor)
        let status = try monitor.execute("query-status")
        let blocks = try monitor.execute("query-block")
        // There is no powered-off state to be found here: without a QEMU there is no monitor.
        var machine = VirtualMachine(id: id, name: label, isRunning: true)
        machine.disks = QEMUDisk.list(blocks).map(\.described)
        if let agent = place.agent { machine.hasGuestAgent = GuestAgent.answers(at: agent, seconds: 3) }
        machine.documents = [
            ConfigurationDocument(
                name: "qemu.json",
                content: JSONValue.object([
                    "name": .text(machine.name), "uuid": .text(uuid), "status": status["status"] ?? .null,
                    "version": try monitor.execute("query-version"),
                    "memory": (try? monitor.attempt("query-memory-size-summary").get()) ?? .null,
                    "blocks": blocks,
                ]).pretty)
        ]
        if let words = commandLine(monitor) {
            machine.documents.append(ConfigurationDocument(name: "qemu-command-line.txt", content: words))
        }
        return machine
    }

    /// The words that QEMU was started with, one in a line, without those that have secrets in them; nil where they
    /// cannot be seen.
    private func commandLine(_ monitor: QMPClient) -> [UInt8]? {
        guard let process = monitor.peer?.process,
            let bytes = try? readSmallFile("/proc/\(process)/cmdline", limit: 4 << 20)
        else { return nil }
        let words = bytes.split(separator: 0).map { String(decoding: $0, as: UTF8.self) }
        guard let program = words.first, program.contains("qemu") else { return nil }
        let lines = words.map { word in
            let lower = word.lowercased()
            return lower.contains("secret") || lower.contains("password") ? "(left out: it may have a secret)" : word
        }
        return Array((lines.joined(separator: "\n") + "\n").utf8)
    }

    func protect() throws(BlockError) -> [String] {
        let disks = QEMUDisk.list(try place.connect().execute("query-block"))
        return disks.map { disk in
            if let obstacle = disk.obstacle { return "\(disk.id): left out: \(obstacle)" }
            return disk.keepsBitmaps
                ? "\(disk.id): ready; its changes are recorded from the first backup on"
                : "\(disk.id): ready; its changes are recorded from the first backup on, as long as QEMU runs: "
                    + "a \(disk.format) image keeps no bitmaps"
        }
    }

    func unprotect() throws(BlockError) -> [String] {
        let monitor = try place.connect()
        var done: [String] = []
        let disks = try monitor.disks()
        if let disk = disks.first(where: \.isInJob) {
            throw BlockError(
                .denied, "removing bitmaps of \(name): a backup or another job is at work on \(disk.id): end it first")
        }
        for disk in disks {
            for bitmap in disk.bitmaps where OwnName.isOwn(bitmap.name) {
                if bitmap.isBusy {
                    throw BlockError(
                        .denied,
                        "removing the bitmap \(bitmap.name) of \(disk.id): a backup of this machine is going on")
                }
                try monitor.removeBitmap(bitmap.name, of: disk.node)
                done.append("\(disk.id): removed the bitmap \(bitmap.name)")
            }
        }
        return done
    }

    func resetTracking() throws(BlockError) -> [String] { try unprotect() }

    func begin(_ request: SnapshotRequest, ledger: RunLedger) throws(BlockError) -> any SnapshotSession {
        try QEMUSnapshot(place, request, ledger).begin()
    }

    func settle(_ obligation: Obligation, adopted: Bool) throws(BlockError) {
        let release = QEMURelease(place, silence: silence.withLock { $0 })
        defer { silence.withLock { $0 = release.silence } }
        try release.settle(obligation, adopted: adopted)
    }
}

extension QMPClient {
    /// Removes a bitmap, wherever it is on its way.
    func removeBitmap(_ name: String, of node: String) throws(BlockError) {
        try execute("block-dirty-bitmap-remove", ["node": .text(node), "name": .text(name)])
    }

    /// The disks now.
    func disks() throws(BlockError) -> [QEMUDisk] { QEMUDisk.list(try execute("query-block")) }
}
