// Whole images damaged in every place: an error or data, never a trap, never more memory than an honest image needs.
import Block
import Formats
import Foundation
import Testing

/// Opens an image and asks everything of it. Errors are fine; traps are not.
func exercise(_ bytes: [UInt8]) {
    let lower = BytesDevice(bytes)
    guard let header = try? Qcow2Header.read(from: lower, allowCorrupt: true) else { return }
    let other = BytesDevice([UInt8](repeating: 0x11, count: 70_000))
    var options = Qcow2Options()
    options.allowCorrupt = true
    options.cacheBytes = 64 << 10
    let device = try? Qcow2Device(
        lower: lower, header: header, backing: header.backingName == nil ? nil : other,
        dataFile: header.hasDataFile ? other : nil, options)
    guard let device, device.info.size > 0 else { return }
    let size = device.info.size
    let offsets: [UInt64] = [0, 65436, size / 2, size - min(size, 3000)]
    for offset in offsets where offset < size {
        let count = Int(min(size - offset, 20_000))
        _ = try? readBytes(device, offset, count)
        var extents = ExtentList(capacity: 4)
        _ = try? device.map(offset..<(offset + UInt64(count)), .resident, into: &extents)
        device.prefetch(offset..<(offset + UInt64(count)))
    }
    for context in [StatusContext.allocation, .depth, .dirtyBitmap(0)] {
        var list = StatusList(capacity: 100)
        _ = try? device.status(context, of: 0..<size, into: &list)
        list.removeAll()
        _ = try? device.status(context, of: (size - 1)..<size, into: &list)
    }
}

@Suite struct HostileImageTests {
    /// A small image with some of everything.
    private func image(_ options: String, backing: Bool = true) throws -> [UInt8] {
        let scratch = try Scratch()
        try scratch.makeRaw("base.raw", size: 1 << 20, seed: 2)
        try scratch.qemuImg(
            "create -q -f qcow2 -o \(options) \(backing ? "-b base.raw -F raw" : "") a.qcow2 1M")
        try scratch.qemuImg("bitmap --add -g 4096 a.qcow2 changes")
        try scratch.qemuIO(
            "a.qcow2", ["write -P 1 0 20k", "write -z 40k 20k", "write -P 2 500k 1k", "write -c -P 3 128k 64k"])
        return try scratch.bytes("a.qcow2")
    }

    @Test(arguments: [
        "cluster_size=4k", "cluster_size=4k,compression_type=zstd", "cluster_size=16k,extended_l2=on",
        "cluster_size=512",
    ])
    func everyByteOfTheMetadataMayLie(options: String) throws {
        let good = try image(options)
        exercise(good)
        let layout = Qcow2Layout(good)
        var places = Array(0..<min(640, layout.clusterSize))
        places += layout.l1Offset..<(layout.l1Offset + 16)
        places += layout.l2Offset..<(layout.l2Offset + 320)
        for place in places {
            for value in [0, 0xFF, good[place] ^ 1, good[place] ^ 0x80, good[place] ^ 0x20] where value != good[place] {
                var bytes = good
                bytes[place] = value
                exercise(bytes)
            }
        }
    }

    @Test(arguments: ["cluster_size=4k", "cluster_size=16k,extended_l2=on"])
    func imageMayEndAnywhere(options: String) throws {
        let good = try image(options)
        for length in Array(0..<700) + Array(stride(from: 700, to: good.count, by: 211)) {
            exercise(Array(good[..<length]))
        }
    }

    @Test(arguments: ["cluster_size=4k", "cluster_size=16k,extended_l2=on", "cluster_size=64k,compression_type=zstd"])
    func randomDamageDoesNoHarm(options: String) throws {
        let good = try image(options)
        var random = SplitMix(seed: 1)
        let layout = Qcow2Layout(good)
        for _ in 0..<400 {
            var bytes = good
            for _ in 0..<Int.random(in: 1...6, using: &random) {
                let place =
                    switch Int.random(in: 0..<4, using: &random) {
                    case 0: Int.random(in: 0..<512, using: &random)
                    case 1: layout.l1Offset + Int.random(in: 0..<32, using: &random)
                    case 2: layout.l2Offset + Int.random(in: 0..<1024, using: &random)
                    default: Int.random(in: 0..<good.count, using: &random)
                    }
                if place < bytes.count { bytes[place] = UInt8.random(in: 0...255, using: &random) }
            }
            exercise(bytes)
        }
    }

