// `diskgate disks`: the disks that this proxy sees, by names that stay the same.
import ArgumentParser
import Block
import Formats
import LinuxIO
import Transports

struct DisksCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "disks", abstract: "List the disks that this proxy sees.",
        discussion: """
            What picks a disk out for hotadd: and san: sources is its worldwide name (wwn=), its serial number \
            (serial=) or its SCSI address (hctl=), never its node: sdb may be another disk tomorrow.
            """)

    @OptionGroup var report: ReportArguments

    @Flag(help: "Do not read the disks to tell what lies on them.")
    var noContent = false

    func run() throws {
        let disks = try DiskInventory().disks()
        let users = NodeUsers()
        let protections = protections()
        let reports = disks.map {
            DiskReport($0, among: disks, users: users, protections: protections, readsContent: !noContent)
        }
        if report.json { return try printJSON(reports) }
        for disk in reports { show(disk) }
    }

    /// What keeps this machine's programs from disks, as far as that can be read.
    private func protections() -> DiskProtections? {
        do throws(BlockError) { return try DiskProtections() } catch {
            writeError("diskgate: warning: \(error.message)")
            return nil
        }
    }

    private func show(_ disk: DiskReport) {
        let kind = [disk.vendor, disk.model].compactMap(\.self).joined(separator: " ")
        let readOnly = disk.isReadOnly ? ", read-only" : ""
        let blocks = "blocks of \(disk.logicalBlock)"
        let state = disk.state.map { $0 == "running" ? "" : ", \($0)" } ?? ""
        print("\(disk.node)  \(readable(disk.size)), \(blocks)\(readOnly)\(state)\(kind.isEmpty ? "" : "  \(kind)")")
        let place = disk.controller.map { "\($0.driver)\($0.address.map { " at \($0)" } ?? "")" }
        let content = disk.content.map { found in
            found.map { $0.type + ($0.detail.map { " (\($0))" } ?? "") }.joined(separator: ", ")
        }
        let lines: [(String, String?)] = [
            ("hctl", disk.hctl), ("controller", place), ("wwn", disk.wwid), ("serial", disk.serial),
            ("multipath", disk.multipath), ("protection", disk.protection?.rawValue),
            ("content", content?.isEmpty == true ? nil : content),
            ("problem", disk.problem),
            ("held by", disk.holders.isEmpty ? nil : disk.holders.joined(separator: ", ")),
            ("mounted at", disk.uses.isEmpty ? nil : disk.uses.joined(separator: ", ")),
        ]
        for case (let key, let value?) in lines { print("    \(key.padded(10)) \(value)") }
    }
}
