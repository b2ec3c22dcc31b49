// Chains of images: what one does not have, the next one has; layers count from the top.
import Block
import Formats
import Foundation
import LinuxIO
import Testing

@Suite struct BackingChainTests {
    @Test func threeLayersOfDifferentClusterSizesReadAsInQEMU() throws {
        let scratch = try Scratch()
        try scratch.makeRaw("base.raw", size: 6 << 20, seed: 1)
        try scratch.qemuImg("create -q -f qcow2 -o cluster_size=4k -b base.raw -F raw one.qcow2")
        try scratch.qemuIO("one.qcow2", ["write -P 11 100k 600k", "write -z 1M 512k", "write -P 12 5M 3k"])
        try scratch.qemuImg("create -q -f qcow2 -o cluster_size=1M -b one.qcow2 -F qcow2 two.qcow2")
        try scratch.qemuIO("two.qcow2", ["write -P 21 2M 100k", "discard 0 1M"])
        try scratch.qemuImg(
            "create -q -f qcow2 -o cluster_size=64k,compat=0.10 -b two.qcow2 -F qcow2 three.qcow2")
        try scratch.qemuIO("three.qcow2", ["write -P 31 1200k 70k", "write -P 32 4000k 1k"])
        let device = try scratch.open("three.qcow2")
        #expect(try #require(device as? Qcow2Device).chainLength == 3)
        #expect(device.info.hasLayers)
        try expectSameAsQEMU(scratch, "three.qcow2", device)
    }

    @Test func shorterBackingFileEndsInZeros() throws {
        let scratch = try Scratch()
        try scratch.makeRaw("base.raw", size: (1 << 20) + 512 * 3, seed: 1)
        try scratch.qemuImg("create -q -f qcow2 -b base.raw -F raw a.qcow2 4M")
        try scratch.qemuIO("a.qcow2", ["write -P 5 1000k 10k", "write -P 6 3M 64k"])
        let device = try scratch.open("a.qcow2")
        // qemu's map says layer 0 here, its NBD server what is expected below.
        try expectSameAsQEMU(scratch, "a.qcow2", device, depth: false)
        let depths = try wholeStatus(device, .depth)
        #expect(value(depths, at: 0) == 2)
        #expect(value(depths, at: 3 << 20) == 1)
        #expect(value(depths, at: 2 << 20) == 2)
        #expect(value(try wholeStatus(device, .allocation), at: 2 << 20) == 3)
    }

    @Test func longerBackingFileIsCutOff() throws {
        let scratch = try Scratch()
        try scratch.makeRaw("base.raw", size: 3 << 20, seed: 1)
        try scratch.qemuImg("create -q -f qcow2 -b base.raw -F raw a.qcow2 1536k")
        try expectSameAsQEMU(scratch, "a.qcow2", try scratch.open("a.qcow2"))
    }

    @Test func zerosAndDiscardsHideTheBackingFile() throws {
        let scratch = try Scratch()
        try scratch.makeRaw("base.raw", size: 2 << 20, seed: 1)
        try scratch.qemuImg("create -q -f qcow2 -b base.raw -F raw a.qcow2")
        try scratch.qemuIO(
            "a.qcow2",
            ["write -z 0 128k", "write -P 1 512k 64k", "write -z 512k 64k", "discard 1M 128k", "write -zu 1200k 200k"])
        let device = try scratch.open("a.qcow2")
        try expectSameAsQEMU(scratch, "a.qcow2", device)
        let flags = try wholeStatus(device, .allocation)
        #expect(value(flags, at: 0) == AllocationFlags.hole | AllocationFlags.zero)
        // A zero cluster that keeps its storage is no hole.
        #expect(value(flags, at: 512 << 10) == AllocationFlags.zero)
        #expect(value(try wholeStatus(device, .depth), at: 0) == 1)
        var extents = ExtentList(capacity: 1)
        _ = try device.map((512 << 10)..<(576 << 10), .blocking, into: &extents)
        guard case .zeros(allocated: true) = extents[0].place else {
            Issue.record("an allocated zero cluster is \(extents[0].place)")
            return
        }
    }

    @Test func depthsWithoutBackingFileAreOneAndZero() throws {
        let scratch = try Scratch()
        try scratch.qemuImg("create -q -f qcow2 a.qcow2 4M")
        try scratch.qemuIO("a.qcow2", ["write -P 1 1M 64k", "write -z 2M 64k"])
        let depths = try wholeStatus(try scratch.open("a.qcow2"), .depth)
        #expect(depths.map(\.value) == [0, 1, 0, 1, 0])
    }

    @Test func longestChainIsReadOnASmallStack() throws {
        let base = BytesDevice([UInt8](repeating: 0xAB, count: 65536))
        var device: any BlockDevice = base
        let empty = Qcow2Builder.empty(clusterBits: 9, size: 65536)
        for _ in 0..<Qcow2Device.chainLengthMax {
            device = try Qcow2Device(lower: BytesDevice(empty), backing: device)
        }
        let top = device
        // The stack of a connection's thread.
        let done = DispatchSemaphore(value: 0)
        let result = Locked<[UInt8]>([])
        let depth = Locked<UInt32?>(nil)
        try startThread(name: "chain", stackSize: 512 * 1024) {
            let read = (try? readBytes(top, 100, 1000)) ?? []
            result.withLock { $0 = read }
            let depths = try? wholeStatus(top, .depth)
            depth.withLock { $0 = depths?.first?.value }
            done.signal()
        }
        done.wait()
        #expect(result.withLock { $0 } == [UInt8](repeating: 0xAB, count: 1000))
        #expect(depth.withLock { $0 } == UInt32(Qcow2Device.chainLengthMax + 1))
        let error = #expect(throws: BlockError.self) { try Qcow2Device(lower: BytesDevice(empty), backing: top) }
        #expect(error?.kind == .tooLarge)
    }

    @Test func loopIsFoundWhenOpening() throws {
        let scratch = try Scratch()
        try scratch.qemuImg("create -q -f qcow2 one.qcow2 1M")
        try scratch.qemuImg("create -q -f qcow2 -b one.qcow2 -F qcow2 two.qcow2")
        try scratch.qemuImg("rebase -u -b two.qcow2 -F qcow2 one.qcow2")
        let error = #expect(throws: BlockError.self) { try scratch.open("two.qcow2") }
        #expect(error?.message.contains("comes back to") == true)
        try scratch.qemuImg("rebase -u -b one.qcow2 -F qcow2 one.qcow2")
        #expect(throws: BlockError.self) { try scratch.open("one.qcow2") }
    }

    @Test func faultInOneLayerSparesWhatOthersHave() throws {
        var broken = Qcow2Builder.empty(clusterBits: 16, size: 1 << 20)
        Qcow2Builder.setL2Entry(&broken, 2, 0x1200)
        let overlay = Qcow2Builder.empty(clusterBits: 12, size: 1 << 20)
        let device = try Qcow2Device(
            lower: BytesDevice(overlay), backing: try Qcow2Device(lower: BytesDevice(broken)))
        #expect(try readBytes(device, 0, 131072) == [UInt8](repeating: 0, count: 131072))
        #expect(throws: BlockError.self) { try readBytes(device, 131072, 1) }
        #expect(try readBytes(device, 196608, 4096) == [UInt8](repeating: 0, count: 4096))
    }
}
