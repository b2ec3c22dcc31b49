// Damaged and hostile images: an error, or the bytes that were there; never a crash, never another place's bytes.
import Block
import Formats
import LinuxIO
import Support
import Testing

@Suite struct VMFSHostileTests {
    /// Opens everything that can be opened and reads some of it.
    private func exercise(_ lun: any BlockDevice, _ image: VMFSImage) throws {
        let volume = try openVolume([lun])
        for entry in try volume.list("vm1") { _ = entry.lock.mode }
        for path in image.manifest.files.keys where !path.contains("snapshots") {
            guard let file = try? volume.open(path), file.info.size > 0 else { continue }
            _ = try? Support.readBytes(file, at: 0, count: Int(min(file.info.size, 5000)))
            _ = try? Support.readBytes(file, at: file.info.size - 1, count: 1)
        }
    }

    /// Where an image has metadata: what opening and listing it reads.
    private func metadata(_ image: VMFSImage) throws -> [Range<UInt64>] {
        let lun = ChangingDevice(try image.luns()[0])
        let reads = Locked<[Range<UInt64>]>([])
        lun.beforeEachRead { range in reads.withLock { $0.append(range) } }
        let volume = try openVolume([lun])
        _ = try volume.list("vm1")
        for path in image.manifest.files.keys where path.hasSuffix("flat.vmdk") { _ = try volume.open(path) }
        return Array(Set(reads.withLock { $0 })).sorted { $0.lowerBound < $1.lowerBound }
    }

