// Datastores that a host changes while they are read: what was opened is what is read, or reading ends with an error.
import Block
import Formats
import Glibc
import LinuxIO
import Support
import Synchronization
import Testing

/// Where things lie in an image on one LUN; vm1 is the tenth file descriptor.
private struct Places {
    let version: Int

    var firstDescriptor: UInt64 {
        switch version {
        case 3: 0x110_0000 + 0x41_8000
        case 5: 0x110_0000 + 0x42_0000
        default: 0x110_0000 + 0x72_0000
        }
    }
    var descriptorSize: UInt64 { version == 6 ? 8192 : 2048 }
    var alignment: UInt64 { version == 6 ? 4096 : 512 }
    /// The LUN offset of the descriptor of a file, found by its own address.
    func descriptor(of fingerprint: VMFSFingerprint) -> UInt64 {
        firstDescriptor + UInt64(fingerprint.address >> 22) * descriptorSize
            + (version == 3 ? UInt64(fingerprint.address >> 6 & 0xFFFF) * 32 * 2048 : 0)
    }
    func metadata(of fingerprint: VMFSFingerprint) -> UInt64 { descriptor(of: fingerprint) + alignment }
    var addresses: UInt64 { version == 6 ? 8192 - 2560 : 1024 }
}

private struct Bench {
    let lun: ChangingDevice
    let volume: VMFSVolume
    let places: Places

    init(_ version: Int, recheckSeconds: Double? = nil, attempts: Int = 1) throws {
        lun = ChangingDevice(try VMFSImage.make(version).luns()[0])
        var options = onlyOnce
        options.recheckSeconds = recheckSeconds
        options.attempts = attempts
        options.pauseMS = 1
        options.cacheBytes = 1
        volume = try openVolume([lun], options)
        places = Places(version: version)
    }

    func number(at offset: UInt64) throws -> UInt32 {
        try Support.readBytes(lun, at: offset, count: 4).reversed().reduce(0) { $0 << 8 | UInt32($1) }
    }
}

@Suite struct VMFSChangeTests {
    private static let path = "vm1/thick-flat.vmdk"
    private static let big = "vm1/big-flat.vmdk"

    @Test(arguments: [3, 5, 6])
    func unchangedFilePasses(version: Int) throws {
        let bench = try Bench(version)
        for path in [Self.path, Self.big, "sub.bin", "readme.txt"] {
            let file = try bench.volume.open(path)
            try file.recheck(.descriptor)
            try file.recheck(.everything)
        }
    }

    /// Each field of a descriptor that says that it is another file now, or elsewhere.
    @Test(arguments: [3, 5, 6], [0x04, 0x0C, 0x14, 0x44, 0x48] as [UInt64])
    func changedDescriptorIsNoticed(version: Int, field: UInt64) throws {
        let bench = try Bench(version)
        let file = try bench.volume.open(Self.path)
        let offset = bench.places.metadata(of: file.fingerprint) + field
        #expect(try bench.number(at: offset) != 0xFFFF)
        // Another kind, and another way to address, must be ones that exist, or the descriptor is just damaged.
        let change: UInt32 = field == 0x0C ? 5 : field == 0x44 ? 3 : field == 0x14 ? 7 << 20 : 3
        bench.lun.change(change, at: offset)
        try requireError(.changed, "field \(field)") { try file.recheck(.descriptor) }
        // For good, even when it looks the same again.
        bench.lun.restore()
        try requireError(.changed, "afterwards") { _ = try Support.readBytes(file, at: 0, count: 10) }
        try requireError(.changed, "afterwards") { try file.recheck(.everything) }
    }

    @Test(arguments: [3, 5, 6])
    func movedBlockIsNoticed(version: Int) throws {
        let bench = try Bench(version)
        let file = try bench.volume.open(Self.path)
        let first = bench.places.descriptor(of: file.fingerprint) + bench.places.addresses
        let second = first + (version == 6 ? 8 : 4)
        let bytes = try Support.readBytes(bench.lun, at: second, count: version == 6 ? 8 : 4)
        bench.lun.change(bytes, at: first)
        try requireError(.changed, "a moved block") { try file.recheck(.descriptor) }
    }

