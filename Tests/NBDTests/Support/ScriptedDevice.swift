// Devices that do what a test tells them: fail, block, count, and change their map while somebody reads.
import Block
import Glibc
import LinuxIO
import Synchronization

/// A device in memory, every call of which runs a hook first.
final class ScriptedDevice: BlockDevice {
    typealias Hook = @Sendable (Range<UInt64>) throws(BlockError) -> Void

    let info: DeviceInfo
    private let content: Locked<[UInt8]>
    private let beforeRead: Hook
    private let beforeWrite: Hook
    private let handle = Locked<SourceHandle?>(nil)
    /// Calls of flush, and of writes and zeroing that were to be durable.
    let flushes = Atomic<Int>(0)
    /// Ranges that were prefetched.
    let prefetched = Locked<[Range<UInt64>]>([])
    /// Ranges that were discarded.
    let discarded = Locked<[Range<UInt64>]>([])

    /// A writable device with a content.
    init(
        _ content: [UInt8], configure: (inout DeviceInfo) -> Void = { _ in },
        beforeRead: @escaping Hook = { (_) throws(BlockError) in },
        beforeWrite: @escaping Hook = { (_) throws(BlockError) in }
    ) {
        var info = DeviceInfo(size: UInt64(content.count), format: "raw", name: "scripted")
        info.isReadOnly = false
        configure(&info)
        self.info = info
        self.content = Locked(content)
        self.beforeRead = beforeRead
        self.beforeWrite = beforeWrite
    }

    /// The content at this time.
    var bytes: [UInt8] { content.withLock { $0 } }

    private final class Source: ByteSource {
        let isPrompt = false
        unowned let device: ScriptedDevice
        init(_ device: ScriptedDevice) { self.device = device }

        func read(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(BlockError) {
            try device.beforeRead(offset..<(offset + UInt64(buffer.count)))
            device.content.withLock { content in
                content.withUnsafeBytes {
                    buffer.copyMemory(from: .init(rebasing: $0[Int(offset)...].prefix(buffer.count)))
                }
            }
        }
    }

    func map(_ range: Range<UInt64>, _ patience: Patience, into extents: inout ExtentList) throws(BlockError) -> UInt64
    {
        let reference = handle.withLock { handle in
            let made = handle ?? SourceHandle(Source(self))
            handle = made
            return made.reference
        }
        return extents.append(range.count64, .source(reference, offset: range.lowerBound))
            ? range.upperBound : range.lowerBound
    }

    func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64, durable: Bool) throws(BlockError) {
        try beforeWrite(offset..<(offset + UInt64(bytes.count)))
        content.withLock { $0.replaceSubrange(Int(offset)..<(Int(offset) + bytes.count), with: bytes) }
        if durable { flushes.add(1, ordering: .relaxed) }
    }

    func zero(_ range: Range<UInt64>, _ options: ZeroOptions) throws(BlockError) {
        try beforeWrite(range)
        if options.contains(.fastOnly) { throw BlockError(.unsupported, "zeroing fast: not here") }
        content.withLock {
            $0.replaceSubrange(
                Int(range.lowerBound)..<Int(range.upperBound), with: repeatElement(0, count: Int(range.count64)))
        }
        if options.contains(.durable) { flushes.add(1, ordering: .relaxed) }
    }

    func discard(_ range: Range<UInt64>, durable: Bool) throws(BlockError) {
        try beforeWrite(range)
        discarded.withLock { $0.append(range) }
    }

    func flush() throws(BlockError) { flushes.add(1, ordering: .relaxed) }
    func prefetch(_ range: Range<UInt64>) { prefetched.withLock { $0.append(range) } }
}

/// A device whose bytes move while they are read: the first maps of it point at bytes that are garbage by the time
/// anybody reads them, and its version says so. It holds still for those who ask it to.
final class MovingDevice: BlockDevice {
    let info: DeviceInfo
    private let stale: FileRef
    private let current: FileRef
    private let files: [Descriptor]
    private let version = Atomic<UInt64>(0)
    private let movesLeft: Atomic<Int>
    private let holders = Atomic<Int>(0)

    /// A device that moves this many times, `Int.max` for one that never rests. Its bytes are 0x11; what was there
    /// before is 0xEE.
    init(size: Int, moves: Int, traits: FileTraits, directory: String = "/var/tmp") throws {
        info = DeviceInfo(size: UInt64(size), format: "raw", name: "moving")
        files = try [UInt8(0xEE), 0x11].map { value in
            let file = try Descriptor.open(directory, O_TMPFILE | O_RDWR)
            let content = [UInt8](repeating: value, count: size)
            guard pwrite(file.number, content, size, 0) == size else { throw BlockError(errno: errno, "preparing") }
            return file
        }
        stale = FileRef(descriptor: files[0].number, traits: traits)
        current = FileRef(descriptor: files[1].number, traits: traits)
        movesLeft = Atomic(moves)
    }

    var mapVersion: UInt64 { version.load(ordering: .sequentiallyConsistent) }

    func map(_ range: Range<UInt64>, _ patience: Patience, into extents: inout ExtentList) throws(BlockError) -> UInt64
    {
        let isHeld = holders.load(ordering: .sequentiallyConsistent) > 0
        let moves = !isHeld && movesLeft.subtract(1, ordering: .sequentiallyConsistent).newValue >= 0
        if moves { version.add(1, ordering: .sequentiallyConsistent) }
        _ = extents.append(range.count64, .file(moves ? stale : current, offset: range.lowerBound))
        return range.upperBound
    }

    func holdingMap(of range: Range<UInt64>, _ body: () throws(BlockError) -> Void) throws(BlockError) {
        holders.add(1, ordering: .sequentiallyConsistent)
        defer { holders.subtract(1, ordering: .sequentiallyConsistent) }
        try body()
    }
}

/// A gate that calls wait at until it is opened; for devices that block.
final class Gate: Sendable {
    private let isOpen = Atomic<Bool>(false)
    /// Calls that have come to the gate.
    let arrived = Atomic<Int>(0)

    /// Waits until the gate is open, at most 30 s, after which the test has failed anyhow.
    func pass() {
        arrived.add(1, ordering: .sequentiallyConsistent)
        for _ in 0..<30_000 where !isOpen.load(ordering: .sequentiallyConsistent) { usleep(1000) }
    }
    func open() { isOpen.store(true, ordering: .sequentiallyConsistent) }

    /// Waits until so many calls have come.
    func waitForArrivals(_ count: Int) -> Bool {
        eventually { self.arrived.load(ordering: .sequentiallyConsistent) >= count }
    }
}

/// Waits until something is true, at most 20 s.
func eventually(_ isTrue: () -> Bool) -> Bool {
    for _ in 0..<10_000 {
        if isTrue() { return true }
        usleep(2000)
    }
    return isTrue()
}
