// `diskgate mount` and `diskgate unmount`: the files of a disk, through the kernel's NBD client.
import ArgumentParser
import Gateway

struct MountCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "mount", abstract: "Mount a file system of a disk, for example of a restore point.",
        discussion: """
            Serves the disk on a private socket, connects the kernel's NBD client (nbd-client) to it, and mounts what \
            is found: read-only and without touching a journal, or, with --overlay, writable over scratch space that \
            is gone with the mount.
            """)

    @Argument(help: "A path or a URI of a disk.")
    var source: String

    @Argument(help: "Where to mount it.")
    var directory: String

    @Option(help: "Take this partition (see diskgate info).")
    var partition: Int?

    @Flag(help: "Let the file system be changed, in scratch space that is gone with the mount.")
    var overlay = false

    @OptionGroup var site: SiteArguments
    @OptionGroup var report: ReportArguments

    func run() throws {
        // The server that is started goes by it, too.
        try site.apply()
        let mount = try KernelMount.mount(
            .init(source: source, directory: directory, partition: partition, isOverlay: overlay))
        if report.json { return try printJSON(mount) }
        print("\(mount.directory): \(mount.type ?? "") of \(source), \(mount.node ?? "")")
    }
}

struct UnmountCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "unmount", abstract: "Unmount what diskgate mount has mounted.")

    @Argument(help: "Where it is mounted.")
    var directory: String

    func run() throws {
        let mount = try KernelMount.unmount(directory)
        writeError("diskgate: \(mount.source) is not mounted any more")
    }
}
