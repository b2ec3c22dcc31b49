// `diskgate restore`: disks of a restore point to files, block devices or NBD exports.
import ArgumentParser
import Backup
import Block
import Glibc
import LinuxIO
import Transports

struct RestoreCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "restore", abstract: "Write the disks of a restore point to where they are needed.",
        discussion: """
            DESTINATION is a file, a block device or the URI of an NBD export; for several disks, a directory, where \
            each becomes DISK.raw. A new file has its name only when it is whole. Every chunk is compared with its \
            hash before it is written.
            """)

    @OptionGroup var arguments: PointArguments
    @OptionGroup var site: SiteArguments
    @OptionGroup var report: ReportArguments

    @Argument(help: "A file, a directory, a block device or an NBD URI.")
    var destination: String

    @Option(help: "Restore this disk. May be repeated; default: all.")
    var disk: [String] = []

    @Flag(help: "Read the destination first and write only what differs.")
    var differential = false

    @Flag(help: "Write damaged chunks as they are, unreadable ones as zeros (exit status 3).")
    var force = false

    @Flag(help: "Read the destination again at the end and compare.")
    var verify = false

    @Flag(help: "Replace files that are there, and overwrite block devices.")
    var replace = false

    @Option(help: ArgumentHelp("Write the machine's configuration documents here.", valueName: "directory"))
    var documents: String?

    private struct Report: Encodable {
        var disk: String
        var destination: String
        var size: UInt64
        var bytesRead: UInt64
        var bytesWritten: UInt64
        var bytesZeroed: UInt64
        var bytesUnchanged: UInt64
        var bytesVerified: UInt64
        var damagedChunks: [UInt64]
        var seconds: Double
    }

    func run() throws {
        try site.apply()
        let cancellation = Cancellation()
        try cancelOnSignal(cancellation)
        let (repository, point) = try arguments.find()
        let lock = try repository.lockPoint(point)
        defer { withExtendedLifetime(lock) {} }
        let known = point.manifest.disks.map(\.id)
        if let other = disk.first(where: { !known.contains($0) }) {
            throw BlockError(
                .notFound,
                "restoring \(point.description): it has no disk \(other), only \(known.joined(separator: ", "))")
        }
        let chosen = disk.isEmpty ? known : disk
        try repository.requireOutside(destination)
        let destinations = try open(chosen, of: point, in: repository)
        var reports: [Report] = []
        for (index, id) in chosen.enumerated() {
            do {
                reports.append(try restore(id, of: point, in: repository, to: destinations[index], cancellation))
            } catch {
                for other in destinations[(index + 1)...] { other.abandon(isUntouched: true) }
                throw error
            }
        }
        if let documents {
            let names = try repository.restoreDocuments(point, to: documents)
            if !report.json { for name in names { print("\(documents)/\(name)") } }
        }
        if report.json { try printJSON(reports) }
        if reports.contains(where: { !$0.damagedChunks.isEmpty }) { throw ExitCode(3) }
    }

    /// Opens all destinations before the first byte is written to one.
    private func open(_ disks: [String], of point: RestorePoint, in repository: Repository) throws
        -> [RestoreDestination]
    {
        var destinations: [RestoreDestination] = []
        do {
            for id in disks {
                guard let disk = point.manifest.disk(id) else { throw BlockError(.notFound, "restoring disk \(id)") }
                let place = try place(of: id, isOnly: disks.count == 1)
                if destinations.contains(where: { $0.name == place }) {
                    throw BlockError(.invalid, "restoring disk \(id): \(place) is another disk's already")
                }
                destinations.append(
                    try RestoreDestination.open(
                        place, size: disk.size, isDifferential: differential, mayReplace: replace, outside: repository))
            }
        } catch {
            for destination in destinations { destination.abandon(isUntouched: true) }
            throw error
        }
        return destinations
    }

    /// Where a disk goes.
    private func place(of id: String, isOnly: Bool) throws -> String {
        guard case .path = try SourceReference(destination).kind else {
            if isOnly { return destination }
            throw BlockError(
                .invalid, "restoring several disks to \(destination): give a directory, or one --disk at a time")
        }
        var status = stat()
        let isDirectory = stat(destination, &status) == 0 && status.st_mode & S_IFMT == S_IFDIR
        if isOnly && !isDirectory && !destination.hasSuffix("/") { return destination }
        if !isDirectory {
            try makeDirectories(destination, mode: 0o755)
        }
        return "\(destination)/\(id.unicodeScalars.map { $0 == "/" ? "_" : String($0) }.joined()).raw"
    }

    private func restore(
        _ id: String, of point: RestorePoint, in repository: Repository, to destination: RestoreDestination,
        _ cancellation: Cancellation
    ) throws -> Report {
        let place = destination.name
        let start = monotonicSeconds()
        var options = RestoreOptions()
        options.isDifferential = differential
        options.isForced = force
        options.verifies = verify
        let line = PercentLine("restoring \(id)", isShown: !report.json)
        let result: RestoreResult
        do {
            result = try repository.restore(
                point, disk: id, to: destination.device, isBlank: destination.isBlank, options,
                cancellation: cancellation
            ) { done, total in line.show(done, of: total) }
            line.end()
            try destination.finish()
        } catch {
            line.end()
            destination.abandon()
            throw error
        }
        for offset in result.damaged {
            writeError(
                "diskgate: the chunk at offset \(offset) of disk \(id) is damaged: it was restored as it is, "
                    + "or as zeros where it cannot be read")
        }
        let seconds = monotonicSeconds() - start
        if !report.json {
            let written = result.bytesWritten + result.bytesZeroed
            print(
                "\(place): \(readable(result.size)), \(readable(written)) written"
                    + (differential ? ", \(readable(result.bytesUnchanged)) were right already" : ""))
        }
        return Report(
            disk: id, destination: place, size: result.size, bytesRead: result.bytesRead,
            bytesWritten: result.bytesWritten, bytesZeroed: result.bytesZeroed, bytesUnchanged: result.bytesUnchanged,
            bytesVerified: result.bytesVerified, damagedChunks: result.damaged, seconds: seconds)
    }
}
