// libvirt as a hypervisor: its checkpoints, and its backups in pull mode (virDomainBackupBegin).
import Block
import LinuxIO
import Transports

/// A domain of libvirt.
final class LibvirtProvider: Provider {
    let place: LibvirtPlace
    /// What was found last, for the snapshot that is made upon it. Anything that the hypervisor says meanwhile it would
    /// also say right after a second look: what matters is what it answers when the snapshot is made.
    private let found = Locked<LibvirtDomain?>(nil)

    init(_ place: LibvirtPlace) { self.place = place }

    var name: String { place.name }

    func identify() throws(BlockError) -> (id: String, name: String) {
        func answer(_ words: [String]) throws(BlockError) -> String {
            try String(place.virsh.run(words).drop { $0.isWhitespace }.prefix { $0 != "\n" })
        }
        let uuid = try answer(["domuuid", place.domain])
        return (uuid, try answer(["domname", uuid]))
    }

    func inspect() throws(BlockError) -> VirtualMachine {
        let domain = try LibvirtDomain(place)
        found.withLock { $0 = domain }
        var machine = VirtualMachine(id: domain.uuid, name: domain.name, isRunning: domain.isRunning)
        machine.hasGuestAgent = domain.hasAgent
        machine.disks = domain.disks.map(\.described)
        let definition = try place.virsh.run(["dumpxml", place.domain, "--inactive"])
        machine.documents = [ConfigurationDocument(name: "domain.xml", content: Array(definition.utf8))]
        if place.isLocal, let nvram = domain.nvram, let bytes = try? readSmallFile(nvram, limit: 64 << 20) {
            machine.documents.append(ConfigurationDocument(name: "nvram.fd", content: bytes))
        }
        return machine
    }

    func protect() throws(BlockError) -> [String] {
        let domain = try LibvirtDomain(place)
        return domain.disks.map { disk in
            if let obstacle = disk.obstacle { return "\(disk.target): left out: \(obstacle)" }
            if let obstacle = disk.described.trackingObstacle {
                return "\(disk.target): full backups only: \(obstacle)"
            }
            return "\(disk.target): ready; its changes are recorded from the first backup of the running machine on"
        }
    }

    func unprotect() throws(BlockError) -> [String] {
        if let backup = try place.runningBackup() {
            throw BlockError(
                .denied, "removing checkpoints of \(name): a backup of it goes on (\(backup.server)): end it first")
        }
        var done: [String] = []
        // Newest first: no checkpoint is removed from below another.
        for checkpoint in try place.checkpointNames().reversed() {
            try place.deleteCheckpoint(checkpoint)
            done.append("removed the checkpoint \(checkpoint)")
        }
        return done
    }

    func resetTracking() throws(BlockError) -> [String] { try unprotect() }

    func begin(_ request: SnapshotRequest, ledger: RunLedger) throws(BlockError) -> any SnapshotSession {
        let known = found.withLock { found in
            defer { found = nil }
            return found
        }
        let domain: LibvirtDomain
        if let known { domain = known } else { domain = try LibvirtDomain(place) }
        return domain.isRunning
            ? try LibvirtSnapshot(place, domain, request, ledger).begin()
            : try LibvirtImages(place, domain, request)
    }

    func settle(_ obligation: Obligation, adopted: Bool) throws(BlockError) {
        try LibvirtRelease(place).settle(obligation, adopted: adopted)
    }
}
