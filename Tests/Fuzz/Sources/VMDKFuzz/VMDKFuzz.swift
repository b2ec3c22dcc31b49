// Fuzzes the sparse files of VMDKs: whatever their headers and tables say, opening and reading end soon and keep
// promises.
import Block
import Formats
import FuzzSupport

@main
struct VMDKFuzz {
    static func main() {
        fuzz { input in
            var choices = Choices(input)
            let shape = choices.byte()
            let size = UInt64(max(choices.number(), 1)) << (shape & 0x40 != 0 ? 20 : 9)
            let file = PiecesDevice(choices.rest(), size: size, name: "file.vmdk")
            let sectors = capacity(of: file)
            let parent = shape & 0x10 != 0
            let kind = ["SPARSE", "VMFSSPARSE", "SESPARSE"][Int(shape & 0xF) % 3]
            let texts = [
                "disk.vmdk": text("RW \(sectors) \(kind) \"file\"", parentID: parent ? "1" : "ffffffff"),
                "parent.vmdk": text("RW \(sectors) ZERO", parentID: "ffffffff"),
            ]
            let files = Files(file: file, texts: texts)
            var options = VMDKOptions()
            if shape & 0x20 != 0 { options.cacheBytes = 1 }
            // A disk by itself, its descriptor in it; or an extent of one.
            let name = shape & 0x80 != 0 ? "file" : "disk.vmdk"
            guard let top = try? files.open(name),
                let device = try? openDisk(top, .explicit(.vmdk), vmdk: options)
            else { return }
            if name == "disk.vmdk" { require(device.info.size == sectors * 512, "\(sectors) sectors became others") }
            exerciseDisk(device)
        }
    }

    /// What a file's header has as its capacity, so that the descriptor agrees with it.
    private static func capacity(of file: PiecesDevice) -> UInt64 {
        let start = Buffer(count: 32)
        guard file.info.size >= 32, (try? file.read(into: start.bytes, at: 0)) != nil else { return 1 }
        let capacity: UInt64 =
            switch start.readable[0] {
            case UInt8(ascii: "C"): UInt64(start.readable.littleEndian(12, as: UInt32.self))
            case UInt8(ascii: "K"): start.readable.littleEndian(12)
            default: start.readable.littleEndian(16)
            }
        return min(max(capacity, 1), 1 << 50)
    }

    private static func text(_ extent: String, parentID: String) -> [UInt8] {
        Array(
            """
            # Disk DescriptorFile
            version=1
            CID=1
            parentCID=\(parentID)
            createType="custom"
            parentFileNameHint="parent.vmdk"
            \(extent)
            """.utf8)
    }
}

/// The file under test, and texts by their names.
private struct Files: FileResolver {
    let file: PiecesDevice
    let texts: [String: [UInt8]]

    func open(_ name: String) throws(BlockError) -> ResolvedFile {
        if let text = texts[name] {
            return ResolvedFile(device: ImageDevice(text, name: name), identity: name, resolver: self)
        }
        return ResolvedFile(device: file, identity: "file", resolver: self)
    }
}
