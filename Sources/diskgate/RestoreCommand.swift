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
            each becomes DISK.raw, or --target for each of them. A new file has its name only when it is whole. Every \
            chunk is compared with its hash before it is written.
            """)

    @OptionGroup var arguments: PointArguments
    @OptionGroup var site: SiteArguments
    @OptionGroup var report: ReportArguments

    @Argument(help: "A file, a directory, a block device, a hotadd: disk or an NBD URI; none with --target.")
    var destination: String?

    @Option(help: "Restore this disk. May be repeated; default: all, or those with a --target.")
    var disk: [String] = []

    @Option(
        help: ArgumentHelp(
            "Restore a disk to a file, a block device, a hotadd: disk or an NBD URI of its own. May be repeated.",
            valueName: "id=destination"))
    var target: [String] = []

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

    func validate() throws {
        if destination == nil && target.isEmpty {
            throw ValidationError("Give DESTINATION, or --target ID=DESTINATION.")
        }
        if target.isEmpty { return }
        if destination != nil || !disk.isEmpty {
            throw ValidationError("With --target, leave out DESTINATION and --disk: it names each disk.")
        }
        var ids: Set<String> = []
        for (id, place) in try targets() {
            if place.hasSuffix("/") { throw ValidationError("--target \(id)=\(place): give a file, not a directory.") }
            if !ids.insert(id).inserted { throw ValidationError("--target: there are two for the disk \(id).") }
        }
    }

    /// The disks with destinations of their own.
    private func targets() throws -> [(id: String, place: String)] {
        try target.map { text in
            let sides = text.split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false).map(String.init)
            guard sides.count == 2, !sides[0].isEmpty, !sides[1].isEmpty else {
                throw ValidationError("--target \(text): give ID=DESTINATION.")
            }
            return (sides[0], sides[1])
        }
    }

    func run() throws {
        try site.apply()
        let cancellation = Cancellation()
        try cancelOnSignal(cancellation)
        let (repository, point) = try arguments.find()
        let lock = try repository.lockPoint(point)
        defer { withExtendedLifetime(lock) {} }
        let known = point.manifest.disks.map(\.id)
        let targets = try targets()
        let named = target.isEmpty ? disk : targets.map(\.id)
        if let other = named.first(where: { !known.contains($0) }) {
            throw BlockError(
                .notFound,
                "restoring \(point.description): it has no disk \(other), only \(known.joined(separator: ", "))")
        }
        let chosen = named.isEmpty ? known : named
        let places: [String]
        if let destination {
            try repository.requireOutside(destination)
            places = try chosen.map { try place(of: $0, in: destination, isOnly: chosen.count == 1) }
        } else {
            places = targets.map(\.place)
        }
        // All of them before the first byte is written to one.
        let wanted = try zip(chosen, places).map { id, place in
            guard let disk = point.manifest.disk(id) else { throw BlockError(.notFound, "restoring disk \(id)") }
            return RestoreDestination.Wanted(disk: id, place: place, size: disk.size)
        }
        let destinations = try RestoreDestination.open(
            wanted, isDifferential: differential, mayReplace: replace, outside: repository)
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

    /// Where a disk goes.
    private func place(of id: String, in destination: String, isOnly: Bool) throws -> String {
        guard case .path = try SourceReference(destination).kind else {
            if isOnly { return destination }
            throw BlockError(
                .invalid,
                "restoring several disks to \(destination): give a directory, --target ID=DESTINATION for each of "
                    + "them, or one --disk at a time")
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