    @Test(arguments: [3, 5, 6])
    func deletedAndRenamedFilesAreNoticed(version: Int) throws {
        for isRenamed in [false, true] {
            let bench = try Bench(version)
            let file = try bench.volume.open(Self.path)
            // The directory's entry, found by its name.
            let directory = try entryOffset(bench, "thick-flat.vmdk")
            if isRenamed {
                bench.lun.change(Array("other-flat.vmdk".utf8), at: directory.name)
            } else {
                bench.lun.change(0, at: directory.address)
            }
            try requireError(.changed, "renamed: \(isRenamed)") { try file.recheck(.descriptor) }
        }
    }

    /// The places on the LUN of a name in a directory and of the address that belongs to it.
    private func entryOffset(_ bench: Bench, _ name: String) throws -> (name: UInt64, address: UInt64) {
        let text = Array(name.utf8) + [0]
        let step = 1 << 20
        // From an entry's kind to its name.
        let before = bench.places.version == 6 ? 24 : 12
        for start in stride(from: 0x110_0000, to: 0x110_0000 + 80 * step, by: step) {
            let bytes = try Support.readBytes(bench.lun, at: UInt64(start), count: step)
            for found in indices(of: text, in: bytes) where found >= before && bytes[found - before] == 3 {
                let at = UInt64(start + found)
                return (at, at - UInt64(before) + 4)
            }
        }
        throw CheckFailure("\(name) is in no directory")
    }

    private func indices(of text: [UInt8], in bytes: [UInt8]) -> [Int] {
        var found: [Int] = []
        bytes.withUnsafeBytes { all in
            text.withUnsafeBytes { text in
                guard let start = all.baseAddress, let wanted = text.baseAddress else { return }
                var from = 0
                while let next = memmem(start + from, all.count - from, wanted, text.count) {
                    found.append(UnsafeRawPointer(next) - start)
                    from = (found.last ?? 0) + 1
                }
            }
        }
        return found
    }

    /// A host that takes the lock may change everything, so everything is compared; if it did not, nothing is wrong.
    @Test(arguments: [3, 5, 6])
    func takenLockAloneIsNoChange(version: Int) throws {
        let bench = try Bench(version)
        let file = try bench.volume.open(Self.big)
        bench.lun.change(99, at: bench.places.descriptor(of: file.fingerprint) + 0x1C)
        try file.recheck(.descriptor)
        #expect(try bench.volume.entry(Self.big).lock.token == 99)
    }

    /// Pointer blocks can change without their descriptor.
    @Test(arguments: [3, 5, 6])
    func changedPointerBlockIsNoticed(version: Int) throws {
        let bench = try Bench(version)
        let file = try bench.volume.open(Self.big)
        let place = try pointerBlock(bench)
        bench.lun.change([0, 0, 0, 0, 0, 0, 0, 0], at: place)
        // The descriptor does not show it; the pointer blocks do.
        try file.recheck(.descriptor)
        try requireError(.changed, "a changed pointer block") { try file.recheck(.everything) }
    }

    /// A lock that was taken makes even the quick look compare everything.
    @Test(arguments: [5, 6])
    func changedPointerBlockUnderATakenLockIsNoticed(version: Int) throws {
        let bench = try Bench(version)
        let file = try bench.volume.open(Self.big)
        bench.lun.change([0, 0, 0, 0, 0, 0, 0, 0], at: try pointerBlock(bench))
        bench.lun.change(99, at: bench.places.descriptor(of: file.fingerprint) + 0x1C)
        try requireError(.changed, "a changed pointer block") { try file.recheck(.descriptor) }
    }

    /// Pointer blocks that had to leave the cache are read again when they are needed.
    @Test(arguments: [5, 6])
    func changedPointerBlockIsNoticedWhenItIsReadAgain(version: Int) throws {
        let bench = try Bench(version)
        // Each of these has one pointer block or two; the cache takes 16 slices.
        let file = try bench.volume.open("vm1/huge-flat.vmdk")
        _ = try Support.readBytes(file, at: 0, count: 512)
        let places = try readsFor(bench) { _ = try Support.readBytes(file, at: 117 << 30, count: 512) }
        if places.count > 1 {
            bench.lun.change([1, 1, 1, 1], at: places[0].lowerBound)
            try requireError(.changed, "a changed pointer block") {
                _ = try Support.readBytes(file, at: 117 << 30, count: 512)
            }
        }
    }

    /// The pointer block of the big disk on the LUN: what reading everything reads last but for the descriptors.
    private func pointerBlock(_ bench: Bench) throws -> UInt64 {
        let file = try bench.volume.open(Self.big)
        let length: UInt64 = bench.places.version == 6 ? 65536 : 4096
        let reads = try readsFor(bench) { try file.recheck(.everything) }
        let without = Set(try readsFor(bench) { try file.recheck(.descriptor) })
        let only = reads.filter { !without.contains($0) && $0.count64 >= length }
        return try #require(only.first).lowerBound
    }