    @Test func wrongTableOffsetsAreCorruptOnlyWhereTheyCount() throws {
        let cluster = 4096
        // Two L2 tables: the second one is right, the first one is what is tried.
        let reach = cluster * cluster / 8
        var good = Qcow2Builder.empty(clusterBits: 12, size: UInt64(2 * reach))
        good += [UInt8](repeating: 0, count: cluster)
        Qcow2Builder.store(&good, 2 * cluster + 8, UInt64(4 * cluster))
        for offset: UInt64 in [512, UInt64(good.count), UInt64(good.count - 512), 1 << 55, 0x00FF_FFFF_FFFF_F000] {
            var bytes = good
            Qcow2Builder.store(&bytes, 2 * cluster, offset)
            let device = try Qcow2Device(lower: BytesDevice(bytes))
            let error = #expect(throws: BlockError.self) { try readBytes(device, 0, 512) }
            #expect(error?.kind == .corrupt)
            #expect(try readBytes(device, UInt64(reach), 512) == [UInt8](repeating: 0, count: 512))
        }
        // A table that is its own L1 or L2 table or the header is nonsense, but no danger.
        for offset in [1, 2, 3] {
            var bytes = good
            Qcow2Builder.store(&bytes, 2 * cluster, UInt64(offset * cluster))
            exercise(bytes)
        }
    }

    @Test func wrongClusterOffsetsAreCorruptOnlyWhereTheyCount() throws {
        for entry: UInt64 in [0x200, 1 << 63 | 0x3200, 1 << 40, 0x00FF_FFFF_FFFF_F000, 0x5000] {
            var bytes = Qcow2Builder.empty(clusterBits: 12, size: 1 << 20)
            bytes += [UInt8](repeating: 7, count: 4096)
            Qcow2Builder.setL2Entry(&bytes, 0, 1 << 63 | 4 * 4096)
            Qcow2Builder.setL2Entry(&bytes, 1, entry)
            let device = try Qcow2Device(lower: BytesDevice(bytes))
            #expect(try readBytes(device, 0, 4096) == [UInt8](repeating: 7, count: 4096))
            let error = #expect(throws: BlockError.self) { try readBytes(device, 4000, 200) }
            #expect(error?.kind == .corrupt)
            #expect(try readBytes(device, 8192, 4096) == [UInt8](repeating: 0, count: 4096))
            // Maps and status stop before the fault, then name it.
            var extents = ExtentList(capacity: 8)
            #expect(try device.map(0..<16384, .blocking, into: &extents) == 4096)
            var list = StatusList(capacity: 8)
            #expect(try device.status(.allocation, of: 0..<16384, into: &list) == 4096)
        }
    }

    @Test func zeroClusterInVersion2IsCorrupt() throws {
        var bytes = Qcow2Builder.empty(clusterBits: 12, size: 1 << 20, version: 2)
        Qcow2Builder.setL2Entry(&bytes, 0, 1)
        let device = try Qcow2Device(lower: BytesDevice(bytes))
        #expect(throws: BlockError.self) { try readBytes(device, 0, 1) }
    }

    @Test func lastClusterOfAFileMayBePartial() throws {
        var bytes = Qcow2Builder.empty(clusterBits: 12, size: 1 << 20)
        bytes += [UInt8](repeating: 7, count: 1000)
        Qcow2Builder.setL2Entry(&bytes, 0, 1 << 63 | 4 * 4096)
        Qcow2Builder.setL2Entry(&bytes, 1, 1 << 63 | 5 * 4096)
        let device = try Qcow2Device(lower: BytesDevice(bytes))
        let expected = [UInt8](repeating: 7, count: 1000) + [UInt8](repeating: 0, count: 3096)
        #expect(try readBytes(device, 0, 4096) == expected)
        #expect(try readBytes(device, 1500, 10) == [UInt8](repeating: 0, count: 10))
        #expect(throws: BlockError.self) { try readBytes(device, 4096, 1) }
    }
}
