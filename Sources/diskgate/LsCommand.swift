// `diskgate ls`: the datastores on the LUNs of this proxy, and what lies in them.
import ArgumentParser
import Backup
import Block
import Formats
import Transports

struct LsCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "ls", abstract: "List datastores on a SAN, and what is in them.",
        discussion: """
            san: lists the datastores, san:DATASTORE/DIRECTORY a directory. Columns: kind, size, bytes in blocks of \
            its own, who has it locked, when it was changed (UTC), name.
            """)

    @Argument(help: "san:, san:DATASTORE or san:DATASTORE/DIRECTORY, with ?lun=NODE&lun=NODE for certain LUNs only.")
    var source: String

    @OptionGroup var report: ReportArguments

    private struct Datastore: Encodable {
        var label: String?
        var uuid: String?
        var version: String?
        var capacity: UInt64?
        var replica: String?
        var copy: String?
        var nodes: [String]
        var problem: String?
    }

    private struct Entry: Encodable {
        var name: String
        var kind: String
        var size: UInt64
        var allocatedBytes: UInt64
        var lock: String
        var modified: UInt32
        var rawDevice: String?
        var problem: String?
    }

    func run() throws {
        let reference = try SourceReference(source)
        guard case .san(.file(let datastore, let path)) = reference.kind else {
            throw BlockError(
                .invalid, "listing \(source): only datastores have something to list (san:, san:DATASTORE/)")
        }
        let datastores = try reference.datastores()
        if datastore.isEmpty { return try list(datastores) }
        let entries = try datastores.volume(named: datastore).list(path).map { entry in
            Entry(
                name: entry.name, kind: "\(entry.kind)", size: entry.size, allocatedBytes: entry.allocatedBytes,
                lock: "\(entry.lock.mode)", modified: entry.modifiedSeconds, rawDevice: entry.rawDevice?.text,
                problem: entry.problem?.message)
        }
        if report.json { return try printJSON(entries) }
        for entry in entries {
            let what = entry.problem ?? entry.rawDevice.map { "LUN \($0)" }
            print(
                "\(entry.kind.padded(14)) \(readable(entry.size).paddedLeft(10)) "
                    + "\(readable(entry.allocatedBytes).paddedLeft(10)) \(entry.lock.padded(12)) "
                    + "\(UTCTime(seconds: Double(entry.modified)))  \(entry.name)\(what.map { "  (\($0))" } ?? "")")
        }
    }

    private func list(_ datastores: Datastores) throws {
        let (found, problems) = try datastores.all()
        let list = found.map { item in
            Datastore(
                label: item.volume?.label, uuid: item.volume.map { "\($0.uuid)" }, version: item.volume?.version,
                capacity: item.volume?.capacity, replica: item.volume?.replica, copy: item.copy,
                nodes: item.nodes, problem: item.problem?.message)
        }
        if report.json { try printJSON(list) }
        for item in list where !report.json {
            let size = item.capacity.map { readable($0) } ?? ""
            let rest = [item.version.map { "VMFS \($0)" }, item.uuid, item.replica, item.copy, item.problem]
                .compactMap(\.self)
            print("\((item.label ?? "?").padded(24)) \(size.paddedLeft(10))  \(rest.joined(separator: "  "))")
            print("    on \(item.nodes.joined(separator: ", "))")
        }
        for problem in problems { writeError("diskgate: \(problem.message)") }
        if !problems.isEmpty || list.contains(where: { $0.problem != nil }) { throw ExitCode(1) }
    }
}
