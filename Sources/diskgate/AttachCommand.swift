// `diskgate attach` and `detach`: disks onto this proxy's own machine by hand, for other tools, and off it again.
import ArgumentParser
import Block
import Glibc
import LinuxIO
import Transports

struct AttachCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "attach", abstract: "Hot-add disks to this machine, until diskgate detach.",
        discussion: """
            All disks are added in one request. They stay when the command has ended, and over a crash; diskgate \
            doctor shows them and leaves them alone. To use a disk only as long as it is served or copied, give its \
            source to that command instead.
            """)

    @Argument(help: "hotadd:image=PATH?controller=qmp+tcp:HOST:PORT&format=raw|qcow2|...[&unprotected=yes]")
    var sources: [String]

    @Flag(help: "Let this machine write to the disks; else they are read-only.")
    var writable = false

    @OptionGroup var state: StateArguments
    @OptionGroup var report: ReportArguments

    func run() throws {
        let images = try sources.map { text in
            let source = try SourceReference(text)
            guard case .hotAdd(.image(let image)) = source.kind else {
                throw BlockError(.invalid, "attaching \(text): only hotadd:image= sources are attached")
            }
            try source.checkImage(image)
            return image
        }
        let task = HotAddTask(stateDirectory: state.directory)
        let (disks, ledger) = try task.attach(images, isWritable: writable, isByHand: true)
        withExtendedLifetime(ledger) {}
        if report.json { return try printJSON(disks) }
        for disk in disks {
            let warning = disk.isUnprotected == true ? "  (not kept from this machine's own programs)" : ""
            print("\(disk.node ?? "")  hotadd:serial=\(disk.serial)  hctl=\(disk.hctl ?? "")  \(disk.image)\(warning)")
        }
    }
}

struct DetachCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "detach", abstract: "Take hot-added disks off this machine.",
        discussion: "Only disks that diskgate attach has added, or that a crashed diskgate has left.")

    @Argument(help: "Serial numbers, nodes, ids, images or hotadd: sources of the disks, as attach has printed them.")
    var disks: [String] = []

    @Flag(help: "All that diskgate has added.")
    var all = false

    @Flag(help: "Also disks that are mounted or held by somebody, who gets errors from then on.")
    var force = false

    @OptionGroup var state: StateArguments
    @OptionGroup var report: ReportArguments

    func validate() throws {
        if disks.isEmpty != all { throw ValidationError("Name disks, or say --all.") }
    }

    func run() throws {
        let task = HotAddTask(stateDirectory: state.directory)
        let names = Set(
            disks.map { $0.hasPrefix("hotadd:serial=") ? String($0.dropFirst("hotadd:serial=".count)) : $0 })
        let known = try task.attachments()
        // What a node's name means now, not what it meant when the disk came.
        let serials = try Set(
            names.filter { $0.hasPrefix("/dev/") }.compactMap { node in
                try DiskInventory().disk(of: try Descriptor.open(node, O_RDONLY | O_NONBLOCK)).serial
            })
        func isMeant(_ disk: HotAddAttachment) -> Bool {
            all || serials.contains(disk.serial) || !names.isDisjoint(with: [disk.serial, disk.id, disk.image])
        }
        let plain = names.filter { !$0.hasPrefix("/dev/") }.union(serials)
        for name in plain where !known.contains(where: { [$0.serial, $0.id, $0.image].contains(name) }) {
            throw BlockError(
                .notFound, "detaching \(name): diskgate has added no such disk (diskgate doctor lists them)")
        }
        let gone = try task.detach(force: force, where: isMeant)
        let left = known.filter(isMeant).filter { !gone.contains($0) }
        if report.json {
            try printJSON(gone)
        } else {
            for disk in gone { print("\(disk.node ?? disk.id) \(disk.image)") }
        }
        for disk in left {
            writeError("diskgate: \(disk.node ?? disk.id) is in use by a diskgate that is running: end that instead")
        }
        if !left.isEmpty { throw ExitCode(1) }
    }
}
