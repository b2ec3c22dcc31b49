// Fuzzes the descriptors of VMDKs: whatever a text says, opening it ends soon, and what opens is a disk.
import Block
import Formats
import FuzzSupport
import LinuxIO

@main
struct VMDKDescriptorFuzz {
    static func main() throws {
        let flat = try PatternDevice(size: 1 << 20, seed: 7, allocatedShare: 0.5)
        fuzz { input in
            let files = Texts(input: Array(input), flat: flat)
            var options = VMDKOptions()
            options.allowsPhysicalMapping = input.count % 2 == 0
            for hint in [FormatHint.explicit(.vmdk), .guess(name: "disk", isNodeOrRemote: false)] {
                guard let top = try? files.open("0"), let device = try? openDisk(top, hint, vmdk: options) else {
                    continue
                }
                require(device.info.size <= UInt64(Int64.max), "a disk of \(device.info.size) bytes")
                exerciseDisk(device, step: 4096)
            }
        }
    }
}

/// Disks in flat files; under names of a digit the texts of the input, which zero bytes separate.
private struct Texts: FileResolver {
    let input: [UInt8]
    let flat: PatternDevice

    func open(_ name: String) throws(BlockError) -> ResolvedFile {
        let texts = input.split(separator: 0, maxSplits: 8, omittingEmptySubsequences: false)
        if let index = Int(name), texts.indices.contains(index), !texts[index].isEmpty {
            return ResolvedFile(device: ImageDevice(Array(texts[index]), name: name), identity: name, resolver: self)
        }
        if name.isEmpty || name.contains("/") { throw BlockError(.denied, "no") }
        return ResolvedFile(device: flat, identity: "flat", resolver: nil)
    }

    func openMappedDevice(_ name: String) throws(BlockError) -> ResolvedFile { try open("flat") }
}
