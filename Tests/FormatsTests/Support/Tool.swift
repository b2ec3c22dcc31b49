// Runs the programs that tests compare with; a missing one fails the test and names the package to install.
import Foundation

/// A program could not be run, or reported failure.
struct ToolError: Error, CustomStringConvertible {
    let description: String
}

enum Tool {
    /// Debian packages of the programs that tests run.
    private static let packages = [
        "qemu-img": "qemu-utils", "qemu-io": "qemu-utils", "sfdisk": "fdisk", "sgdisk": "gdisk", "parted": "parted",
        "vmdkinfo": "libvmdk-utils",
    ]

    private static func find(_ name: String) throws -> String {
        let path = ProcessInfo.processInfo.environment["PATH"] ?? ""
        // Partitioning tools are in directories that only root's PATH has.
        for directory in path.split(separator: ":").map(String.init) + ["/usr/sbin", "/sbin"] {
            let file = "\(directory)/\(name)"
            if access(file, X_OK) == 0 { return file }
        }
        throw ToolError(
            description: "\(name) is not installed; on Debian: apt-get install \(packages[name] ?? name)")
    }

    /// Runs a program in a directory and returns what it wrote to standard output.
    @discardableResult
    static func run(
        _ name: String, _ arguments: [String], in directory: String, input: String = "",
        environment: [String: String] = [:]
    ) throws -> String {
        let process = Process()
        process.executableURL = URL(fileURLWithPath: try find(name))
        process.arguments = arguments
        process.environment = ProcessInfo.processInfo.environment.merging(environment) { $1 }
        process.currentDirectoryURL = URL(fileURLWithPath: directory)
        let inputPipe = Pipe()
        process.standardInput = inputPipe
        // Files, not pipes: nobody has to drain them while the program runs.
        let outputPath = "\(directory)/.output-\(UUID().uuidString)"
        guard FileManager.default.createFile(atPath: outputPath, contents: nil),
            let output = FileHandle(forUpdatingAtPath: outputPath)
        else { throw ToolError(description: "no file for the output of \(name) in \(directory)") }
        defer { unlink(outputPath) }
        process.standardOutput = output
        process.standardError = output
        try process.run()
        inputPipe.fileHandleForWriting.write(Data(input.utf8))
        try inputPipe.fileHandleForWriting.close()
        process.waitUntilExit()
        let text = String(decoding: try Data(contentsOf: URL(fileURLWithPath: outputPath)), as: UTF8.self)
        try output.close()
        guard process.terminationStatus == 0 else {
            let command = ([name] + arguments).joined(separator: " ")
            throw ToolError(description: "\(command) ended with \(process.terminationStatus): \(text)")
        }
        return text
    }
}
