// `diskgate info`: what a source is.
import ArgumentParser
import Block
import Formats
import LinuxIO
import NBD
import Transports

struct InfoCommand: ParsableCommand {
    static let configuration = CommandConfiguration(commandName: "info", abstract: "Tell what a disk is.")

    @OptionGroup var source: SourceArguments
    @OptionGroup var report: ReportArguments

    @Flag(help: "Tell which exports an NBD server has, whatever export the URI names.")
    var list = false

    private struct ExportReport: Encodable {
        var name: String
        var description: String
    }

    private struct Report: Encodable {
        var name: String
        var format: String
        var size: UInt64
        var minimumBlock: UInt32
        var preferredBlock: UInt32
        var rotational: Bool
        var dirtyBitmaps: [String]
        var identity: [String: String]
        var partitionTable: String?
        var partitions: [PartitionReport]
        var transport: TransportChoice

        init(_ info: DeviceInfo, _ table: PartitionTable?, _ choice: TransportChoice) {
            name = info.name
            format = info.format
            size = info.size
            minimumBlock = info.minimumBlock
            preferredBlock = info.preferredBlock
            rotational = info.isRotational
            dirtyBitmaps = info.dirtyBitmaps
            identity = Dictionary(info.identity.map { ($0.key, $0.value) }, uniquingKeysWith: { first, _ in first })
            partitionTable = table?.scheme.rawValue
            partitions = (table?.partitions ?? []).map {
                PartitionReport(
                    number: $0.number, offset: $0.range.lowerBound, length: $0.range.count64, type: $0.type,
                    typeName: $0.typeName, name: $0.name, problem: $0.problem)
            }
            transport = choice
        }
    }

    private struct PartitionReport: Encodable {
        var number: Int
        var offset: UInt64
        var length: UInt64
        var type: String
        var typeName: String?
        var name: String
        var problem: String?
    }

    /// The exports of a server, one in a line; a tab is between name and description.
    private func printList() throws {
        var reference = try SourceReference(source.source)
        let pins = try source.trust.fingerprints()
        if !pins.isEmpty { reference = try reference.pinned(to: pins) }
        guard case .nbd(let uri) = reference.kind else {
            throw BlockError(
                .invalid, "listing the exports of \(reference): it is no NBD server (nbd://, nbds://, ...)")
        }
        let exports = try ClientConnector(uri).list().map {
            ExportReport(name: $0.name, description: $0.exportDescription)
        }
        if report.json { return try printJSON(exports) }
        for export in exports {
            // A name is shown as it would be written in a URI, so that no byte of it is lost or steers a terminal.
            print(NBDURI.encoded(export.name) + (export.description.isEmpty ? "" : "\t\(export.description)"))
        }
    }

    func validate() throws {
        if list && !source.alternatives.others.isEmpty {
            throw ValidationError("--list asks one server: leave out --or.")
        }
    }

    func run() throws {
        if list { return try printList() }
        let opened = try source.open()
        let device = opened.device
        // A table that cannot be read concerns nobody who wants to know what the disk is.
        let table = try? PartitionTable.read(from: device)
        if report.json {
            try printJSON(Report(device.info, table, opened.choice))
        } else {
            show(device.info, table, opened.choice)
        }
        try opened.finish()
    }

    private func show(_ info: DeviceInfo, _ table: PartitionTable?, _ choice: TransportChoice) {
        print("name:            \(info.name)")
        if choice.chosen != nil { print("transport:       \(choice.summary)") }
        print("format:          \(info.format)")
        print("size:            \(info.size) bytes (\(readable(info.size)))")
        print("minimum block:   \(info.minimumBlock) bytes")
        print("preferred block: \(info.preferredBlock) bytes")
        for bitmap in info.dirtyBitmaps { print("dirty bitmap:    \(bitmap)") }
        for (key, value) in info.identity { print("\(key):".padded(17) + value) }
        guard let table else { return }
        print("partition table: \(table.scheme.rawValue), \(table.identifier)")
        for warning in table.warnings { print("  warning:       \(warning)") }
        for part in table.partitions {
            let what = [part.typeName ?? part.type, part.name, part.problem ?? ""].filter { !$0.isEmpty }
            print(
                "  partition \(part.number):".padded(17)
                    + "\(readable(part.range.count64)) at \(part.range.lowerBound), \(what.joined(separator: ", "))")
        }
    }
}
