// A directory for one test with the images it makes, and the way to open them as diskgate does.
import Block
import Formats
import Foundation
import LinuxIO

final class Scratch {
    let path: String

    init() throws {
        path = NSTemporaryDirectory() + "diskgate-formats-\(UUID().uuidString)"
        try FileManager.default.createDirectory(atPath: path, withIntermediateDirectories: true)
    }

    deinit { try? FileManager.default.removeItem(atPath: path) }

    func file(_ name: String) -> String { "\(path)/\(name)" }

    @discardableResult
    func run(_ tool: String, _ arguments: String..., input: String = "") throws -> String {
        try Tool.run(tool, arguments, in: path, input: input)
    }

    /// qemu-img with arguments split at blanks.
    @discardableResult
    func qemuImg(_ arguments: String) throws -> String {
        try Tool.run("qemu-img", arguments.split(separator: " ").map(String.init), in: path)
    }

    /// Runs qemu-io commands on an image. qemu-io reports a failed command on its output only.
    func qemuIO(_ image: String, _ commands: [String], format: String = "qcow2") throws {
        let output = try Tool.run(
            "qemu-io", ["-f", format] + commands.flatMap { ["-c", $0] } + [image], in: path)
        if output.contains("failed") || output.contains("rror") {
            throw ToolError(description: "qemu-io \(commands): \(output)")
        }
    }

    /// A file with bytes that differ from each other.
    func makeRaw(_ name: String, size: Int, seed: UInt64) throws {
        var random = SplitMix(seed: seed)
        var bytes = [UInt8]()
        bytes.reserveCapacity(size)
        while bytes.count < size {
            withUnsafeBytes(of: random.next()) { bytes.append(contentsOf: $0.prefix(size - bytes.count)) }
        }
        try Data(bytes).write(to: URL(fileURLWithPath: file(name)))
    }

    func resolved(_ name: String) throws -> ResolvedFile { try DirectoryResolver(directory: path).open(name) }

    /// Opens a disk image of this directory with the files it names.
    func open(_ name: String, _ options: Qcow2Options = Qcow2Options()) throws -> any BlockDevice {
        try openDisk(resolved(name), .explicit(.qcow2), options)
    }

    /// The bytes of a file.
    func bytes(_ name: String) throws -> [UInt8] { [UInt8](try Data(contentsOf: URL(fileURLWithPath: file(name)))) }
}

/// Opens files of one directory by name.
struct DirectoryResolver: FileResolver {
    let directory: String

    func open(_ name: String) throws(BlockError) -> ResolvedFile {
        let path = name.hasPrefix("/") ? name : "\(directory)/\(name)"
        let device = try RawFileDevice.open(path)
        var status = stat()
        stat(path, &status)
        return ResolvedFile(device: device, identity: "\(status.st_dev):\(status.st_ino)", resolver: self)
    }
}

/// A small generator of repeatable pseudo-random numbers (splitmix64).
struct SplitMix: RandomNumberGenerator {
    private var state: UInt64
    init(seed: UInt64) { state = seed }
    mutating func next() -> UInt64 {
        state &+= 0x9E37_79B9_7F4A_7C15
        var z = state
        z = (z ^ (z >> 30)) &* 0xBF58_476D_1CE4_E5B9
        z = (z ^ (z >> 27)) &* 0x94D0_49BB_1331_11EB
        return z ^ (z >> 31)
    }
}