    private func readsFor(_ bench: Bench, _ body: () throws -> Void) throws -> [Range<UInt64>] {
        let reads = Locked<[Range<UInt64>]>([])
        bench.lun.beforeEachRead { range in reads.withLock { $0.append(range) } }
        defer { bench.lun.beforeEachRead(nil) }
        try body()
        return reads.withLock { $0 }
    }

    /// A file that changes between any two reads of opening it is opened as it was, as it is, or not at all.
    @Test(arguments: [3, 5, 6])
    func changeDuringTheWalkIsNoticed(version: Int) throws {
        let total = try readsFor(Bench(version)) { bench in _ = try bench.volume.open(Self.big) }.count
        #expect(total > 5)
        for step in 0..<total {
            let bench = try Bench(version)
            let before = try bench.volume.open(Self.big).fingerprint
            let offset = bench.places.metadata(of: before)
            let count = Atomic<Int>(0)
            let lun = bench.lun
            bench.lun.beforeEachRead { _ in
                // A file with the same descriptor, but another generation.
                if count.add(1, ordering: .relaxed).oldValue == step { lun.change(0x1234, at: offset + 4) }
            }
            do throws(BlockError) {
                let opened = try bench.volume.open(Self.big).fingerprint
                #expect(opened.generation == 0x1234, "step \(step): the old file after the change")
            } catch {
                #expect(error.kind == .changed, "step \(step): \(error)")
            }
        }
    }

    private func readsFor(_ bench: Bench, _ body: (Bench) throws -> Void) throws -> [Range<UInt64>] {
        try readsFor(bench) { try body(bench) }
    }

    /// What a host is just writing is read again.
    @Test(arguments: [5, 6])
    func halfWrittenMetadataIsReadAgain(version: Int) throws {
        let bench = try Bench(version, attempts: 3)
        let fingerprint = try bench.volume.open(Self.path).fingerprint
        bench.lun.change(0, at: bench.places.descriptor(of: fingerprint))
        let reads = Atomic<Int>(0)
        let lun = bench.lun
        bench.lun.beforeEachRead { range in
            if range.contains(bench.places.descriptor(of: fingerprint)),
                reads.add(1, ordering: .relaxed).oldValue == 1
            {
                lun.restore()
            }
        }
        #expect(try bench.volume.open(Self.path).fingerprint == fingerprint)
    }

    @Test(arguments: [5, 6])
    func longReadsLookAgain(version: Int) throws {
        let bench = try Bench(version, recheckSeconds: 0.001)
        let file = try bench.volume.open(Self.path)
        var extents = ExtentList(capacity: 16)
        // Maps that may not wait stop when it is time to look; those that may, look.
        while try file.map(0..<512, .resident, into: &extents) == 512 { extents.removeAll() }
        extents.removeAll()
        #expect(try file.map(0..<512, .blocking, into: &extents) == 512)
        bench.lun.change(77, at: bench.places.metadata(of: file.fingerprint) + 4)
        var failure: BlockError?
        while failure == nil {
            do throws(BlockError) {
                extents.removeAll()
                _ = try file.map(0..<512, .blocking, into: &extents)
            } catch { failure = error }
        }
        #expect(failure?.kind == .changed)
        try requireError(.changed, "a map that may not wait") {
            _ = try file.map(0..<512, .resident, into: &extents)
        }
    }

    /// A resource file that grew after the datastore was opened.
    @Test func grownDescriptorFileIsLoadedAgain() throws {
        let image = try VMFSImage.make(5)
        let lun = ChangingDevice(try image.luns()[0])
        let size = Places(version: 5).firstDescriptor + 2 * 2048 + 512 + 0x14
        let whole = try Support.readBytes(lun, at: size, count: 8)
        // Cluster 0 only, without the files behind its first ten.
        let cut: UInt64 = 0x10000 + 64 * 1024 + 10 * 2048
        lun.change((0..<8).map { UInt8(truncatingIfNeeded: cut >> (8 * $0)) }, at: size)
        let volume = try openVolume([lun])
        try requireError(.corrupt, "a descriptor past the end") { _ = try volume.open("readme.txt") }
        lun.change(whole, at: size)
        #expect(try volume.open("readme.txt").info.size == 6)
    }
}
