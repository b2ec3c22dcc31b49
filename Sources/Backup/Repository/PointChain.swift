// Which files have a disk's content at a point: its own, that of its base, and so on to a full one.
import Block
import Glibc
import LinuxIO

/// One point's share of a disk.
struct ChainLink: Sendable {
    let manifest: PointManifest
    let disk: PointManifest.Disk
    /// Whether the point is being removed: what it holds may have gone to the point above already.
    let isDoomed: Bool
    /// The file with the data; nil when it has become that of the point above.
    let data: String?
    /// The sidecar.
    let hashes: String
}

extension Repository {
    /// The ending of a manifest's name while its point is being removed.
    static let doomedEnding = ".doomed"

    /// Points that somebody has begun to remove and not finished with, the oldest first.
    ///
    /// - Throws: `BlockError` when a manifest cannot be read.
    func doomed(of machine: RepositoryMachine) throws(BlockError) -> [RestorePoint] {
        var points: [RestorePoint] = []
        let directory = layout(machine).points
        for name in try namesIfThere(directory) where name.hasSuffix(".json\(Self.doomedEnding)") {
            points.append(try point(inManifest: "\(directory)/\(name)", of: machine))
        }
        return points.sorted { $0.sequence < $1.sequence }
    }

    /// The files that have a disk's content at a point, the point's own first.
    ///
    /// - Throws: `.notFound` when the point has no such disk, or naming the point or the file that is missing.
    func chain(of disk: String, at point: RestorePoint) throws(BlockError) -> [ChainLink] {
        guard let own = point.manifest.disk(disk) else {
            let known = point.manifest.disks.map(\.id).joined(separator: ", ")
            throw BlockError(.notFound, "opening disk \(disk) of \(point.description): it has only \(known)")
        }
        let layout = layout(point.machine)
        // Manifests of other points may be damaged without concern for this one: each is read only when it is needed.
        let names = try namesIfThere(layout.points).filter {
            $0.hasSuffix(".json") || $0.hasSuffix(".json\(Self.doomedEnding)")
        }
        var links: [ChainLink] = []
        var (manifest, entry, isDoomed) = (point.manifest, own, false)
        while true {
            let file = "\(layout.disk(entry.directory))/\(entry.file)"
            let isThere = access(file, R_OK) == 0
            if !isThere && !isDoomed {
                throw BlockError(
                    errno: errno,
                    "opening disk \(disk) of \(point.description): \(file), with the data of point "
                        + "\(manifest.sequence), cannot be opened")
            }
            links.append(
                ChainLink(
                    manifest: manifest, disk: entry, isDoomed: isDoomed, data: isThere ? file : nil,
                    hashes: layout.hashes(entry.directory, entry.hashes.file)))
            guard let base = entry.base else { return links }
            let place = "opening disk \(disk) of \(point.description): point \(base), which has a part of its data,"
            guard let name = names.first(where: { Backup.sequence(ofName: $0) == base }) else {
                throw BlockError(.notFound, "\(place) is missing: there is no manifest of it in \(layout.points)")
            }
            isDoomed = name.hasSuffix(Self.doomedEnding)
            do throws(BlockError) { manifest = try PointManifest.read("\(layout.points)/\(name)") } catch {
                throw error.during("\(place) cannot be used")
            }
            guard let next = manifest.disk(disk) else { throw BlockError(.corrupt, "\(place) does not have the disk") }
            entry = next
        }
    }
}
