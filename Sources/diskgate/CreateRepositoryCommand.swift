// `diskgate create-repository`: a new directory for restore points.
import ArgumentParser
import Backup
import Block

struct CreateRepositoryCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "create-repository", abstract: "Make a repository of restore points.",
        discussion: """
            The drivers: qcow2 keeps a chain of images, which every qcow2 tool can open; reflink keeps raw files that \
            share unchanged blocks, on XFS or Btrfs.
            """)

    @Argument(help: "A new or empty directory.")
    var directory: String

    @Option(help: ArgumentHelp("How disks are stored: qcow2 or reflink.", valueName: "driver"), transform: choice)
    var driver = StorageDriver.qcow2

    @Option(
        help: ArgumentHelp("How data is stored: none (as it is) or zstd.", valueName: "compression"), transform: choice)
    var compression = PointCompression.none

    func run() throws {
        let repository = try Repository.create(at: directory, driver: driver, compression: compression)
        writeError("diskgate: \(repository.path) is a repository now (\(driver.rawValue))")
    }
}

/// The case of an enumeration that a user names.
private func choice<Value: RawRepresentable & CaseIterable>(_ text: String) throws -> Value
where Value.RawValue == String {
    if let value = Value(rawValue: text) { return value }
    let known = Value.allCases.map(\.rawValue).joined(separator: ", ")
    throw ValidationError("There is no \(text), only \(known).")
}
