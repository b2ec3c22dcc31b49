// Stream-optimised VMDKs that diskgate writes: the same bytes but for the content id, and a disk for other readers.
import Block
import Foundation
import Support
import Testing

@testable import Formats

/// A disk as a stream-optimised VMDK, handed over in pieces.
func streamOptimized(
    _ disk: [UInt8], pieces: Int = 100_000, name: String = "a.vmdk", contentID: UInt32? = 0x1234_ABCD
) throws -> [UInt8] {
    let file = Locked<[UInt8]>([])
    let size = UInt64(disk.count)
    let writer = try StreamOptimizedWriter(size: size, name: name, contentID: contentID) { (bytes) in
        file.withLock { $0 += bytes }
    }
    for start in stride(from: 0, to: disk.count, by: pieces) {
        let piece = disk[start..<min(start + pieces, disk.count)]
        try piece.withUnsafeBytes { try writer.write($0, at: UInt64(start)) }
    }
    try writer.finish()
    return file.withLock { $0 }
}

@Suite struct VMDKWriterTests {
    @Test(arguments: [1, 512, 65536, 300_000, (70 << 20) + 1536])
    func whatIsWrittenIsReadByUsAndByOthers(size: Int) throws {
        let scratch = try Scratch()
        try VMDKHostedTests.makeSource(scratch, size: size)
        let source = try scratch.bytes("source.raw")
        let image = try streamOptimized(source)
        try Data(image).write(to: URL(fileURLWithPath: scratch.file("a.vmdk")))
        let padded = source + [UInt8](repeating: 0, count: (512 - size % 512) % 512)
        try expectSame(try VMDKHostedTests.open(scratch, "a.vmdk"), padded)
        try scratch.qemuImg("check -q -f vmdk a.vmdk")
        try scratch.qemuImg("convert -f vmdk -O raw a.vmdk qemu.raw")
        #expect(try scratch.bytes("qemu.raw") == padded)
        let told = try scratch.run("vmdkinfo", "a.vmdk")
        #expect(told.contains("Stream optimized") && told.contains("(\(padded.count) bytes)"), "\(told)")
    }

    @Test func everyDiskThatIsWrittenHasItsOwnContentID() throws {
        let ids = try (0..<4).map { _ in
            let image = try streamOptimized(patternBytes(1000, seed: 1), contentID: nil)
            let disk = try #require(try FilesInMemory(files: ["a.vmdk": image]).disk("a.vmdk") as? VMDKDevice)
            #expect(disk.parent == nil && disk.descriptor.contentID < VMDKDescriptor.untouched)
            return disk.descriptor.contentID
        }
        #expect(Set(ids).count > 1 && !ids.contains(0), "\(ids)")
    }

    @Test func bytesFollowFromTheDiskNameAndContentID() throws {
        let disk = patternBytes(3 << 20, seed: 4) + [UInt8](repeating: 0, count: 40 << 20) + patternBytes(100, seed: 5)
        let once = try streamOptimized(disk)
        #expect(try streamOptimized(disk, pieces: 1 << 20) == once)
        #expect(try streamOptimized(disk, pieces: 77_777) == once)
        // Zeros that are named as such are the same as those that are found.
        let file = Locked<[UInt8]>([])
        let (size, id) = (UInt64(disk.count), UInt32(0x1234_ABCD))
        let writer = try StreamOptimizedWriter(size: size, name: "a.vmdk", contentID: id) { (bytes) in
            file.withLock { $0 += bytes }
        }
        try disk[..<(3 << 20)].withUnsafeBytes { try writer.write($0, at: 0) }
        try writer.zero((3 << 20)..<(3 << 20) + 1000)
        try writer.zero(((3 << 20) + 1000)..<(43 << 20))
        try disk[(43 << 20)...].withUnsafeBytes { try writer.write($0, at: 43 << 20) }
        try writer.finish()
        #expect(file.withLock { $0 } == once)
        #expect(try streamOptimized(disk, name: "b.vmdk") != once)
        #expect(try streamOptimized(disk, contentID: 1) != once)
    }

    @Test func zerosTakeNoRoom() throws {
        let file = Locked<Int>(0)
        let writer = try StreamOptimizedWriter(size: 1 << 40, name: "a.vmdk") { (bytes) in
            file.withLock { $0 += bytes.count }
        }
        try writer.zero(0..<(1 << 40))
        try writer.finish()
        #expect(file.withLock { $0 } < 300_000)
    }

    @Test func writingOutOfOrderOrTooLittleIsRefused() throws {
        let writer = try StreamOptimizedWriter(size: 200_000, name: "a.vmdk") { _ in }
        try patternBytes(1000, seed: 1).withUnsafeBytes { bytes in
            try writer.write(bytes, at: 0)
            for offset: UInt64 in [0, 999, 1001, 199_999, .max] {
                try requireError(.invalid, "at \(offset)") { try writer.write(bytes, at: offset) }
            }
        }
        try requireError(.invalid, "zeros past the end") { try writer.zero(1000..<200_001) }
        try requireError(.invalid, "an early end") { try writer.finish() }
        try requireError(.invalid, "no disk") { _ = try StreamOptimizedWriter(size: 0, name: "a") { _ in } }
        try requireError(.tooLarge, "a huge disk") { _ = try StreamOptimizedWriter(size: 1 << 50, name: "a") { _ in } }
    }

    @Test func whatTheOutputSaysIsThrown() throws {
        struct Full: Sendable { let error = BlockError(.noSpace, "full") }
        let room = Locked<Int>(200_000)
        let writer = try StreamOptimizedWriter(size: 4 << 20, name: "a.vmdk") { (bytes) throws(BlockError) in
            let left = room.withLock { (room) -> Int in
                room -= bytes.count
                return room
            }
            if left < 0 { throw Full().error }
        }
        try requireError(.noSpace, "a full output") {
            try patternBytes(4 << 20, seed: 2).withUnsafeBytes { try writer.write($0, at: 0) }
            try writer.finish()
        }
    }

    @Test func namesThatWouldBreakALineAreNotRecorded() throws {
        for name in ["a\"b.vmdk", "a\nRW 8 FLAT \"x\".vmdk", ""] {
            let image = try streamOptimized(patternBytes(1000, seed: 1), name: name)
            let text = String(decoding: image[512..<(512 + 600)], as: UTF8.self)
            #expect(text.contains("SPARSE \"disk.vmdk\""))
            #expect(try FilesInMemory(files: ["a.vmdk": image]).disk("a.vmdk").info.size == 1024)
        }
    }
}
