// `diskgate map`: what a meta context says of a disk, run by run.
import ArgumentParser
import Block
import NBD

struct MapCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "map",
        abstract: "Tell which ranges of a disk are data, holes or changed.",
        discussion: """
            Contexts are named as in NBD: base:allocation (default), qemu:allocation-depth, qemu:dirty-bitmap:NAME. \
            The order and content of the columns is that of nbdinfo --map.
            """)

    @OptionGroup var source: SourceArguments
    @OptionGroup var report: ReportArguments

    @Option(help: "The meta context to ask.")
    var context = "base:allocation"

    @Flag(help: "Print sums instead of runs.")
    var totals = false

    private struct Run: Encodable {
        var offset: UInt64
        var length: UInt64
        var type: UInt32
        var description: String
    }

    func run() throws {
        let opened = try source.open()
        let device = opened.device
        let contexts = MetaContext.contexts(of: device.info)
        guard let chosen = contexts.first(where: { $0.name == context }) else {
            throw BlockError(
                .notFound,
                "mapping \(device.info.name): it has no context \(context), only "
                    + contexts.map(\.name).joined(separator: ", "))
        }
        var printer = Printer(context: chosen.context, asJSON: report.json, totals: totals)
        var list = StatusList(capacity: 8192)
        var position: UInt64 = 0
        while position < device.info.size {
            list.removeAll()
            let end = try device.status(chosen.context, of: position..<device.info.size, into: &list)
            guard end > position else {
                throw BlockError(.inputOutput, "mapping \(device.info.name) at \(position): no answer")
            }
            for extent in list.extents { printer.add(extent) }
            position = end
        }
        try printer.finish()
        try opened.finish()
    }

    /// Joins runs over the limits of single answers and prints them.
    private struct Printer {
        let context: StatusContext
        let asJSON: Bool
        let totals: Bool
        var current: StatusExtent?
        var start: UInt64 = 0
        var runs: [Run] = []
        var sums: [UInt32: UInt64] = [:]

        init(context: StatusContext, asJSON: Bool, totals: Bool) {
            self.context = context
            self.asJSON = asJSON
            self.totals = totals
        }

        mutating func add(_ extent: StatusExtent) {
            sums[extent.value, default: 0] += extent.length
            if let last = current, last.value == extent.value {
                current?.length += extent.length
                return
            }
            put()
            current = extent
        }

        private mutating func put() {
            guard let extent = current else { return }
            let run = Run(
                offset: start, length: extent.length, type: extent.value, description: describe(extent.value))
            start += extent.length
            if totals { return }
            if asJSON { runs.append(run) } else { line(run) }
        }

        private func line(_ run: Run) {
            print(
                String(run.offset).paddedLeft(12), String(run.length).paddedLeft(12), String(run.type).paddedLeft(6),
                "",
                run.description)
        }

        mutating func finish() throws {
            put()
            if totals {
                runs = sums.sorted { $0.key < $1.key }.map {
                    Run(offset: 0, length: $0.value, type: $0.key, description: describe($0.key))
                }
                if !asJSON {
                    for run in runs {
                        print(String(run.length).paddedLeft(12), String(run.type).paddedLeft(6), "", run.description)
                    }
                }
            }
            if asJSON { try printJSON(runs) }
        }

        private func describe(_ value: UInt32) -> String {
            switch (context, value) {
            case (.allocation, 0): "data"
            case (.allocation, 1): "hole"
            case (.allocation, 2): "zero"
            case (.allocation, _): "hole,zero"
            case (.depth, 0): "unallocated"
            case (.depth, 1): "local"
            case (.depth, _): "backing depth \(value)"
            case (.dirtyBitmap, 0): "clean"
            case (.dirtyBitmap, _): "dirty"
            }
        }
    }
}
