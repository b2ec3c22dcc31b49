// The lists that maps and status fill: joining, capacity, and the small types in them.
import Block
import LinuxIO
import Support
import Testing

@Suite struct ListTests {
    private let file = FileRef(descriptor: 5, traits: [])

    @Test func extentsJoinWhereTheyContinue() throws {
        var list = ExtentList(capacity: 8)
        try require(list.append(10, .file(file, offset: 100)))
        try require(list.append(5, .file(file, offset: 110)))
        try require(list.count == 1)
        // A gap, a step back, another file, other traits of the same file.
        try require(list.append(5, .file(file, offset: 116)))
        try require(list.append(5, .file(file, offset: 116)))
        try require(list.append(5, .file(FileRef(descriptor: 6, traits: []), offset: 121)))
        try require(list.append(5, .file(FileRef(descriptor: 6, traits: .stable), offset: 126)))
        try require(list.count == 5)
        try require(list.append(1, .zeros(allocated: true)))
        try require(list.append(2, .zeros(allocated: true)))
        try require(list.append(3, .zeros(allocated: false)))
        try require(list.count == 7)
        try require((0..<list.count).map { list[$0].length } == [15, 5, 5, 5, 5, 3, 3])
        try require(list.length == 41)
    }

    @Test func sourcesJoinByHandleAndOffset() throws {
        final class Nothing: ByteSource {
            let isPrompt = true
            func read(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(BlockError) {}
        }
        let (first, second) = (SourceHandle(Nothing()), SourceHandle(Nothing()))
        var list = ExtentList(capacity: 8)
        try require(list.append(8, .source(first.reference, offset: 0)))
        try require(list.append(8, .source(first.reference, offset: 8)))
        try require(list.append(8, .source(second.reference, offset: 16)))
        try require(list.append(8, .source(second.reference, offset: 25)))
        try require((0..<list.count).map { list[$0].length } == [16, 8, 8])
        #expect(first.reference.source is Nothing)
    }

    @Test func fullListTakesOnlyWhatJoins() throws {
        var list = ExtentList(capacity: 1)
        try require(list.append(10, .file(file, offset: 0)))
        try require(!list.append(10, .zeros(allocated: false)))
        try require(list.append(0, .zeros(allocated: false)))
        try require(list.append(1, .file(file, offset: 10)))
        try require(list.count == 1)
        try require(list.length == 11)
        list.removeAll()
        try require(list.count == 0 && list.length == 0)
        try require(list.append(3, .zeros(allocated: false)))
    }

    @Test func placesAdvance() {
        if case .file(let reference, let offset) = Place.file(file, offset: 7).advanced(by: 5) {
            #expect(reference == file && offset == 12)
        } else {
            Issue.record("a file place became something else")
        }
        if case .zeros(let allocated) = Place.zeros(allocated: true).advanced(by: 5) {
            #expect(allocated)
        } else {
            Issue.record("zeros became something else")
        }
    }

    @Test func statusExtentsJoinWhereTheySayTheSame() throws {
        var list = StatusList(capacity: 2)
        try require(list.append(1, 0))
        try require(list.append(2, 0))
        try require(list.append(3, 1))
        try require(!list.append(4, 0))
        try require(list.append(0, 5))
        try require(list.append(5, 1))
        try require(list.extents.map(\.length) == [3, 8])
        try require(list.extents.map(\.value) == [0, 1])
        try require(list.length == 11)
        list.removeAll()
        try require(list.extents.isEmpty && list.length == 0)
    }

    @Test(arguments: [1, 512, 4096, 65536, 1 << 31] as [UInt32])
    func traitsCarryAlignment(alignment: UInt32) {
        let traits: FileTraits = [.direct, .blockNode]
        let aligned = traits.aligned(to: alignment)
        #expect(aligned.alignment == UInt64(alignment))
        #expect(aligned.contains(.direct) && aligned.contains(.blockNode) && !aligned.contains(.stable))
        #expect(aligned.aligned(to: 512).alignment == 512)
        #expect(aligned.union(.stable).alignment == UInt64(alignment))
    }
}

@Suite struct SmallTypeTests {
    @Test func integersKeepTheirByteOrder() throws {
        let bytes: [UInt8] = [0xFF, 0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x07, 0x08]
        bytes.withUnsafeBytes {
            #expect($0.bigEndian(1, as: UInt16.self) == 0x0102)
            #expect($0.bigEndian(1, as: UInt64.self) == 0x0102_0304_0506_0708)
            #expect($0.littleEndian(1, as: UInt32.self) == 0x0403_0201)
        }
        var list: [UInt8] = []
        list.appendBigEndian(UInt32(0x0A0B_0C0D))
        try require(list == [0x0A, 0x0B, 0x0C, 0x0D])
        let buffer = Buffer(count: 9)
        buffer.bytes.storeBigEndian(UInt64(0x0102_0304_0506_0708), at: 1)
        #expect(Array(buffer.readable[1...]) == [1, 2, 3, 4, 5, 6, 7, 8])
    }

    @Test func buffersAreAligned() {
        for count in [1, 511, 4097] {
            let buffer = Buffer(count: count)
            #expect(buffer.bytes.count == count)
            #expect(UInt(bitPattern: buffer.bytes.baseAddress) % UInt(Buffer.alignment) == 0)
        }
        #expect(ZeroPage.bytes.count == ZeroPage.count)
        #expect(ZeroPage.bytes.allSatisfy { $0 == 0 })
    }

    @Test func errorsTellTheirStory() {
        let error = BlockError(errno: 28, "writing 5 bytes")
        #expect(error.kind == .noSpace)
        #expect("\(error)" == "writing 5 bytes: No space left on device")
        #expect(error.during("saving x").message == "saving x: writing 5 bytes: No space left on device")
        #expect(error.during("saving x").kind == .noSpace)
        #expect(systemErrorText(99999).contains("99999"))
        // EPERM, ENOENT, EIO, EACCES, EINVAL, EOPNOTSUPP, ESHUTDOWN, one that nobody knows.
        let kinds: [(Int32, BlockError.Kind)] = [
            (1, .readOnly), (2, .notFound), (5, .inputOutput), (13, .denied), (22, .invalid), (95, .unsupported),
            (108, .shutdown), (99999, .inputOutput), (27, .noSpace), (75, .tooLarge), (12, .noMemory), (30, .readOnly),
        ]
        for (number, kind) in kinds { #expect(BlockError.Kind(errno: number) == kind, "errno \(number)") }
    }

    @Test func lockedValuesAreNotTorn() throws {
        let counter = Locked(0)
        try concurrently(
            (0..<4).map { _ in { @Sendable in for _ in 0..<10_000 { counter.withLock { $0 += 1 } } } })
        #expect(counter.withLock { $0 } == 40_000)
    }
}
