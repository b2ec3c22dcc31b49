// Fuzzes qcow2 images: whatever an image holds, opening, mapping, asking and reading end soon and keep promises.
import Block
import Formats
import FuzzSupport
import LinuxIO

@main
struct Qcow2Fuzz {
    static func main() throws {
        let backing = try PatternDevice(size: 100_000, seed: 7, allocatedShare: 0.5)
        let dataFile = try PatternDevice(size: 1 << 30, seed: 8, allocatedShare: 0.5)
        fuzz { input in
            var choices = Choices(input)
            let shape = choices.byte()
            // Small images with large clusters: one block of the input for each cluster.
            let bytes = Array(choices.rest())
            let image = ImageDevice(bytes, name: "image.qcow2", stride: 512 << UInt64(min(shape & 15, 12)))
            var options = Qcow2Options()
            options.allowCorrupt = shape & 0x10 != 0
            if shape & 0x20 != 0 { options.cacheBytes = 1 }
            let device =
                shape & 0x40 != 0
                ? try? openDisk(
                    ResolvedFile(device: image, identity: "top", resolver: SameImage(image: image, raw: backing)),
                    .guess(name: "image.qcow2", isNodeOrRemote: false), options)
                : open(image, backing, dataFile, options)
            if let device { exercise(device, seed: bytes.count) }
        }
    }

    private static func open(
        _ image: ImageDevice, _ backing: PatternDevice, _ dataFile: PatternDevice, _ options: Qcow2Options
    ) -> (any BlockDevice)? {
        guard let header = try? Qcow2Header.read(from: image, allowCorrupt: options.allowCorrupt) else { return nil }
        return try? Qcow2Device(
            lower: image, header: header, backing: header.backingName == nil ? nil : backing,
            dataFile: header.hasDataFile ? dataFile : nil, options)
    }

    /// Looks at a bounded share of the disk, from its start, at its end, and in between.
    private static func exercise(_ device: any BlockDevice, seed: Int) {
        let info = device.info
        if info.size == 0 { return }
        let step: UInt64 = 1 << 20
        let contexts: [StatusContext] =
            [.allocation, .depth] + info.dirtyBitmaps.prefix(4).indices.map { .dirtyBitmap($0) }
        for turn in 0..<8 as Range<UInt64> {
            // The first turns lie at the start, one after the other; the others are spread to the end.
            let start = turn < 4 ? turn * step : max(info.size / 4 * (turn - 3), 1) - 1
            guard start < info.size else { continue }
            let range = start..<min(info.size, start + step)
            checkMap(device, range, .resident)
            checkMap(device, range, .blocking)
            for context in contexts { checkStatus(device, context, range) }
            device.prefetch(range)
            checkRead(device, start..<min(range.upperBound, start + 3000))
        }
        checkRead(device, (info.size - min(info.size, 70_000))..<info.size)
    }
}

/// Opens the image itself under names of an even length, and a raw disk under others.
private struct SameImage: FileResolver {
    let image: ImageDevice
    let raw: PatternDevice

    func open(_ name: String) throws(BlockError) -> ResolvedFile {
        let isImage = name.utf8.count % 2 == 0
        return ResolvedFile(device: isImage ? image : raw, identity: name, resolver: isImage ? self : nil)
    }
}