    @Test(arguments: [3, 5, 6])
    func flippedBitsNeverCrash(version: Int) throws {
        let image = try VMFSImage.make(version)
        let ranges = try metadata(image)
        var random = SeededGenerator(seed: UInt64(version))
        for _ in 0..<50 {
            let lun = ChangingDevice(try image.luns()[0])
            for _ in 0..<Int.random(in: 1...4, using: &random) {
                guard let range = ranges.randomElement(using: &random) else { continue }
                // Fields come first in most structures.
                let span = random.oneIn(2) ? min(range.count64, 256) : range.count64
                let offset = range.lowerBound + UInt64.random(in: 0..<span, using: &random)
                lun.change([UInt8.random(in: 0...255, using: &random)], at: offset)
            }
            do { try exercise(lun, image) } catch let error as BlockError { #expect(!error.message.isEmpty) }
        }
    }

    /// Whatever one flipped bit in a descriptor does, the file's bytes are right, or it does not open, unless it is in
    /// an address or a size, which nothing else on the datastore contradicts.
    @Test(arguments: [3, 5, 6])
    func flippedBitsOfADescriptorAreNoticedOrHarmless(version: Int) throws {
        let image = try VMFSImage.make(version)
        let path = "vm1/thick-flat.vmdk"
        let expected = try #require(image.manifest.files[path])
        let lun = ChangingDevice(try image.luns()[0])
        let fingerprint = try openVolume([lun]).open(path).fingerprint
        let place = try place(of: fingerprint, lun, version)
        let metadata = place + (version == 6 ? 4096 : 512)
        // Lock, own address, kind, block size, way to address, magic.
        let fields: [Range<UInt64>] = [
            place..<(place + 12), metadata..<(metadata + 4), (metadata + 0x0C)..<(metadata + 0x10),
            (metadata + 0x1C)..<(metadata + 0x24), (metadata + 0x44)..<(metadata + 0x48),
        ]
        for field in fields {
            for offset in field {
                let byte = try Support.readBytes(lun, at: offset, count: 1)[0]
                for bit in 0..<8 {
                    lun.change([byte ^ (1 << bit)], at: offset)
                    if let file = try? openVolume([lun]).open(path) {
                        try checkFile(file, expected, [lun], "\(path) with bit \(bit) at \(offset - place)")
                    }
                    lun.restore()
                }
            }
        }
    }

    private func place(of fingerprint: VMFSFingerprint, _ lun: ChangingDevice, _ version: Int) throws -> UInt64 {
        let size: UInt64 = version == 6 ? 8192 : 2048
        let base: UInt64 = 0x110_0000 + (version == 3 ? 0x41_8000 : version == 5 ? 0x42_0000 : 0x72_0000)
        let cluster: UInt64 = version == 3 ? 32 : 0
        return base + (UInt64(fingerprint.address >> 6 & 0xFFFF) * cluster + UInt64(fingerprint.address >> 22)) * size
    }

    @Test(arguments: [3, 5, 6])
    func damagedDescriptorLeavesTheOthers(version: Int) throws {
        let lun = ChangingDevice(try VMFSImage.make(version).luns()[0])
        let volume = try openVolume([lun])
        let whole = try volume.list("vm1")
        lun.change(1, at: try place(of: volume.open("vm1/thick-flat.vmdk").fingerprint, lun, version))
        let damaged = try volume.list("vm1")
        #expect(damaged.map(\.name) == whole.map(\.name))
        #expect(damaged.filter { $0.problem != nil }.map(\.name) == ["thick-flat.vmdk"])
        #expect(whole.allSatisfy { $0.problem == nil })
        try requireError(.corrupt, "opening it") { _ = try volume.open("vm1/thick-flat.vmdk") }
    }

    @Test(arguments: [3, 5, 6])
    func truncatedImagesAreErrors(version: Int) throws {
        let image = try VMFSImage.make(version)
        let lun = try image.luns()[0]
        let sizes: [UInt64] = [
            0, 1, 512, 0x10_0000, 0x10_0200, 0x10_1000, 0x18_0000, 0x18_0700, 0x110_0000, 0x130_0000, 0x150_0000,
            40 << 20, lun.info.size - 1,
        ]
        for size in sizes {
            let short = ChangingDevice(lun, size: size)
            do {
                let found = try VMFSMember.probe(short)
                #expect(found.isEmpty, "\(size) bytes of a datastore are one")
            } catch { #expect(error.kind == .corrupt || error.kind == .outOfRange, "\(size): \(error)") }
        }
    }

    /// A LUN that ends within a volume whose table of extents was made to agree.
    @Test func blocksPastTheEndAreErrors() throws {
        let image = try VMFSImage.make(6)
        let lun = ChangingDevice(try image.luns()[0])
        // The length of the only extent: 400 MiB, which have the metadata but not all of the disks.
        lun.change(UInt32(400 << 20), at: 0x18_2000 + 0x19)
        let volume = try openVolume([lun])
        let path = "vm1/large-flat.vmdk"
        try requireError(.corrupt, "a block past the end") { _ = try volume.open(path) }
    }

    @Test(arguments: [3, 5, 6])
    func loopsEnd(version: Int) throws {
        let image = try VMFSImage.make(version)
        let lun = ChangingDevice(try image.luns()[0])
        let volume = try openVolume([lun])
        let path = (["vm1"] + [String](repeating: "absolute", count: 20) + ["thick-flat.vmdk"]).joined(separator: "/")
        try requireError(.invalid, "links without end") { _ = try volume.open(path) }
    }

    /// Sizes that no file has must not take memory.
    @Test(arguments: [3, 5, 6], [UInt64(1) << 40, 1 << 50, .max])
    func hugeSizesAreErrors(version: Int, size: UInt64) throws {
        let image = try VMFSImage.make(version)
        let lun = ChangingDevice(try image.luns()[0])
        let bytes = (0..<8).map { UInt8(truncatingIfNeeded: size >> (8 * $0)) }
        for path in ["vm1/thick-flat.vmdk", "sub.bin", "readme.txt"] {
            let fingerprint = try openVolume([lun]).open(path).fingerprint
            let metadata = try place(of: fingerprint, lun, version) + (version == 6 ? 4096 : 512)
            lun.change(bytes, at: metadata + 0x14)
            try requireError(.corrupt, "\(path) of \(size) bytes") { _ = try openVolume([lun]).open(path) }
            lun.restore()
        }
    }
}
